"""The papers' arithmetic, by the bytes of our terms: what holds, and, in the name of the test, what does not."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import Codec, Site
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.rank_factors import Factor
from deltaserve.codecs.rank_widths import paper_groups, paper_widths
from deltaserve.codecs.ultradelta import UltraDelta
from deltaserve_kernels.terms import Coded, LowRank

SITE = Site(number=5, seed=7)


def shape_only(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has bytes and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Llama(NamedTuple):
    """What decides the size of a model of this family; norms, embeddings and head in 2 bytes."""

    layers: int
    hidden: int
    intermediate: int
    kv: int  # rows of k_proj and v_proj
    vocabulary: int = 32_000

    def matrices(self) -> dict[tuple[int, int], int]:
        """How many of each shape in the whole model."""
        h, m = self.hidden, self.intermediate
        of_layer = [(h, h), (h, h), (self.kv, h), (self.kv, h), (m, h), (m, h), (h, m)]
        return {shape: self.layers * of_layer.count(shape) for shape in of_layer}

    @property
    def rest_bytes(self) -> int:
        return 2 * (2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden)

    @property
    def full_bytes(self) -> int:
        return self.rest_bytes + sum(2 * number * r * c for (r, c), number in self.matrices().items())

    def delta_bytes(self, codec: Codec) -> int:
        """As BitDelta counts: the matrices coded, all the rest as it is."""
        return self.rest_bytes + sum(
            number * sum(term.nbytes for term in codec.encode(shape_only(*shape), SITE))
            for shape, number in self.matrices().items()
        )


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (Llama(32, 4096, 11008, 4096), 10.87),  # Llama-2-7B: 13.48 → 1.24
        (Llama(40, 5120, 13824, 5120), 12.45),  # Llama-2-13B
        (Llama(80, 8192, 28672, 1024), 15.41),  # Llama-2-70B
        (Llama(32, 4096, 14336, 1024), 11.14),  # Mistral-7B
    ],
    ids=["7B", "13B", "70B", "Mistral-7B"],
)
def test_bitdeltas_ratios_divide_gigabytes_by_gibibytes_and_are_7_percent_less(model: Llama, published: float) -> None:
    """What they publish is full / 1e9 over delta / 2^30, of rounded figures. In bytes it is 1e9 / 2^30 of that."""
    ratio = model.full_bytes / model.delta_bytes(BitDelta(estimator="paper"))
    assert ratio * 2**30 / 1e9 == pytest.approx(published, rel=3e-3)
    assert ratio == pytest.approx(0.931 * published, rel=3e-3)


def test_bitdeltas_1_24_gb_for_llama_2_7b_are_gibibytes_and_four_tenths_of_them_are_no_signs() -> None:
    model = Llama(32, 4096, 11008, 4096)
    delta = model.delta_bytes(BitDelta(estimator="paper"))
    assert model.full_bytes / 1e9 == pytest.approx(13.48, abs=5e-3)
    assert delta / 2**30 == pytest.approx(1.24, abs=5e-3)
    assert delta / 1e9 == pytest.approx(1.334, abs=5e-4)
    assert model.full_bytes / delta == pytest.approx(10.1, abs=0.01)
    assert model.rest_bytes / delta == pytest.approx(0.39, abs=0.01)


PAPER_RANKS = {(4096, 4096): {8: 2, 3: 32, 2: 968}, (11008, 4096): {8: 2, 3: 32, 2: 1428}}  # attention, MLP


def factor(rows: int, cols: int, group: int | None, *, ranks_are_rows: bool) -> Factor:
    if group:
        return Factor(shape_only(rows, cols), None, shape_only(rows, -(-cols // group), dtype=torch.bfloat16), group)
    return Factor(shape_only(rows, cols), shape_only(rows, 1) if ranks_are_rows else shape_only(1, cols))


def coded_bits(shape: tuple[int, int], groups: dict[int, int], group: int | None) -> tuple[float, float]:
    """Bits per parameter of our terms, and what zero points as wide as the codes, one a step, would add."""
    (rows, cols), terms, zero_points = shape, [], 0
    for bits, ranks in groups.items():
        left = factor(rows, ranks, group, ranks_are_rows=False).coded(bits)
        right = factor(ranks, cols, group, ranks_are_rows=True).coded(bits)
        terms.append(LowRank(left, shape_only(ranks), right))
        zero_points += sum(bits * side.row.numel() for side in (left, right) if side.row is not None)
    return 8 * sum(term.nbytes for term in terms) / (rows * cols), zero_points / (rows * cols)


@pytest.mark.parametrize(("shape", "expected"), [((4096, 4096), 1.081), ((11008, 4096), 1.077)], ids=str)
def test_delta_comes_sixteenth_is_1_08_bits_with_its_steps_and_zero_points(
    shape: tuple[int, int], expected: float
) -> None:
    """Claimed: 1/16 of 16 bits. Its codes alone are that; for every 128 entries it has 16 bits of step and a zero point
    as wide as the codes, and σ in 16 bits."""
    bits, zero_points = coded_bits(shape, PAPER_RANKS[shape], 128)
    narrower_sigma = 16 * sum(PAPER_RANKS[shape].values()) / math.prod(shape)
    assert bits + zero_points - narrower_sigma == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shape", PAPER_RANKS, ids=str)
def test_delta_comes_ranks_are_a_sixteenth_where_a_rank_has_one_step(shape: tuple[int, int]) -> None:
    """The step is part of s, 32 bits a rank."""
    bits, _ = coded_bits(shape, PAPER_RANKS[shape], None)
    assert 0.99 < bits < 1.0025


def test_one_bit_pays_for_the_papers_ranks_less_what_steps_cost() -> None:
    assert paper_groups(1002) == PAPER_RANKS[4096, 4096]
    assert len(paper_widths((4096, 4096), 4096, 1.0)) == 998
    assert len(paper_widths((4096, 4096), 4096, 1.0, 128)) == 929


def entropy(share: float) -> float:
    """Bits of a coin that falls on one side with this probability."""
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def ultradelta_bits(sparsity: float) -> tuple[float, float, float]:
    """Of a 64 × 64 000 matrix: bits per parameter of the codes, of the whole term, and the share that is kept, one of
    every 20, 34 or 100."""
    rows, cols = 64, 64_000
    (term,) = UltraDelta(bits=4 * (1 - sparsity) + 512 / (rows * cols)).encode(torch.zeros(rows, cols), SITE)
    assert isinstance(term, Coded)
    return 8 * term.codes.nbytes / (rows * cols), 8 * term.nbytes / (rows * cols), term.num_codes / cols


@pytest.mark.parametrize(("sparsity", "published"), [(0.95, 32.9), (0.97, 50.9), (0.99, 132.5)])
def test_ultradeltas_ratios_hold_for_a_file_with_an_entropy_coded_mask(sparsity: float, published: float) -> None:
    """16 / (4 (1 − s) + H₂(s)): our codes for the first part, the entropy of what survives here for the second."""
    codes, _, kept = ultradelta_bits(sparsity)
    assert 16 / (codes + entropy(kept)) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(("sparsity", "without_mask"), [(0.95, 80), (0.97, 400 / 3), (0.99, 400)])
def test_ultradeltas_133_without_a_mask_holds_only_where_the_mask_is_a_seed(
    sparsity: float, without_mask: float
) -> None:
    """Its second version counts no mask, for positions that have to be stored. Drawn from a seed, they do not."""
    _, whole, _ = ultradelta_bits(sparsity)
    assert 16 / whole == pytest.approx(without_mask, rel=0.02)


def test_ultradeltas_23_7_for_dare_is_sixteen_bits_a_survivor_and_an_entropy_coded_mask() -> None:
    _, _, kept = ultradelta_bits(0.97)
    assert 16 / (16 * kept + entropy(kept)) == pytest.approx(23.7, rel=0.02)
