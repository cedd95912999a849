"""Delta-DCT: a constant patch on paper, coefficients by the cosine formula, and who gets the bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.delta_dct import DeltaDct
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Patches, Rotated

SITE = Site(number=5, seed=7)


def encode(codec: DeltaDct, delta: Tensor) -> list[Patches]:
    patches = []
    for term in codec.encode(delta, SITE):
        assert isinstance(term, Rotated)
        assert isinstance(term.term, Patches)
        patches.append(term.term)
    return patches


def matrix(rows: int = 64, cols: int = 96) -> Tensor:
    """Some rows louder than others, as in a fine-tune."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator).square()


def cosines(size: int) -> Tensor:
    """T of the DCT-II by its formula, float64 [size, size]."""
    return torch.tensor(
        [
            [
                math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * (2 * j + 1) * k / (2 * size))
                for j in range(size)
            ]
            for k in range(size)
        ],
        dtype=torch.float64,
    )


def test_a_constant_patch_on_paper() -> None:
    """Of a constant 3 all that is not zero is the first coefficient, 8 · 3: the peak, and so exact."""
    (patch,) = encode(DeltaDct(bits=16, patch=8, estimator="paper"), torch.full((8, 8), 3.0))
    coefficients = patch.decode()
    assert patch.bits == 8
    assert float(coefficients[0, 0]) == pytest.approx(24, rel=2**-8)
    assert float(coefficients.flatten()[1:].abs().max()) == pytest.approx(24 / 255, rel=2**-8)  # there is no zero


def test_coefficients_are_those_of_the_formula() -> None:
    """Rounded by brute force: the nearest of ±1 ±3, steps of a normal source, ‖c‖² / ⟨c, level⟩."""
    delta = matrix(8, 8)
    terms = DeltaDct(bits=2.7, patch=8).encode(delta, SITE)
    c = cosines(8) @ delta.double() @ cosines(8).T
    step = 0.498 * c.square().mean().sqrt()
    levels = torch.tensor([-3.0, -1, 1, 3], dtype=torch.float64)
    nearest = levels[(c[..., None] - step * levels).abs().argmin(-1)]
    scale = float(c.square().sum() / (c * nearest).sum())
    expected = cosines(8).T @ (nearest * scale) @ cosines(8)
    assert [term.term.bits for term in terms if isinstance(term, Rotated) and isinstance(term.term, Patches)] == [2]
    torch.testing.assert_close(decode(terms).double(), expected, rtol=0, atol=2**-8 * scale * 8)


def test_the_most_important_patches_get_the_bits() -> None:
    """Norms 1 2 3 4 left to right: half of the patches at two bits, or a third at two and a third at one."""
    delta = torch.cat([matrix(8, 8) * k for k in (1, 2, 3, 4)], 1)
    (two,) = encode(DeltaDct(bits=1.2, patch=8, split="2-0"), delta)
    assert (two.bits, two.places().tolist()) == (2, [2, 3])
    one, two = encode(DeltaDct(bits=1.2, patch=8, split="2-1-0"), delta)
    assert (one.bits, one.places().tolist()) == (1, [2])
    assert (two.bits, two.places().tolist()) == (2, [3])
    one, two = encode(DeltaDct(bits=1.85, patch=8), delta)
    assert (one.bits, one.places().tolist()) == (1, [0, 1])
    assert (two.bits, two.places().tolist()) == (2, [2, 3])


@pytest.mark.parametrize("split", ["even", "2-0", "2-1-0"])
@pytest.mark.parametrize("rescale", [True, False])
def test_what_is_left_out_is_made_up_for(split: Any, rescale: bool) -> None:
    delta = matrix()
    terms = DeltaDct(bits=0.4, patch=8, split=split, rescale=rescale).encode(delta, SITE)
    gain = CodingError.of(delta, decode(terms)).gain
    assert gain == pytest.approx(1, abs=0.01) if rescale else 0.2 < gain < 0.97


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_patches_over_the_edge(patch: int) -> None:
    delta = matrix(45, 70)
    terms = DeltaDct(bits=14, patch=patch).encode(delta, SITE)
    error = CodingError.of(delta, decode(terms))
    assert error.relative < 0.03
    assert error.gain == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("bits", [0.1, 0.5, 1.0, 1.5, 3.3, 9.0])
@pytest.mark.parametrize("split", ["even", "2-0", "2-1-0"])
def test_bits_are_a_ceiling(bits: float, split: Any) -> None:
    delta = matrix(192, 192)
    num_bits = 8 * sum(term.nbytes for term in DeltaDct(bits=bits, split=split).encode(delta, SITE)) / delta.numel()
    most = {"even": 8.1, "2-0": 2.05, "2-1-0": 1.6}[split]
    assert 0.9 * min(bits, most) - 0.02 <= num_bits <= bits


def test_the_paper_reaches_from_minus_max_to_max() -> None:
    delta = matrix(8, 8)
    (patch,) = encode(DeltaDct(bits=4.6, patch=8, estimator="paper"), delta)
    peak = float((cosines(8) @ delta.double() @ cosines(8).T).abs().max())
    assert float(patch.decode().abs().max()) == pytest.approx(peak, rel=2**-7)


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (Budget(bits=0.005), {}, ["--bits 0.005", "0.006366", "192 × 576"]),
        (Budget(bits=17), {}, ["bits 17", "0 … 16"]),
        (Budget(), {"patch": 12}, ["patch 12", "8, 16 or 32"]),
        (Budget(), {"split": "3-0"}, ["split '3-0'", "2-1-0"]),
        (Budget(), {"rescale": 1}, ["rescale 1", "true or false"]),
        (Budget(), {"estimator": "best"}, ["estimator 'best'", "unbiased", "paper"]),
        (Budget(rank=3), {}, ["--rank"]),
    ],
)
def test_what_is_refused(budget: Budget, options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec("delta-dct", budget, options)
    assert all(part in caught.value.message for part in says)
