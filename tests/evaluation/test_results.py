"""Results on disk: they go on after an interruption, refuse another comparison, forget what is measured again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.errors import BadRequest
from deltaserve.evaluation.results import Cell, Missing, Reference, Result, Results, Setup

if TYPE_CHECKING:
    from pathlib import Path

MEASURED: dict[str, Any] = {
    "hits": [True, False],
    "exact_match": 0.5,
    "nats_per_token": 0.1,
    "kl": 0.01,
    "top1_agreement": 0.9,
    "general_kl": 0.02,
}


def setup(**changes: Any) -> Setup:
    fields: dict[str, Any] = {
        "version": "1",
        "base": "base",
        "base_fingerprint": "b",
        "finetuned": "tuned",
        "finetuned_fingerprint": "f",
        "finetuned_bytes": 1000,
        "rows": 2,
        "rows_digest": "r",
        "scoring": "exact",
        "dtype": "bfloat16",
        "general_tokens": 8192,
        "general_digest": "g",
        "calibration_digest": None,
    }
    return Setup(**{**fields, **changes})


def result(codec: str, budget: float | None, seed: int = 0, **changes: Any) -> Result:
    fields = {
        "asked_bits": budget,
        "config": {"group": 8},
        "bits_per_parameter": budget or 1,
        "file_bytes": 100,
        "resident_bytes": 120,
        "compress_s": 1.5,
        "compress_peak_bytes": 10**9,
        "judge_s": 2.5,
        "retained": 0.9,
    }
    return Result(codec=codec, budget=budget, seed=seed, **{**MEASURED, **fields, **changes})


def test_everything_that_was_added_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "comparison.jsonl"
    first = Results.open(path, setup())
    first.add(Reference(kind="finetuned", **MEASURED))
    first.add(result("dare", 0.5))
    first.add(result("bitdelta", None))
    first.add(Missing(kind="unreachable", codec="dare", budget=0.001, seed=0, message="too small"))
    first.add(Missing(kind="failed", codec="dare", budget=0.25, seed=1, message="killed"))
    again = Results.open(path, setup())
    assert (again.cells, again.references) == (first.cells, first.references)
    assert [again.has(cell) for cell in again.cells] == [True, True, True, False]  # what failed is tried again
    assert not again.has(Cell("dare", 0.5, 1))
    assert {json.loads(line)["kind"] for line in path.read_text().splitlines()} == {
        "setup",
        "finetuned",
        "result",
        "unreachable",
        "failed",
    }


def test_a_line_that_was_cut_off_is_as_if_never_written(tmp_path: Path) -> None:
    path = tmp_path / "comparison.jsonl"
    Results.open(path, setup()).add(result("dare", 0.5))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:100])
    again = Results.open(path, setup())
    again.add(result("dare", 0.25))
    assert list(Results.open(path, setup()).cells) == [Cell("dare", 0.5, 0), Cell("dare", 0.25, 0)]


def test_another_comparison_is_refused_by_what_differs_and_replaced_when_forced(tmp_path: Path) -> None:
    path = tmp_path / "comparison.jsonl"
    Results.open(path, setup()).add(result("dare", 0.5))
    with pytest.raises(BadRequest, match=r"holds another comparison \(rows 2, scoring exact\); .*--force"):
        Results.open(path, setup(rows=3, scoring="last-number"))
    forced = Results.open(path, setup(rows=3), again=[Cell("dare", 1, 0)])
    assert forced.cells == {}
    assert Results.open(path, setup(rows=3)).cells == {}


def test_cells_to_be_measured_again_are_forgotten_and_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "comparison.jsonl"
    first = Results.open(path, setup())
    first.add(Reference(kind="base", **MEASURED))
    first.add(result("dare", 0.5))
    first.add(result("dare", 0.25))
    Results.open(path, setup(), again=[Cell("dare", 0.5, 0)])
    left = Results.open(path, setup())
    assert list(left.cells) == [Cell("dare", 0.25, 0)]
    assert list(left.references) == ["base"]


@pytest.mark.parametrize("content", ["no json\n", '{"kind": "else"}\n', '{"prompt": "x", "answer": "y"}\n'])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "comparison.jsonl"
    path.write_text(content)
    with pytest.raises(BadRequest, match=r"comparison\.jsonl: not a comparison"):
        Results.open(path, setup(), again=[Cell("dare", 1, 0)])
    assert path.read_text() == content


def test_a_comparison_without_its_setup_is_none(tmp_path: Path) -> None:
    path = tmp_path / "comparison.jsonl"
    path.write_text(result("dare", 0.5).model_dump_json() + "\n")
    with pytest.raises(BadRequest, match="its first line is no setup"):
        Results.open(path, setup())
