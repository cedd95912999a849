"""Survivors of groups: several of one group, shared by a tile of rows, drawn in a stream of their own, or stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels import layout
from deltaserve_kernels.philox import random_words
from deltaserve_kernels.terms import ExplicitMask, SeededMask
from deltaserve_kernels.terms.masks import place_bits

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def smallest_words(mask: SeededMask, rows: int, cols: int) -> list[list[int]]:
    """The definition of `keep` > 1, in Python's integers."""
    words = random_words(mask.seed, mask.site, -(-rows // mask.tile), cols, stream=mask.stream).tolist()
    chosen = []
    for row in range(rows):
        line = words[row // mask.tile]
        groups = [range(start, min(start + mask.group, cols)) for start in range(0, cols, mask.group)]
        kept = [sorted(sorted(group, key=lambda c: (line[c], c))[: mask.keep]) for group in groups]
        chosen.append([column for group in kept for column in group])
    return chosen


@QUICK
@given(
    group=st.integers(2, 20),
    keep=st.integers(2, 20),
    cols=st.integers(1, 50),
    rows=st.integers(1, 5),
    tile=st.integers(1, 4),
    stream=st.integers(0, 3),
)
def test_several_survivors_are_those_of_the_smallest_words(
    group: int, keep: int, cols: int, rows: int, tile: int, stream: int
) -> None:
    mask = SeededMask(group, 2**40 + 3, 9, keep=min(keep, group), tile=tile, stream=stream)
    columns = mask.columns(rows, cols)
    assert columns.tolist() == smallest_words(mask, rows, cols)
    assert columns.shape == (rows, mask.num_survivors(cols))


@pytest.mark.parametrize(("keep", "cols"), [(1, 37), (3, 37), (3, 34), (8, 40)])
def test_the_rate_is_how_many_of_a_group_survive(keep: int, cols: int) -> None:
    mask = SeededMask(8, 1, 2, keep=keep)
    sizes = mask.group_sizes(cols).tolist()
    expected = [size / min(size, keep) for size in sizes for _ in range(min(size, keep))]
    assert mask.inverse_rate(cols).tolist() == pytest.approx(expected)
    assert mask.group_of(cols).tolist() == [g for g, size in enumerate(sizes) for _ in range(min(size, keep))]


def test_the_places_of_several_survivors_are_frozen() -> None:
    """Numbers of format version 1."""
    assert SeededMask(8, 0x0123456789ABCDEF, 2976196783, keep=3).columns(2, 20).tolist() == [
        [3, 4, 6, 11, 12, 15, 16, 18, 19],
        [4, 6, 7, 10, 13, 14, 16, 17, 18],
    ]
    assert SeededMask(8, 0x0123456789ABCDEF, 2976196783, stream=2).columns(2, 20).tolist() == [
        [7, 8, 17],
        [3, 11, 18],
    ]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_rows_of_a_tile_share_their_columns(keep: int) -> None:
    tiled, single = (SeededMask(8, 1, 2, keep=keep, tile=tile) for tile in (4, 1))
    assert torch.equal(tiled.columns(10, 40), single.columns(3, 40).repeat_interleave(4, 0)[:10])


def test_a_tile_higher_than_the_matrix_is_the_matrix() -> None:
    mask = SeededMask(8, 1, 2, tile=2**40)
    assert torch.equal(mask.columns(3, 40), SeededMask(8, 1, 2).columns(1, 40).expand(3, -1))


@pytest.mark.parametrize("keep", [1, 3])
def test_a_group_far_wider_than_the_row_is_the_row(keep: int) -> None:
    assert torch.equal(
        SeededMask(2**40, 1, 2, keep=keep).columns(5, 40), SeededMask(40, 1, 2, keep=keep).columns(5, 40)
    )


def test_streams_are_drawn_apart() -> None:
    first, second = (SeededMask(8, 1, 2, keep=3, stream=stream).columns(16, 64) for stream in (0, 1))
    assert float((first == second).double().mean()) < 0.5


def test_every_column_is_among_several_survivors_equally_often() -> None:
    """Each of 8 columns with probability 3/8; standard deviation over 8192 rows under 44."""
    places = SeededMask(8, 3, 11, keep=3).columns(8192, 8)
    counts = torch.bincount(places.flatten(), minlength=8)
    assert int((counts - 8192 * 3 / 8).abs().max()) < 5 * 44


@QUICK
@given(st.data())
def test_stored_places_come_back(data: st.DataObject) -> None:
    group, cols = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 70))
    keep = data.draw(st.integers(1, group))
    sizes = [min(group, cols - start) for start in range(0, cols, group)]
    rows = [
        [sorted(data.draw(st.permutations(range(size)))[:keep]) for size in sizes]
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    places = torch.tensor([[place for kept in row for place in kept] for row in rows])
    mask = ExplicitMask(group, layout.pack(places, place_bits(group)), keep=keep)
    expected = [[g * group + place for g, kept in enumerate(row) for place in kept] for row in rows]
    assert mask.columns(len(rows), cols).tolist() == expected
    assert mask.nbytes == mask.places.nbytes == len(rows) * layout.packed_bytes(places.shape[1], place_bits(group))


@pytest.mark.parametrize(("group", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (2**16, 16)])
def test_a_place_takes_as_many_bits_as_its_group_needs(group: int, bits: int) -> None:
    assert place_bits(group) == bits
