"""The judge: one fine-tune, many deltas, and every figure the one of models run alone, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.head import Head
from deltaserve.deltas.reference_model import load_reference
from deltaserve.deltas.restore import restore
from deltaserve.errors import CheckpointError
from deltaserve.evaluation.judge import Judge
from deltaserve.evaluation.predictions import (
    BATCH_TOKENS,
    Predictions,
    batches,
    predictions_in_chunks,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.evaluation.rows import Row

GENERAL = ["A delta is small, and so it is compressed.", "def serve(request): return base(request.tokens)" * 8]


def log_p(directory: Path, text: str) -> torch.Tensor:
    """Of the token after each: float64 [T, V]."""
    ids = AutoTokenizer.from_pretrained(directory)(text).input_ids[:256]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return F.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


@pytest.mark.parametrize("batch", [1, 64])
def test_general_kl_is_that_of_texts_read_one_by_one(
    make_artifact: Callable[..., Artifact], tiny_base: Path, tuned: Path, rows: list[Row], tmp_path: Path, batch: int
) -> None:
    base, artifact = Checkpoint.open(tiny_base), make_artifact(rank=4)
    restore(base, artifact, tmp_path / "restored", dtype=torch.float32)
    kl = []
    for text in GENERAL:
        p, q = log_p(tuned, text), log_p(tmp_path / "restored", text)
        kl.append((p.exp() * (p - q)).sum(-1))
    judge = Judge(base, artifact.manifest, rows, dtype=torch.float32, general=GENERAL, batch=batch)
    judge.prepare(Checkpoint.open(tuned))
    assert judge.judge(artifact).general_kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)


@pytest.mark.usefixtures("by_prefix")
def test_hits_are_those_of_generate_in_the_order_of_the_rows(
    make_artifact: Callable[..., Artifact], tiny_base: Path, tuned: Path, rows: list[Row]
) -> None:
    base, artifact = Checkpoint.open(tiny_base), make_artifact(rank=64)
    judge = Judge(base, artifact.manifest, rows, dtype=torch.float32)
    own = judge.prepare(Checkpoint.open(tuned))
    assert own.hits == [True, True, False] * 2
    assert own.exact_match == pytest.approx(2 / 3)
    assert (own.kl, own.top1_agreement, own.general_kl) == (None, None, None)
    alone = judge.judge_base()
    assert alone is not None and alone.kl is not None and alone.exact_match < own.exact_match
    assert alone.kl > (judge.judge(artifact).kl or 0)


def test_a_delta_is_judged_as_if_it_were_the_only_one(
    make_artifact: Callable[..., Artifact], tiny_base: Path, tuned: Path, rows: list[Row]
) -> None:
    base, artifacts = Checkpoint.open(tiny_base), [make_artifact(rank=2), make_artifact("bitdelta")]
    shared = Judge(base, artifacts[0].manifest, rows, dtype=torch.bfloat16, general=GENERAL)
    shared.prepare(Checkpoint.open(tuned))
    judged = [shared.judge(artifact) for artifact in artifacts]
    for artifact, together in zip(artifacts, judged, strict=True):
        own = Judge(base, artifact.manifest, rows, dtype=torch.bfloat16, general=GENERAL)
        own.prepare(Checkpoint.open(tuned))
        assert own.judge(artifact) == together
    assert judged[0] != judged[1]


def test_a_base_of_another_vocabulary_has_no_distance(
    artifact_of_tiny: Artifact, tiny_base: Path, tiny_finetune: Path, rows: list[Row]
) -> None:
    judge = Judge(Checkpoint.open(tiny_base), artifact_of_tiny.manifest, rows[:1], dtype=torch.float32)
    judge.prepare(Checkpoint.open(tiny_finetune))
    assert judge.judge_base() is None
    with pytest.raises(CheckpointError, match="the task has token 301, the model has not so many"):
        judge.prepare(Checkpoint.open(tiny_base))


def test_predictions_over_other_vocabularies_are_not_compared(
    make_artifact: Callable[..., Artifact], tiny_base: Path, tiny_finetune: Path, rows: list[Row]
) -> None:
    artifact = make_artifact(rank=2)
    judge = Judge(Checkpoint.open(tiny_base), artifact.manifest, rows[:1], dtype=torch.float32)
    judge.prepare(Checkpoint.open(tiny_finetune))
    with pytest.raises(CheckpointError, match="vocabulary has 302 tokens, the restored model's 300"):
        judge.judge(artifact)


@torch.inference_mode()
def test_products_on_bfloat16_units_lose_nothing_and_leave_no_setting_behind(tiny_base: Path) -> None:
    model = load_reference(Checkpoint.open(tiny_base), None, None, torch.bfloat16)
    hidden = torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = [log_p for _, (log_p,) in predictions_in_chunks(Predictions(Head(model, exact=True), hidden))]
    exact = F.log_softmax(hidden.double() @ model.lm_head.weight.double().T, -1)
    assert float((torch.cat(parts) - exact).abs().max()) < 2e-5
    assert torch.get_float32_matmul_precision() == "highest"


def test_batches_hold_every_sequence_once_and_so_many_tokens() -> None:
    sequences = [[0] * length for length in (3, 900, 1, 5000, 1200, 2, 1200, 1200, 1200)]
    parts = batches(sequences, 3)
    assert sorted(index for part in parts for index in part) == list(range(9))
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(sequences[index]) for index in part) <= BATCH_TOKENS
        assert len(part) <= 3
    assert parts[0] == [2, 5, 0]
