"""`compress --keep`, `--max-kl` or no budget: the file that is written passes; what cannot be is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve import cli
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.evaluation import enough
from deltaserve.evaluation.evaluate import evaluate

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.evaluation.rows import Row


@pytest.fixture
def rows(rows: list[Row]) -> list[Row]:
    """The first signs of the answers: more of what a model of random weights says does not survive four bits."""
    return [row._replace(answer=row.answer[:1]) for row in rows]


@pytest.fixture
def data(rows: list[Row], tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: two models of random weights round to different answers in bfloat16."""
    monkeypatch.setattr(enough.Given, "dtype", torch.float32)


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


@pytest.mark.usefixtures("by_prefix")
def test_keep_ends_at_a_file_that_keeps_as_much(
    tiny_base: Path, tuned: Path, data: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "delta.safetensors"
    assert run("compress", tiny_base, tuned, "-o", out, "--keep", "0.25", "--data", data) == 0
    artifact = Artifact.open(out)
    result = evaluate(Checkpoint.open(tiny_base), artifact, rows, finetuned=Checkpoint.open(tuned), dtype=torch.float32)
    assert result.finetuned_exact_match
    assert result.exact_match >= 0.25 * result.finetuned_exact_match
    printed = capsys.readouterr().out
    assert "enough" in printed
    assert f"{artifact.bits_per_parameter:.4f}" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta.safetensors", "rows.jsonl"]


def test_max_kl_takes_more_bits_the_nearer_it_shall_stay(tiny_base: Path, tuned: Path, tmp_path: Path) -> None:
    sizes = []
    for limit in ("1.0", "0.1"):
        assert run("compress", tiny_base, tuned, "-o", tmp_path / limit, "--max-kl", limit, "--quiet") == 0
        sizes.append(Artifact.open(tmp_path / limit).bits_per_parameter)
    assert sizes[0] < sizes[1]


def test_without_a_budget_a_few_candidates_end_where_the_delta_is_near(
    tiny_base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = []
    for near in (0.05, 0.3):
        monkeypatch.setattr(enough, "NEAR", near)
        out = tmp_path / str(near)
        assert run("compress", tiny_base, tuned, "-o", out, "--quiet") == 0
        *before, last = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("enough")]
        assert 0 < len(before) < enough.CANDIDATES
        assert float(last[0]) == pytest.approx(Artifact.open(out).bits_per_parameter, abs=1e-4)
        assert float(last[1]) < near
        bits.append(float(last[0]))
    assert bits[0] > bits[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.05", "0.3"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--keep", "0.9"], "--keep and --data need each other"),
        (["--max-kl", "0.1", "--data", "rows.jsonl"], "--keep and --data need each other"),
        (["--scoring", "exact"], "it needs --keep"),
        (["--codec", "dare", "--max-kl", "0.1"], "choose the bits of auto, not of dare"),
        (["--keep", "1.5", "--data", "rows.jsonl"], "1.5 is not over 0 and up to 1"),
        (["--max-kl", "nan"], "nan is not"),
        (["--max-kl", "0.1", "--bits", "1"], "not allowed with"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    words: list[str], says: str, tiny_base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compress", tiny_base, tuned, "-o", tmp_path / "delta", *words) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_the_fine_tune_cannot_do_is_refused(
    tiny_base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "base", "answer": "never said"}\n')
    words = ["-o", tmp_path / "delta", "--keep", "0.9", "--data", tmp_path / "rows.jsonl"]
    assert run("compress", tiny_base, tuned, *words) == 1
    assert "there is nothing to keep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
