"""One artifact on a task, beside its fine-tune where that is given. What is measured: `judge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaserve.deltas.tensorfile import DTYPES
from deltaserve.evaluation.general import GENERAL_TOKENS
from deltaserve.evaluation.judge import BATCH, Judge, counter

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Progress
    from deltaserve.evaluation.rows import Row, Scoring


@dataclass(frozen=True)
class Evaluation:
    """None: needs the fine-tune, which was not given, or general text."""

    rows: int
    exact_match: float
    nats_per_token: float
    finetuned_exact_match: float | None = None
    finetuned_nats_per_token: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    general_kl: float | None = None


def evaluate(
    base: Checkpoint,
    artifact: Artifact,
    rows: Sequence[Row],
    *,
    finetuned: Checkpoint | None = None,
    general: Sequence[str] = (),
    general_tokens: int = GENERAL_TOKENS,
    batch: int = BATCH,
    dtype: torch.dtype | None = None,
    scoring: Scoring = "exact",
    progress: Progress | None = None,
) -> Evaluation:
    """Both models on `rows`; `dtype` None = the fine-tune's. Raises ArtifactError, CheckpointError, TemplateError."""
    texts = general if finetuned else ()
    judge = Judge(
        base,
        artifact.manifest,
        rows,
        dtype=dtype or _finetuned_dtype(base, artifact),
        general=texts,
        general_tokens=general_tokens,
        batch=batch,
        scoring=scoring,
    )
    advance = counter(progress, judge.num_steps * (2 if finetuned else 1))
    reference = judge.prepare(finetuned, advance) if finetuned else None
    measured = judge.judge(artifact, advance)
    advance("")
    return Evaluation(
        rows=len(rows),
        exact_match=measured.exact_match,
        nats_per_token=measured.nats_per_token,
        finetuned_exact_match=reference.exact_match if reference else None,
        finetuned_nats_per_token=reference.nats_per_token if reference else None,
        kl=measured.kl,
        top1_agreement=measured.top1_agreement,
        general_kl=measured.general_kl,
    )


def _finetuned_dtype(base: Checkpoint, artifact: Artifact) -> torch.dtype:
    named = next(iter(artifact.manifest.layers.values()), None)
    return DTYPES[named.dtype] if named else base.entries[base.names[0]].dtype
