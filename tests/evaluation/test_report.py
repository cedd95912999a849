"""The table and the picture of a comparison: every cell is told, and the same comparison gives the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.evaluation.picture import draw
from deltaserve.evaluation.results import Missing, Reference, Result, Results, Setup
from deltaserve.evaluation.summary import markdown, summaries

if TYPE_CHECKING:
    from pathlib import Path

HITS = [True] * 8 + [False] * 2


def measured(hits: list[bool], kl: float | None) -> dict[str, Any]:
    agreement = None if kl is None else 0.9
    return {
        "hits": hits,
        "exact_match": sum(hits) / len(hits),
        "nats_per_token": 0.1,
        "kl": kl,
        "top1_agreement": agreement,
        "general_kl": kl,
    }


@pytest.fixture
def results(tmp_path: Path) -> Results:
    setup = Setup(
        version="1",
        base="smol",
        base_fingerprint="b",
        finetuned="numwords",
        finetuned_fingerprint="f",
        finetuned_bytes=2_000_000,
        rows=10,
        rows_digest="r",
        scoring="exact",
        dtype="bfloat16",
        general_tokens=100,
        general_digest="g",
        calibration_digest=None,
    )
    results = Results.open(tmp_path / "comparison.jsonl", setup)
    results.add(Reference(kind="finetuned", **measured(HITS, None)))
    results.add(Reference(kind="base", **measured([False] * 10, 2.5)))
    return results


def add(
    results: Results, codec: str, budget: float | None, bits: float, seed: int = 0, lost: int = 0, kl: float = 0.1
) -> None:
    hits = [False] * lost + HITS[lost:]
    whole = results.references["finetuned"].exact_match
    results.add(
        Result(
            codec=codec,
            budget=budget,
            seed=seed,
            asked_bits=budget,
            config={},
            bits_per_parameter=bits,
            file_bytes=int(bits * 100_000),
            resident_bytes=1,
            compress_s=3,
            compress_peak_bytes=700_000_000,
            judge_s=4,
            retained=sum(hits) / 10 / whole if whole else None,
            **measured(hits, kl),
        )
    )


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {f"{cells[1]} {cells[2]}".strip(): cells for cells in lines[2:]}


def test_the_table_tells_every_cell_and_what_bounds_it(results: Results) -> None:
    add(results, "dare", 0.5, 0.504)
    add(results, "bitdelta", None, 1.02, lost=4)
    add(results, "dare", 0.01, 0.05, lost=8, kl=1)
    results.add(Missing(kind="unreachable", codec="vq", budget=2, seed=0, message="vq: 2 bits\nare too many"))
    text = markdown(results)
    rows = rows_of(text)
    assert list(rows) == ["the fine-tune itself", "`bitdelta`", "`dare` 0.5", "`dare` 0.01 †", "the base alone"]
    assert rows["`bitdelta`"][0:7] == ["1.02", "`bitdelta`", "", "0.102 MB", "1/20", "40.0%", "50.0%"]
    assert rows["`bitdelta`"][7].startswith("-40.0 (-70.0 … -10.0)")
    assert rows["`dare` 0.5"][7] == "+0.0 (+0.0 … +0.0)"
    assert rows["the fine-tune itself"][5] == "80.0%"
    assert rows["the base alone"][8] == "2.5"
    assert "† over its budget" in text
    assert "- vq at 2 bits: unreachable: vq: 2 bits are too many" in text


def test_seeds_are_one_row_with_their_range(results: Results) -> None:
    add(results, "dare", 0.5, 0.5, seed=0, lost=0)
    add(results, "dare", 0.5, 0.5, seed=1, lost=2)
    rows = rows_of(markdown(results))
    assert rows["`dare` 0.5"][5:7] == ["70.0 ± 10.0%", "87.5 ± 12.5%"]
    assert [len(row.results) for row in summaries(results)] == [2]


def test_nothing_is_retained_of_a_fine_tune_that_scores_nothing(results: Results, tmp_path: Path) -> None:
    results.add(Reference(kind="finetuned", **measured([False] * 10, None)))
    add(results, "dare", 0.5, 0.5, lost=10)
    assert rows_of(markdown(results))["`dare` 0.5"][6] == "n/a"
    assert all(path.stat().st_size > 10_000 for path in draw(results, tmp_path))


def test_the_picture_is_the_same_every_time_and_draws_a_delta_that_loses_nothing(
    results: Results, tmp_path: Path
) -> None:
    add(results, "bitdelta", None, 1.02, lost=2)
    for budget in (1, 0.5, 0.25):
        add(results, "dare", budget, budget, lost=int(1 / budget) - 1, kl=0.01 / budget)
        add(results, "exact", budget, budget, kl=0)
    first = {path.name: path.read_bytes() for path in draw(results, tmp_path)}
    assert set(first) == {"comparison.png", "comparison.svg"}
    assert first["comparison.png"].startswith(b"\x89PNG")
    assert {path.name: path.read_bytes() for path in draw(results, tmp_path)} == first
