"""x̂, its copies, its sums and exponents against their definition."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels.activation_prep.naive import COPIES, SUMS, activation_prep, read_at
from deltaserve_kernels.fused.parts import LANES
from deltaserve_kernels.fused.site import Activations, FusedKernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("cols", [1, 37, 576, 1536])
@pytest.mark.usefixtures("poison")
def test_a_layers_input(kernels: FusedKernels, cols: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
    x[1] = 0
    x[2, 0] = 800.0
    x[3] *= 2.0**-14
    expected, exponents = activation_prep(x)
    made = Activations.of(x.to(kernels.device), kernels.pool)
    values, sums = made.values.cpu(), made.sums.cpu()
    assert torch.equal(made.exponents[0, :5].cpu(), exponents)
    assert torch.equal(values[0, 0, :5, :cols], expected)
    assert not values[:, 0, :5, cols:].any(), "what pads is zero"
    for bits, copy in list(COPIES.items())[1:]:
        factor = 2.0 ** -read_at(bits, LANES, cols)
        assert torch.equal(values[copy, 0, :5, :cols], (expected.float() * factor).half()), bits
    whole, start = values[0, 0, :5].double(), 0
    for size in SUMS:
        count = made.width // size
        assert torch.allclose(
            sums[0, :5, start : start + count].double(), whole.view(5, count, size).sum(-1), atol=0.01
        )
        start += count
    assert start == sums.shape[2]


def test_bfloat16_is_kept_exactly() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, exponents = activation_prep(x)
    assert torch.equal(values.float() * exponents[:, None], x.float())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bad_row_harms_itself(kernels: FusedKernels, bad: float) -> None:
    x = torch.randn(3, 40)
    clean = Activations.of(x.to(kernels.device), kernels.pool).values[0, 0, [0, 2]]
    x[1, 7] = bad
    made = Activations.of(x.to(kernels.device), kernels.pool).values[0, 0]
    assert torch.equal(made[[0, 2]], clean)
    assert not made[1].isfinite().all()
