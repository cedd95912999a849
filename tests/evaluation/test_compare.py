"""Comparing: which cells there are, what each is asked for, and what happens to those that cannot be measured."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import torch

from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import CODECS, make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress as compress_here
from deltaserve.errors import BadRequest, CheckpointError
from deltaserve.evaluation.compare import Task, compare, plan, setup_of
from deltaserve.evaluation.making import Cost, compress_apart
from deltaserve.evaluation.results import Cell, Results

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltaserve.codecs.base import Codec
    from deltaserve.evaluation.rows import Row

Making = list[tuple[str, int]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Making:
    """(codec, seed) of everything compressed, in this process."""
    seen: Making = []

    def compress(base: Checkpoint, finetuned: Checkpoint, codec: Codec, out: Path, seed: int, calibration: str) -> Cost:
        assert calibration == "builtin"
        seen.append((codec.name, seed))
        compress_here(base, finetuned, codec, out, seed=seed)
        return Cost(0.5, 10**8)

    monkeypatch.setattr("deltaserve.evaluation.compare.compress_apart", compress)
    return seen


@pytest.fixture
def run(tiny_base: Path, tuned: Path, rows: list[Row], tmp_path: Path) -> Callable[..., Results]:
    """run(cells): the comparison of `tuned`, in tmp_path, opened again each time."""
    base, finetuned = Checkpoint.open(tiny_base), Checkpoint.open(tuned)
    task = Task(rows, ["A delta is small."], 64, "exact", torch.float32, 16)

    def compare_cells(cells: list[Cell], stop_at: Cell | None = None, give_up_below: float = 0.0) -> Results:
        def step(name: str, _what: str, _done: int, _total: int) -> None:
            if name and name == str(stop_at):
                raise KeyboardInterrupt

        results = Results.open(tmp_path / "comparison.jsonl", setup_of(base, finetuned, task))
        compare(base, finetuned, task, cells, results, give_up_below=give_up_below, step=step)
        return results

    return compare_cells


def test_the_plan_is_every_codec_at_every_budget_and_a_fixed_rate_once() -> None:
    assert plan(["bitdelta", "delta-svd"], [1, 0.5], 2) == [
        Cell("bitdelta", None, 0),
        Cell("delta-svd", 1, 0),
        Cell("delta-svd", 0.5, 0),
        Cell("bitdelta", None, 1),
        Cell("delta-svd", 1, 1),
        Cell("delta-svd", 0.5, 1),
    ]
    assert {cell.codec for cell in plan(sorted(CODECS), [1], 1)} == set(CODECS)
    with pytest.raises(BadRequest, match="codec 'nonsense' does not exist; there are auto, bitdelta, "):
        plan(["nonsense"], [1], 1)


@pytest.mark.usefixtures("by_prefix")
def test_figures_are_those_of_the_file(run: Callable[..., Results], made: Making, tmp_path: Path) -> None:
    results = run([Cell("delta-svd", 16, 0), Cell("bitdelta", None, 0)])
    assert set(made) == {("delta-svd", 0), ("bitdelta", 0)}
    svd, signs = results.measured
    parameters = svd.file_bytes * 8 / svd.bits_per_parameter
    assert signs.file_bytes * 8 / signs.bits_per_parameter == pytest.approx(parameters)
    assert results.references["finetuned"].exact_match == pytest.approx(2 / 3)
    assert svd.retained == pytest.approx(svd.exact_match / (2 / 3))
    assert svd.kl is not None and svd.general_kl is not None and svd.general_kl > 0 and svd.kl > 0
    assert (svd.compress_s, svd.compress_peak_bytes, signs.config) == (
        0.5,
        10**8,
        make_codec("bitdelta").config(),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.jsonl"]


def test_a_file_over_its_budget_is_made_once_more_with_less(run: Callable[..., Results], made: Making) -> None:
    generous, tight = run([Cell("delta-svd", 16, 0), Cell("delta-svd", 0.01, 0)]).measured
    assert generous.asked_bits is not None and generous.asked_bits <= 16  # norms and names take their part
    assert not generous.is_over
    assert tight.asked_bits == 0.01  # less than nothing cannot be asked for
    assert tight.is_over
    assert len(made) >= 2


def test_a_budget_that_the_codec_refuses_is_told_and_not_asked_again(run: Callable[..., Results], made: Making) -> None:
    cell = Cell("dare", 1000, 0)
    results = run([cell])
    (line,) = results.missing
    assert (line.kind, line.cell) == ("unreachable", cell)
    assert "1000" in line.message
    assert run([cell]).has(cell)
    assert made == []


def test_a_process_that_dies_fails_its_cell_alone_and_is_tried_again(
    run: Callable[..., Results], made: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> Cost:
        raise ChildProcessError("exit status -9")

    cells = [Cell("bitdelta", None, 0), Cell("dare", 1, 0)]
    with monkeypatch.context() as patch:
        patch.setattr("deltaserve.evaluation.compare.compress_apart", die)
        results = run(cells)
    assert [(line.kind, line.message) for line in results.missing] == [("failed", "exit status -9")] * 2
    assert len(run(cells).measured) == 2
    assert len(made) >= 2


def test_an_interrupted_comparison_goes_on(run: Callable[..., Results], made: Making, tmp_path: Path) -> None:
    cells = [Cell("bitdelta", None, 0), Cell("delta-svd", 16, 0), Cell("dare", 4, 0)]
    with pytest.raises(KeyboardInterrupt):
        run(cells, stop_at=cells[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.jsonl"]
    assert made == [("bitdelta", 0)]
    results = run(cells)
    assert [line.cell for line in results.measured] == cells
    assert made.count(("bitdelta", 0)) == 1
    before = len(made)
    assert run(cells).cells == results.cells
    assert len(made) == before


@pytest.mark.usefixtures("made")
def test_seeds_are_measured_where_they_matter(run: Callable[..., Results]) -> None:
    results = run(plan(["dare", "delta-svd"], [4, 2], 3))
    seeds: dict[str, list[int]] = {}
    for line in results.measured:
        seeds.setdefault(line.codec, []).append(line.seed)
    assert {codec: len(found) for codec, found in seeds.items()} == {"dare": 6, "delta-svd": 4}
    assert len({line.nats_per_token for line in results.measured if line.codec == "dare"}) == 6


@pytest.mark.usefixtures("by_prefix")
def test_a_codec_that_retains_too_little_is_not_measured_at_smaller_budgets(
    run: Callable[..., Results], made: Making, tmp_path: Path
) -> None:
    cells = [Cell("delta-svd", 16, 0), Cell("delta-svd", 8, 0), Cell("delta-svd", 4, 0), Cell("delta-svd", 8, 1)]
    run(cells[:1])
    file = tmp_path / "comparison.jsonl"
    lines = file.read_text().splitlines()
    (last,) = (json.loads(line) for line in lines if '"result"' in line)
    file.write_text("\n".join([*lines, json.dumps({**last, "budget": 8, "retained": 0.09})]) + "\n")
    results = run(cells, give_up_below=0.1)
    assert made == [("delta-svd", 0), ("delta-svd", 1)], "budget 4 is not tried, another seed is"
    assert set(results.cells) == {cells[0], cells[1], cells[3]}
    assert cells[2] in run(cells).cells, "without the option everything is measured"


def test_a_fine_tune_that_changes_no_matrix_is_no_comparison(
    made: Making, make_finetune: Callable[..., Path], tiny_base: Path, rows: list[Row], tmp_path: Path
) -> None:
    same = Checkpoint.open(make_finetune(tiny_base, tmp_path / "same", scale=0, seed=1))
    base, task = Checkpoint.open(tiny_base), Task(rows, [], 1, "exact", torch.float32, 16)
    results = Results.open(tmp_path / "comparison.jsonl", setup_of(base, same, task))
    with pytest.raises(CheckpointError, match="same has the same matrices as base: nothing to compare"):
        compare(base, same, task, [Cell("bitdelta", None, 0)], results)
    assert made == [("bitdelta", 0)]


def test_compressing_apart_is_compressing(tiny_base: Path, tuned: Path, tmp_path: Path) -> None:
    base, finetuned, codec = Checkpoint.open(tiny_base), Checkpoint.open(tuned), make_codec("dare", Budget(bits=1))
    cost = compress_apart(base, finetuned, codec, tmp_path / "apart", 7)
    compress_here(base, finetuned, codec, tmp_path / "here", seed=7)
    assert (tmp_path / "apart").read_bytes() == (tmp_path / "here").read_bytes()
    assert cost.seconds > 0
    assert 50e6 < cost.peak_bytes < 3e9


class Fatal:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (3,)


def test_what_goes_wrong_apart_is_raised_here(tiny_base: Path, untied_base: Path, tuned: Path, tmp_path: Path) -> None:
    base, finetuned, codec = Checkpoint.open(tiny_base), Checkpoint.open(tuned), make_codec("bitdelta")
    with pytest.raises(CheckpointError, match="is no fine-tune of base"):
        compress_apart(base, Checkpoint.open(untied_base), codec, tmp_path / "out", 0)
    with pytest.raises(ChildProcessError, match="exit status 3"):
        compress_apart(base, finetuned, Fatal(), tmp_path / "out", 0)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
