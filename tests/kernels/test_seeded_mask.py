"""One survivor in every group, at a place that the seed draws fairly and that never changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.terms import SeededMask, site_number

# χ² that a fair draw exceeds once in 1000, by degrees of freedom
CHI_SQUARE_999 = {4: 18.47, 7: 24.32, 32: 62.49, 63: 103.44}


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.double().mean()
    return float(((counts - expected) ** 2 / expected).sum())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    group=st.integers(1, 40),
    cols=st.integers(1, 90),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    site=st.integers(0, 2**32 - 1),
)
def test_every_group_has_exactly_one_survivor_within_it(group: int, cols: int, rows: int, seed: int, site: int) -> None:
    mask = SeededMask(group, seed, site)
    columns = mask.columns(rows, cols)
    groups = -(-cols // group)
    assert columns.shape == (rows, groups) == (rows, mask.num_groups(cols))
    assert torch.equal(columns // group, torch.arange(groups).expand(rows, groups))
    assert int(columns.max()) < cols
    assert mask.group_sizes(cols).tolist() == [min(group, cols - g * group) for g in range(groups)]


def test_the_columns_of_the_format_are_frozen() -> None:
    """Numbers of format version 1: a change here makes every artifact on disk mean other weights."""
    site = site_number("model.layers.0.mlp.up_proj.weight")
    assert site == 2976196783
    assert SeededMask(8, 0x0123456789ABCDEF, site).columns(3, 37).tolist() == [
        [4, 11, 22, 26, 32],
        [6, 12, 20, 29, 33],
        [1, 12, 18, 25, 36],
    ]
    assert SeededMask(2, 7, 5).columns(4, 4).tolist() == [[0, 3], [1, 3], [0, 3], [1, 2]]


def test_a_group_of_one_keeps_every_column() -> None:
    assert SeededMask(1, 3, 4).columns(2, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_group_wider_than_the_row_is_the_row() -> None:
    columns = SeededMask(4096, 3, 4).columns(64, 5)
    assert columns.shape == (64, 1)
    assert set(columns.flatten().tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize(("group", "cols"), [(8, 8), (33, 33), (8, 5)], ids=["8", "33", "short-5"])
def test_every_column_survives_equally_often(seed: int, group: int, cols: int) -> None:
    places = SeededMask(group, seed, 11).columns(8192, cols).flatten()
    counts = torch.bincount(places, minlength=cols)
    assert chi_square(counts) < CHI_SQUARE_999[cols - 1]


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_the_places_of_neighbours_are_independent(seed: int) -> None:
    places = SeededMask(8, seed, 11).columns(8192, 16) % 8
    groups = torch.bincount(places[:, 0] * 8 + places[:, 1], minlength=64)
    rows = torch.bincount(places[:-1, 0] * 8 + places[1:, 0], minlength=64)
    assert chi_square(groups) < CHI_SQUARE_999[63]
    assert chi_square(rows) < CHI_SQUARE_999[63]


def test_a_row_of_the_mask_does_not_depend_on_the_other_rows() -> None:
    mask = SeededMask(8, 1, 2)
    assert torch.equal(mask.columns(3, 40), mask.columns(50, 40)[:3])


def test_seed_and_site_change_the_mask() -> None:
    reference = SeededMask(8, 1, 2).columns(16, 64)
    for other in (SeededMask(8, 2, 2), SeededMask(8, 1 + 2**32, 2), SeededMask(8, 1, 3)):
        assert float((other.columns(16, 64) == reference).double().mean()) < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_mask_on_cpu_and_gpu() -> None:
    mask = SeededMask(8, 1, 2)
    assert torch.equal(mask.columns(33, 65), mask.columns(33, 65, "cuda").cpu())
