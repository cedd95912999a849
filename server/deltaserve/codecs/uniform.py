"""What codecs on uniform grids share: the step, the levels, the codes that a budget pays for.

    v̂ = step · level,   level ∈ {±1, ±3, …, ±(2^b − 1)}        b = 1 … 8 bits: grid "odd" of terms.Coded, "sign" for one

No level is zero: where zeros are wanted, a mask says them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaserve.codecs.base import Site
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.philox import random_words
from deltaserve_kernels.terms import Grid

GAUSSIAN_STEP = {
    1: 0.798,
    2: 0.498,
    3: 0.293,
    4: 0.168,
    5: 0.094,
    6: 0.0521,
    7: 0.0285,
    8: 0.0154,
}  # least squares for variance one, by bits
ROUNDS = 8
MAX_GAIN = 2.0


def normalised(delta: Tensor) -> tuple[Tensor, float]:
    """(Δ / 2^e, 2^e) with entries in −1 … 1, float32: squares neither overflow nor vanish, powers of two drop out."""
    wide = delta.double()
    factor = 2.0 ** int(torch.frexp(wide.abs().max()).exponent)
    return (wide / factor).float(), factor


def grid_of(bits: int) -> Grid:
    return "sign" if bits == 1 else "odd"


def check_tile(codec: str, tile: int) -> None:
    """Rows that share a seeded mask's columns: 1, or the 64 that kernels take at once. Raises CodecError."""
    if tile not in (1, 64):
        raise CodecError(f"{codec}: tile {tile!r} is not 1 or 64")


def nearest(values: Tensor, step: Tensor, highest: Tensor) -> Tensor:
    """Odd levels −highest … highest, float32; `step` ≥ 0 and `highest` broadcast."""
    halved = values / (2 * step).clamp(min=torch.finfo(torch.float32).tiny)
    return (2 * halved.floor() + 1).clamp(min=-highest, max=highest)


def odd_levels(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest levels, float32; `step` ≥ 0 broadcasts."""
    return nearest(values, step, values.new_tensor(2**bits - 1))


def odd_codes(levels: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes]: levels [rows, n], packed."""
    return layout.pack(((levels + (2**bits - 1)) / 2).round().to(torch.uint8), bits)


def fitted_step(values: Tensor, bits: int) -> Tensor:
    """[rows, n] → [rows, 1]: least squares for each row, levels and step in turn from a Gaussian's."""
    step = values.square().mean(1, keepdim=True).sqrt() * GAUSSIAN_STEP[bits]
    for _ in range(ROUNDS):
        levels = odd_levels(values, step, bits)
        step = (values * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
    return step


def unbiased_step(values: Tensor, levels: Tensor) -> Tensor:
    """[rows, n] → [rows, 1]: ⟨v, step · level⟩ = ‖v‖². Levels have the signs of the values."""
    along = (values * levels).sum(1, keepdim=True)  # ≥ Σ|v|
    return values.square().sum(1, keepdim=True) / along.clamp(min=torch.finfo(torch.float32).tiny)


def fair_zeros(values: Tensor, site: Site) -> Tensor:
    """Zeros (a tenth of a bf16 Δ) become a billionth of their row with a drawn sign: on an odd grid they add no common
    direction. A row of zeros stays one."""
    zero = values == 0
    if not bool(zero.any()):
        return values
    sign = 2.0 * (random_words(site.seed, site.number, *values.shape, stream=1) & 1) - 1
    return torch.where(zero, sign * (2**-30 * values.square().mean(1, keepdim=True).sqrt()), values)


def inner(left: Tensor, right: Tensor, gram: Tensor | None) -> Tensor:
    """float32 [rows]: left_r · H · right_rᵀ, in mean over inputs the product of two outputs; H = 1 where it is None."""
    return ((left if gram is None else left @ gram) * right).sum(1)


def output_gain(delta: Tensor, decoded: Tensor, gram: Tensor | None) -> Tensor:
    """[rows, 1]: g with ⟨Δ, g · Δ̂⟩_H = ‖Δ‖²_H, a row's output unbiased along itself; within a factor of MAX_GAIN."""
    power, along = inner(delta, delta, gram), inner(delta, decoded, gram)
    return torch.where(along > 0, power / along, 1).clamp(1 / MAX_GAIN, MAX_GAIN)[:, None]


def affordable(row_bits: float, bits: int, cols: int) -> int:
    """Codes of `bits` that fit into `row_bits` of a row, in whole bytes; a byte of them at least, `cols` at most."""
    number = min(cols, max(0, math.floor(row_bits / bits + 1e-9)))
    while number > 0 and 8 * layout.packed_bytes(number, bits) > row_bits + 1e-9:
        number -= 1
    return number or min(cols, max(1, 8 // bits))
