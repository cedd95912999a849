"""auto without a budget: the smallest delta that keeps a share of the task, or stays near the fine-tune.

keep        exact match of the restored model ≥ share · exact match of the fine-tune, on the user's rows
stay near   KL(fine-tune ‖ restored) ≤ limit nats a token, on calibration texts and on general text, the worse of both
probe       nothing was asked for: about `NEAR` nats, by the same measure. The first guess is by the size of the delta
            (codecs.auto); KL is near noise²/2 and noise² ∝ 1/bits, so each candidate says how many bits the next takes
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.codecs.auto import LEAST, MOST_FILE, Auto
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.calibration import load_texts
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.deltas.compress import make_manifest
from deltaserve.deltas.prepare import Preparation, make_delta
from deltaserve.errors import CheckpointError, CodecError
from deltaserve.evaluation.divergence import Divergence
from deltaserve.evaluation.general import builtin_texts, windows
from deltaserve.evaluation.judge import Judge
from deltaserve.evaluation.search import Search, Tried

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Progress
    from deltaserve.deltas.prepare import BaseShift
    from deltaserve.evaluation.rows import Row, Scoring

CALIBRATION_TEXTS, GENERAL_TOKENS = 32, 4096
NEAR, CANDIDATES = 0.05, 3  # nats a token; deltas made at most
AIM = 0.8  # of NEAR, for the next candidate; from NEAR / 2 on a candidate is not made smaller


@dataclass(frozen=True)
class Given:
    """What a delta is made of, however large it becomes."""

    base: Checkpoint
    finetuned: Checkpoint
    options: Mapping[str, Any]  # of Auto, but for bits
    calibration: str
    base_shift: BaseShift | None
    seed: int
    progress: Progress | None

    @property
    def dtype(self) -> torch.dtype:
        """The fine-tune's."""
        return self.finetuned.entries[self.finetuned.names[0]].dtype


def keep(given: Given, share: float, rows: Sequence[Row], scoring: Scoring, out: Path) -> tuple[Artifact, list[Tried]]:
    """Raises CheckpointError where the fine-tune answers no row, CodecError where nothing keeps so much."""
    manifest = make_manifest(given.base, given.finetuned, "auto", {})
    judge = Judge(given.base, manifest, rows, dtype=given.dtype, scoring=scoring)
    whole = judge.prepare(given.finetuned).exact_match
    if not whole:
        raise CheckpointError(f"{given.finetuned.name} answers none of the {len(rows)} rows: there is nothing to keep")
    return _smallest(given, lambda made: judge.judge(made).exact_match / whole, lambda kept: kept >= share, out)


def stay_near(given: Given, limit: float, out: Path) -> tuple[Artifact, list[Tried]]:
    """Raises CodecError where nothing is that near."""
    divergence = _divergence(given)
    return _smallest(given, lambda made: max(divergence.measure(made).values()), lambda kl: kl <= limit, out)


def probe(given: Given, out: Path) -> tuple[Artifact, list[Tried]]:
    """The last of what was tried is the file. It is nearer than `NEAR` but where `CANDIDATES` did not reach that."""
    make, bits = _maker(given)
    divergence, tried = _divergence(given), list[Tried]()
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=out.parent) as work:
        made: list[Path] = []
        for number in range(CANDIDATES):
            file = Path(work) / str(number)
            try:
                artifact = make(bits if number else None, file)
            except CodecError:  # too small a file for what every file holds: the one before is kept
                break
            made.append(file)
            kl = max(divergence.measure(artifact).values())
            tried.append(Tried(artifact.bits_per_parameter, kl, kl <= NEAR))
            wanted = min(max(bits * kl / (AIM * NEAR), LEAST), MOST_FILE)
            if NEAR / 2 <= kl <= NEAR or wanted == bits:
                break
            bits = wanted
        made[-1].replace(out)
    return Artifact.open(out), tried


def _divergence(given: Given) -> Divergence:
    tokenizer = load_tokenizer(given.base.directory, make_manifest(given.base, given.finetuned, "auto", {}))
    texts = {
        "calibration": [text.tokens for text in load_texts(given.calibration, tokenizer, limit=CALIBRATION_TEXTS)],
        "general": windows(tokenizer, builtin_texts(), GENERAL_TOKENS),
    }
    return Divergence(given.base, given.finetuned, texts, given.dtype)


def _maker(given: Given) -> tuple[Callable[[float | None, Path], Artifact], float]:
    """What makes a file of so many bits per parameter, None: as many as the first guess; and that."""
    guess = Auto(**given.options)
    ready = Preparation(given.base, given.finetuned, guess, given.calibration)

    def make(bits: float | None, file: Path) -> Artifact:
        return make_delta(
            given.base,
            given.finetuned,
            Auto(**{**given.options, "bits": bits}),
            file,
            seed=given.seed,
            calibration=given.calibration,
            base_shift=given.base_shift,
            ready=ready,
            progress=given.progress,
        )

    return make, guess.budget(ready.layers)


def _smallest(
    given: Given, measure: Callable[[Artifact], float], passes: Callable[[float], bool], out: Path
) -> tuple[Artifact, list[Tried]]:
    make, guess = _maker(given)
    tried: list[Tried] = []
    return Search(make, measure, passes, tried.append).run(guess, out), tried
