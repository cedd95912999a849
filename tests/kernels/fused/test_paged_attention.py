"""Attention of one query a sequence, against its definition: sizes, groups, lengths across parts, windows, sinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve_kernels.fused.site import FusedKernels
from deltaserve_kernels.paged_attention.fused import PagedAttention
from deltaserve_kernels.paged_attention.naive import paged_attention

from ..tolerances import ATTENTION_RELATIVE_RMS, relative_rms

pytestmark = pytest.mark.usefixtures("poison")
BLOCK = 16
LENGTHS = [1, 17, 255, 256, 257, 300]  # a part of a context is 256


class Cache:
    """Sequences in blocks that lie anywhere; what nobody may read is NaN."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, size: int, size_v: int, dtype: torch.dtype, device: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        blocks = [-(-length // BLOCK) for length in lengths]
        places = torch.randperm(sum(blocks) + 3, generator=generator).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        tables = torch.full((len(lengths), max(blocks) + 2), 2**30, dtype=torch.int32)
        keys, values = (torch.full((len(places) * BLOCK, kv_heads, n), torch.nan, dtype=dtype) for n in (size, size_v))
        for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
            tables[row, :count] = places[sum(blocks[:row]) :][:count]
            slots = (tables[row, :count, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length].long()
            for whole in (keys, values):
                whole[slots] = torch.randn(length, *whole.shape[1:], generator=generator).to(dtype)
        q = torch.randn(len(lengths), heads, size, generator=generator).to(dtype)
        self.q, self.keys, self.values, self.tables = (x.to(device) for x in (q, keys, values, tables))

    def answers(self, scaling: float = 0.2, **more: Any) -> tuple[Tensor, Tensor]:
        given = (self.q, self.keys, self.values, self.tables, self.lengths)
        return PagedAttention(512, BLOCK)(*given, scaling, **more), paged_attention(*given, BLOCK, scaling, **more)


@pytest.mark.parametrize("more", [{}, {"window": 5}, {"window": 270}, {"softcap": 3.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind(kernels: FusedKernels, dtype: torch.dtype, more: dict[str, Any]) -> None:
    cache = Cache(LENGTHS, 6, 2, 16, 16, dtype, kernels.device)
    if "sinks" in more:
        more = {"sinks": torch.linspace(-2, 3, 6, device=kernels.device)}
    found, wanted = cache.answers(**more)
    assert relative_rms(found, wanted) < ATTENTION_RELATIVE_RMS[dtype]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "size_v"), [(4, 4, 64, 64), (5, 1, 80, 80), (4, 2, 24, 16), (20, 1, 8, 8)]
)
def test_heads_of_any_size(kernels: FusedKernels, heads: int, kv_heads: int, size: int, size_v: int) -> None:
    found, wanted = Cache([3, 40], heads, kv_heads, size, size_v, torch.float32, kernels.device).answers()
    assert relative_rms(found, wanted) < ATTENTION_RELATIVE_RMS[torch.float32]


def test_large_scores_do_not_overflow(kernels: FusedKernels) -> None:
    found, wanted = Cache([300], 4, 2, 16, 16, torch.float32, kernels.device).answers(400.0, softcap=50.0)
    assert relative_rms(found, wanted) < ATTENTION_RELATIVE_RMS[torch.float32]


def test_a_row_without_a_context_is_zero(kernels: FusedKernels) -> None:
    cache = Cache([20, 20], 4, 2, 16, 16, torch.float32, kernels.device)
    cache.lengths[0] = 0
    found, wanted = cache.answers()
    assert not found[0].any()
    assert relative_rms(found[1], wanted[1]) < ATTENTION_RELATIVE_RMS[torch.float32]


def test_a_row_depends_on_its_own_sequence_alone(kernels: FusedKernels) -> None:
    cache = Cache([300, 9, 31], 4, 2, 16, 16, torch.bfloat16, kernels.device)
    together, _ = cache.answers()
    for row in range(3):
        width = -(-int(cache.lengths[row]) // BLOCK)
        alone = PagedAttention(512, BLOCK)(
            cache.q[row : row + 1],
            cache.keys,
            cache.values,
            cache.tables[row : row + 1, :width],
            cache.lengths[row : row + 1],
            0.2,
        )
        assert torch.equal(alone[0], together[row])


def test_long_models_have_larger_parts_and_no_more() -> None:
    assert PagedAttention(512, BLOCK).part == 256
    assert PagedAttention(131072, BLOCK).part == 2048
