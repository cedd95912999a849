"""`deltaserve compare`, and what `evaluate` shares with it: the files it leaves, what it refuses before the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.compress import compress
from deltaserve.evaluation.making import Cost

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

CODECS = ["--codecs", "bitdelta,delta-svd", "--budgets", "16"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "base", "answer": "delta"}, {"prompt": "1 + 2", "answer": "3"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def words(tiny_base: Path, tiny_finetune: Path, rows: Path, tmp_path: Path) -> list[str]:
    """A comparison in tmp_path/"out", of few tokens."""
    words = ["compare", tiny_base, tiny_finetune, "--data", rows, "-o", tmp_path / "out", "--general-tokens", 64]
    return [str(word) for word in words]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Codecs of everything compressed, which happens in this process."""
    seen = []

    def here(base: Any, finetuned: Any, codec: Any, out: Path, seed: int, _calibration: str) -> Cost:
        seen.append(codec.name)
        compress(base, finetuned, codec, out, seed=seed)
        return Cost(0.5, 10**8)

    monkeypatch.setattr("deltaserve.evaluation.compare.compress_apart", here)
    return seen


def test_a_comparison_leaves_lines_a_table_and_a_picture(
    shell: Any, words: list[str], made: list[str], tmp_path: Path
) -> None:
    assert shell(*words, *CODECS) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {f"comparison.{kind}" for kind in ("jsonl", "md", "png", "svg")}
    assert f"written: {out}/comparison.jsonl, {out}/comparison.md, {out}/comparison.png" in shell.out
    lines = [json.loads(line) for line in (out / "comparison.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["setup", "finetuned", "result", "result"]  # tokens added: no base
    assert {line["codec"] for line in lines[2:]} == {"bitdelta", "delta-svd"} == set(made)
    assert all(line["general_kl"] > 0 and len(line["hits"]) == 2 and line["retained"] is None for line in lines[2:])
    heading = shell.out.splitlines()[0].split("  ")
    assert [name.strip() for name in heading if name] == [
        "codec",
        "bits/parameter",
        "exact match",
        "retained",
        "KL, task",
        "KL, general",
    ]
    assert shell.out.count("n/a") == 2  # the fine-tune of a random model answers nothing rightly


def test_what_is_there_is_not_measured_again_unless_forced(shell: Any, words: list[str], made: list[str]) -> None:
    words += ["--codecs", "bitdelta", "--no-plot", "--general", "none"]
    assert shell(*words) == 0
    first = shell.out
    assert shell(*words) == 0
    assert (shell.out, made) == (first, ["bitdelta"])
    assert shell(*words, "--force") == 0
    assert made == ["bitdelta"] * 2


def _interruptible() -> None:
    """A shell's background jobs, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interruption_leaves_what_is_done_and_the_next_run_goes_on(
    shell: Any, words: list[str], made: list[str], process: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words += ["--codecs", "bitdelta,delta-svd", "--budgets", "16,8,4", "--no-plot"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deltaserve", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, **pipes, env=environment, start_new_session=True, preexec_fn=_interruptible)
    try:
        lines = out / "comparison.jsonl"
        process.wait_until(lambda: lines.exists() and '"result"' in lines.read_text(), "a cell is done", 120)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: the process that compresses gets it too
        _, printed = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, printed) == (130, b"")
    assert {path.name for path in out.iterdir()} == {"comparison.jsonl", "comparison.md"}
    assert "`bitdelta`" in (out / "comparison.md").read_text()
    assert shell(*words) == 0
    assert set(made) == {"delta-svd"}
    assert [json.loads(line)["kind"] for line in lines.read_text().splitlines()].count("result") == 4


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--codecs", "nonsense"], 2, "codec 'nonsense' does not exist; there are "),
        (["--budgets", "1,0"], 2, "argument --budgets: 0 is no number of bits per parameter"),
        (["--budgets", "1,nan"], 2, "argument --budgets: nan is no number of bits per parameter"),
        (["--budgets", "one"], 2, "argument --budgets: invalid"),
        (["--seeds", "0"], 2, "argument --seeds: 0 is not in 1"),
        (["--general", "nowhere"], 1, "nowhere: No such file or directory"),
        (["--calibration", "nowhere"], 1, "nowhere: No such file or directory"),
        (["--data", os.devnull], 1, "holds no rows"),
    ],
)
def test_wrong_input_is_told_before_the_work(
    shell: Any, words: list[str], made: list[str], tmp_path: Path, flags: list[str], status: int, message: str
) -> None:
    assert shell(*words, "--no-plot", *flags) == status
    assert message in shell.err
    assert (shell.out, made) == ("", [])
    assert not (tmp_path / "out" / "comparison.jsonl").exists()


def test_a_directory_that_cannot_be_used_is_left_alone(shell: Any, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert shell(*words) == 2
    assert f"{out}: not a directory" in shell.err
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / "comparison.jsonl").write_text("mine\n")
    assert shell(*words, "--force") == 2
    assert "not a comparison" in shell.err
    assert [path.read_text() for path in out.iterdir()] == ["mine\n"]


def test_another_comparison_is_not_mixed_in(shell: Any, words: list[str], made: list[str]) -> None:
    words += ["--codecs", "bitdelta", "--no-plot", "--general", "none"]
    assert shell(*words) == 0
    assert shell(*words, "--limit", "1") == 2
    assert "holds another comparison (rows 2, " in shell.err
    assert len(made) == 1


def test_without_matplotlib_the_picture_is_refused_before_the_work(
    shell: Any, words: list[str], made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert shell(*words) == 2
    assert "the picture needs matplotlib: pip install 'deltaserve[plot]', or --no-plot" in shell.err
    assert not (tmp_path / "out").exists()
    assert made == []


def test_an_adapter_is_no_full_fine_tune(shell: Any, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    words[2] = str(tmp_path / "adapter")
    assert shell(*words) == 1
    assert "is a LoRA adapter; a full checkpoint is needed" in shell.err


def test_evaluate_measures_off_the_task_when_asked(
    shell: Any, artifact: Path, rows: Path, tiny_base: Path, tiny_finetune: Path
) -> None:
    words = ["evaluate", tiny_base, artifact, "--data", rows, "--general", "builtin", "--general-tokens", "64"]
    assert shell(*words) == 2
    assert "it needs --finetuned" in shell.err
    assert shell(*words, "--finetuned", tiny_finetune, "--json") == 0
    fields = json.loads(shell.out)
    assert fields["general_kl"] > 0
    assert shell(*words, "--finetuned", tiny_finetune) == 0
    assert f"the same KL on general text {fields['general_kl']:.4f} nats per token" in shell.out
