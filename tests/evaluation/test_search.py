"""The smallest delta that is good enough: the ladder, its ends, and the real measures on a tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.codecs.auto import Auto
from deltaserve.codecs.lossless import Lossless
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.prepare import make_delta
from deltaserve.errors import CodecError
from deltaserve.evaluation import search
from deltaserve.evaluation.divergence import Divergence
from deltaserve.evaluation.search import Search

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.evaluation.search import Tried


class Ladder:
    """Candidates that are as good as they are large, without any model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, good_from: float, possible_from: float = 0.0) -> None:
        self.good_from, self.possible_from, self.tried = good_from, possible_from, list[float]()
        monkeypatch.setattr(search.Artifact, "open", lambda path: path.read_text())

    def run(self, start: float, out: Path) -> Any:
        return Search(self.make, lambda made: made.bits_per_parameter, lambda bits: bits >= self.good_from).run(
            start, out
        )

    def make(self, bits: float, file: Path) -> Any:
        if bits < self.possible_from:
            raise CodecError("too small")
        file.write_text(f"{bits:.4g}")
        self.tried.append(bits)
        return type("Made", (), {"bits_per_parameter": bits})()


@pytest.mark.parametrize("start", [0.003, 0.02, 0.125, 1.0, 4.0])
@pytest.mark.parametrize("good_from", [0.004, 0.03, 0.0625, 0.9, 3.9])
def test_the_smallest_rung_that_passes_is_found(
    start: float, good_from: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = Ladder(monkeypatch, good_from)
    found = float(ladder.run(start, tmp_path / "out"))
    assert good_from <= found < good_from * 2**0.5 * 1.001
    assert len(ladder.tried) == len(set(ladder.tried)) <= 13
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_no_file_can_reach_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CodecError, match="no file of up to 4 bits passes: 4 at 4 bits"):
        Ladder(monkeypatch, good_from=5).run(0.1, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_can_be_too_small_for_what_all_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = Ladder(monkeypatch, good_from=0.0, possible_from=0.007)
    assert float(ladder.run(0.03, tmp_path / "out")) == pytest.approx(2 ** (-14 / 2), rel=1e-3)


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tiny_finetune: Path) -> tuple[Checkpoint, Checkpoint]:
    return Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)


TEXTS = {"short": [[5, 9, 200, 31], [7, 7]], "long": [list(range(4, 60))]}


def test_divergence_is_what_its_formula_says(pair: Any, tmp_path: Path) -> None:
    from deltaserve.codecs.bitdelta import BitDelta
    from deltaserve.deltas.reference_model import load_reference

    artifact = compress(*pair, BitDelta(), tmp_path / "delta")
    found = Divergence(*pair, TEXTS, torch.float32).measure(artifact)
    models = (
        load_reference(pair[0], None, pair[1], torch.float32),
        load_reference(pair[0], artifact, None, torch.float32),
    )
    for kind, texts in TEXTS.items():
        total = 0.0
        for text in texts:
            with torch.no_grad():
                log_p, log_q = (model(torch.tensor([text])).logits[0].log_softmax(-1) for model in models)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        assert found[kind] == pytest.approx(total / sum(map(len, texts)), rel=1e-3)
    assert all(value > 1e-4 for value in found.values())


def test_nothing_diverges_from_what_is_kept_exactly(pair: Any, tmp_path: Path) -> None:
    artifact = compress(*pair, Lossless(), tmp_path / "delta")
    assert Divergence(*pair, TEXTS, torch.bfloat16).measure(artifact) == {"short": 0.0, "long": 0.0}


def test_a_real_search_ends_at_a_file_that_passes(pair: Any, tmp_path: Path) -> None:
    divergence, told = Divergence(*pair, TEXTS, torch.float32), list[Any]()
    artifact = Search(
        make=lambda bits, file: make_delta(*pair, Auto(bits=bits), file),
        measure=lambda made: max(divergence.measure(made).values()),
        passes=lambda kl: kl <= 0.01,
        tell=told.append,
    ).run(3.0, tmp_path / "out.safetensors")
    best: Tried = min((tried for tried in told if tried.passed), key=lambda tried: tried.bits)
    assert best.bits == artifact.bits_per_parameter
    assert max(divergence.measure(Artifact.open(tmp_path / "out.safetensors")).values()) <= 0.01
