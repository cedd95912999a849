"""A whole site in one call: the base and the parts of each run are the sum of what they are alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deltaserve_kernels.native import packing
from deltaserve_kernels.native.library import Library
from deltaserve_kernels.native.parts import Part, base_scale, part_of, vector
from deltaserve_kernels.native.site import PackedSite, PartList, apply_part, runs_of

from ..forms import activations, forms, whole_forms
from ..tolerances import NATIVE_RELATIVE_RMS, relative_rms

ROWS, COLS, TOKENS = 200, 97, 40
TENANTS = [["sign-1", "factors"], ["book"], ["mask-1-of-8", "rotated-patches-16", "gaussian-2-6"]]
RUNS = [(2, 5), (7, 1), (10, 21)]  # start, rows: rows 0, 1, 8, 9 and 31 … are the base's
Deltas = Sequence[Sequence[tuple[Part, int, float]]]


def part(name: str, rows: int = ROWS, cols: int = COLS) -> Part:
    made = part_of(forms(rows, cols)[name])
    assert made is not None
    return made


def weight(rows: int = ROWS, cols: int = COLS) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).bfloat16()


def whole(n: int) -> int:
    return -(-n // 32) * 32


def served(
    library: Library,
    site: PackedSite,
    x: Tensor,
    runs: Sequence[tuple[int, int]],
    deltas: Deltas,
    fill: float = torch.nan,
) -> Tensor:
    """y [T, rows] of a call on an input with NaN past what may be read and an output with `fill` everywhere. What is
    past the site's whole tiles stays as it is."""
    tokens, wide, tall = len(x), whole(site.cols), whole(site.rows)
    inputs = torch.full((tokens + 1, wide + 32), torch.nan, dtype=torch.bfloat16)
    inputs[:tokens, :wide] = 0
    inputs[:tokens, : site.cols] = x
    y = torch.full((tokens + 16, tall + 32), fill)
    before = y.clone()
    lists = [PartList(delta) for delta in deltas]
    made = runs_of([(*run, own) for run, own in zip(runs, lists, strict=True)])
    site.run(library, inputs[:tokens], y[:tokens], made, len(lists))
    assert torch.equal(y[tokens:].nan_to_num(), before[tokens:].nan_to_num())
    assert torch.equal(y[:, tall:].nan_to_num(), before[:, tall:].nan_to_num())
    return y[:tokens, : site.rows]


def deltas() -> list[list[tuple[Part, int, float]]]:
    return [[(part(name), 0, 0.5) for name in names] for names in TENANTS]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_call_is_the_sum_of_its_pieces(library: Library, threads: int, has_bias: bool) -> None:
    x, bias = activations(TOKENS, COLS), torch.randn(ROWS) if has_bias else None
    library.set_threads(threads)
    y = served(library, PackedSite(ROWS, COLS, weight(), bias), x, RUNS, deltas())
    base = x.double() @ weight().double().T
    expected = base if bias is None else base + bias
    for (start, count), names in zip(RUNS, TENANTS, strict=True):
        for name in names:
            expected[start : start + count] += (
                0.5 * x[start : start + count].double() @ forms(ROWS, COLS)[name].decode().double().T
            )
    assert bool(y.isfinite().all())
    assert relative_rms(y, expected) < NATIVE_RELATIVE_RMS["rounded"]
    others = [row for row in range(TOKENS) if not any(start <= row < start + count for start, count in RUNS)]
    assert torch.equal(y[others], served(library, PackedSite(ROWS, COLS, weight(), bias), x[others], [], []))


def test_pieces_of_integers_add_up_exactly(library: Library) -> None:
    rows, cols, x = 36, 64, torch.arange(-4, 4).repeat(8).expand(3, 64).bfloat16()
    site = PackedSite(rows, cols, torch.ones(rows, cols), torch.arange(rows))
    terms = list(whole_forms(rows, cols).values())
    parts = [(one, 0, 2.0) for term in terms if (one := part_of(term))]
    assert len(parts) == len(terms)
    y = served(library, site, x, [(1, 1)], [parts])
    expected = x.double() @ torch.ones(cols, rows).double() + torch.arange(rows)
    for term in terms:
        expected[1] += 2 * x[1].double() @ term.decode().double().T
    assert torch.equal(y.double(), expected)


def test_without_a_weight_parts_are_added_to_what_is_there(library: Library) -> None:
    x = activations(TOKENS, COLS)
    y = served(library, PackedSite(ROWS, COLS), x, RUNS, deltas(), fill=3.0)
    for (start, count), own in zip(RUNS, deltas(), strict=True):
        expected = torch.full((count, ROWS), 3.0)
        for one, _, gamma in own:
            expected += apply_part(library, x[start : start + count], one, gamma)
        assert torch.equal(y[start : start + count], expected)
    assert bool((y[[0, 1, 8, 9, *range(31, TOKENS)]] == 3).all())


def test_a_row_depends_on_neither_its_batch_nor_the_threads(library: Library) -> None:
    """Bit for bit: a row alone, in a batch, in another order, beside other runs, in another slice of a long batch."""
    x, own, site = activations(TOKENS, COLS), deltas(), PackedSite(ROWS, COLS, weight(), torch.ones(ROWS))
    expected = served(library, site, x, RUNS, own)
    tenant = {row: index for index, (start, count) in enumerate(RUNS) for row in range(start, start + count)}
    for threads in (1, 2):
        library.set_threads(threads)
        for row in range(TOKENS):
            runs, mine = ([(0, 1)], [own[tenant[row]]]) if row in tenant else ([], [])
            assert torch.equal(served(library, site, x[row : row + 1], runs, mine)[0], expected[row])
        blocks = [list(range(start, start + count)) for start, count in RUNS]
        order = [*blocks[2][::-1], *blocks[0], 35, 0, *blocks[1]]
        starts = [(0, 21), (21, 5), (28, 1)]
        assert torch.equal(served(library, site, x[order], starts, [own[2], own[0], own[1]]), expected[order])
        assert torch.equal(served(library, site, x, RUNS[1:], own[1:])[10:], expected[10:])
        again = served(library, site, x.repeat(9, 1), [(start + 240, count) for start, count in RUNS], own)
        assert torch.equal(again[240:280], expected)


def test_runs_that_cross_slices_of_long_batches(library: Library) -> None:
    x = activations(600, COLS)
    site, one = PackedSite(ROWS, COLS, weight()), [(part("odd-2"), 0, 1.0), (part("book"), 0, 1.0)]
    for threads in (1, 2):
        library.set_threads(threads)
        y = served(library, site, x, [(3, 590)], [one])
        for start, stop in ((3, 20), (250, 262), (505, 593)):
            alone = served(library, site, x[start:stop], [(0, stop - start)], [one])
            assert torch.equal(y[start:stop], alone)
        ends = [0, 1, 2, *range(593, 600)]
        assert torch.equal(y[ends], served(library, site, x[ends], [], []))


@pytest.mark.parametrize("heights", [(128, 64, 64), (40, 24, 24), (70, 33, 97)], ids=str)
def test_parts_of_fused_layers_begin_at_their_first_row(library: Library, heights: tuple[int, ...]) -> None:
    """q, k and v share an input; where a layer starts need not be the start of a tile."""
    firsts = list(itertools.accumulate(heights, initial=0))
    names = ["odd-2", "mask-1-of-8", "book-turned", "groups", "patches", "gaussian-3-7", "float-16", "factors", "book"]
    site, x = PackedSite(firsts[-1], COLS, weight(firsts[-1])), activations(17, COLS)
    base = served(library, site, x, [], [])
    for name in names:
        own = [(part(name, height), first, 1.0) for height, first in zip(heights, firsts, strict=False)]
        apart = [apply_part(library, x[2:9], one) for one, _, _ in own]
        for threads in (1, 2, 3):
            library.set_threads(threads)
            y = served(library, site, x, [(2, 7)], [own])
            assert torch.equal(y[2:9], base[2:9] + torch.cat(apart, 1)), (name, threads)
            assert torch.equal(y[9:], base[9:])


def test_a_scale_of_the_bases_rows_comes_before_what_is_added(library: Library) -> None:
    """(IA)³ and a bias of its own: the base times a factor for each row, the terms, a vector, the base's bias."""
    x, bias, factor, own_bias = activations(9, COLS), torch.randn(ROWS), torch.rand(70) + 0.5, torch.randn(70)
    term = part("odd-4", 70)
    own = [(base_scale(70, 1.0, factor), 64, 1.0), (term, 64, 1.0), (vector(own_bias), 64, 1.0)]
    base = served(library, PackedSite(ROWS, COLS, weight()), x, [], [])
    expected = base.clone()
    expected[2:5, 64:134] = expected[2:5, 64:134] * factor + apply_part(library, x[2:5], term) + own_bias
    for threads in (1, 2):
        library.set_threads(threads)
        y = served(library, PackedSite(ROWS, COLS, weight(), bias), x, [(2, 3)], [own])
        assert torch.equal(y, expected + bias)
    halved = served(library, PackedSite(ROWS, COLS, weight()), x, [(0, 9)], [[(base_scale(ROWS, 0.5, None), 0, 1.0)]])
    assert torch.equal(halved, base / 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (64, 96), (33, 65)], ids=str)
def test_weights_of_any_shape_come_back_and_are_served(library: Library, shape: tuple[int, int]) -> None:
    site, x = PackedSite(*shape, weight(*shape)), activations(17, shape[1])
    assert site.tiles is not None
    assert torch.equal(packing.untile(site.tiles, *shape), weight(*shape))
    assert site.nbytes == whole(shape[0]) * whole(shape[1]) * 2
    y = served(library, site, x, [], [])
    assert relative_rms(y, x.double() @ weight(*shape).double().T) < NATIVE_RELATIVE_RMS["exact"]


def test_no_rows_and_runs_without_rows_or_parts(library: Library) -> None:
    site, x = PackedSite(ROWS, COLS, weight()), activations(3, COLS)
    assert served(library, site, x[:0], [], []).shape == (0, ROWS)
    base = served(library, site, x, [], [])
    assert torch.equal(served(library, site, x, [(1, 0), (1, 2)], [deltas()[0], []]), base)
