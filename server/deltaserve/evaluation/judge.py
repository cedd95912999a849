"""How well a delta stands for its fine-tune: answers, and the distance between the two models' predictions.

    exact match      share of rows whose greedy answer is the reference, by the chosen scoring
    nats per token   −log p of the reference answer and its end, mean over their tokens
    KL               Σ_v p(v) (log p(v) − log q(v)), p the fine-tune, q the restored model; mean over the same tokens
    top-1 agreement  share of the same tokens at which both models would say the same
    general KL       KL, mean over the tokens of text that has nothing to do with the task

Models run by transformers, not by the engine: what is measured is the delta alone. The fine-tune runs once, a delta
costs one pass of one model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from deltaserve.deltas.companions import end_ids, load_tokenizer
from deltaserve.deltas.head import Head, divergence
from deltaserve.deltas.reference_model import load_reference
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import CheckpointError
from deltaserve.evaluation.general import GENERAL_TOKENS, windows
from deltaserve.evaluation.greedy import greedy_answers
from deltaserve.evaluation.predictions import (
    Advance,
    Predictions,
    batches,
    final_hidden,
    mean_divergence,
    predictions_in_chunks,
)
from deltaserve.evaluation.rows import Scoring, encode, is_match

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Progress
    from deltaserve.deltas.manifest import Manifest
    from deltaserve.evaluation.rows import Row

BATCH = 64  # rows at once


@dataclass(frozen=True)
class Judgement:
    """One model on the task, and its distance from the fine-tune: None where there is nothing to compare."""

    hits: list[bool]  # in the order of the rows
    exact_match: float
    nats_per_token: float
    kl: float | None
    top1_agreement: float | None
    general_kl: float | None


class _Run(NamedTuple):
    """What is kept of a model that has run."""

    answers: Predictions  # of the tokens of all answers, row by row
    general: Predictions | None  # of the tokens after those of the general text


class Judge:
    """Measures any number of deltas of one fine-tune on the same rows and the same general text.

    `manifest` says what every delta of the fine-tune brings beside weights: tokens, template, ends.
    Raises ArtifactMismatch, CheckpointError, TemplateError.
    """

    def __init__(
        self,
        base: Checkpoint,
        manifest: Manifest,
        rows: Sequence[Row],
        *,
        dtype: torch.dtype,
        general: Sequence[str] = (),
        general_tokens: int = GENERAL_TOKENS,
        batch: int = BATCH,
        scoring: Scoring = "exact",
    ) -> None:
        self._base, self._dtype, self._batch, self._scoring = base, dtype, batch, scoring
        self._tokenizer = load_tokenizer(base.directory, manifest)
        self._ends = end_ids(base, manifest, self._tokenizer)
        self._examples = [encode(self._tokenizer, row) for row in rows]
        self._asked = [example.prompt + example.answer[:-1] for example in self._examples]
        self._general = windows(self._tokenizer, general, general_tokens)
        self._finetuned: _Run | None = None
        # of progress, that one model takes: load, read, compare, answer
        self.num_steps = 3 + len(batches(self._asked, batch)) + len(batches(self._general, batch))

    def prepare(self, finetuned: Checkpoint, advance: Advance = lambda _: None) -> Judgement:
        """The fine-tune itself; from now on other models are compared with it."""
        advance("loading the fine-tune")
        judgement, self._finetuned = self._measure(load_reference(self._base, None, finetuned, self._dtype), advance)
        return judgement

    def judge(self, artifact: Artifact, advance: Advance = lambda _: None) -> Judgement:
        """The base with the artifact restored. Raises ArtifactError as well."""
        check_against_base(artifact, self._base)
        check_numbers(artifact, self._base)
        advance("restoring the model")
        return self._measure(load_reference(self._base, artifact, None, self._dtype), advance)[0]

    def judge_base(self, advance: Advance = lambda _: None) -> Judgement | None:
        """The base without any delta; None where its vocabulary is not the fine-tune's."""
        advance("loading the base")
        model = load_reference(self._base, None, None, self._dtype)
        tokens = len(model.get_output_embeddings().weight)  # type: ignore[no-untyped-call]
        if self._finetuned and tokens != self._finetuned.answers.head.vocab_size:
            return None
        return self._measure(model, advance)[0]

    @torch.inference_mode()
    def _measure(self, model: PreTrainedModel, advance: Advance) -> tuple[Judgement, _Run]:
        largest = max(max(ids) for ids in [*self._asked, *self._general])
        embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        if largest >= embedding.shape[0]:
            raise CheckpointError(f"{type(model).__name__}: the task has token {largest}, the model has not so many")
        run, finetuned = self._run(model, advance), self._finetuned
        if finetuned and finetuned.answers.head.vocab_size != run.answers.head.vocab_size:
            raise CheckpointError(
                f"the fine-tune's vocabulary has {finetuned.answers.head.vocab_size} tokens, the restored model's "
                f"{run.answers.head.vocab_size}: their predictions cannot be compared"
            )
        advance("comparing predictions")
        lengths = [len(example.answer) for example in self._examples]
        wanted = torch.tensor([token for example in self._examples for token in example.answer], device=model.device)
        nats, kl, agreeing = 0.0, 0.0, 0
        said: list[Tensor] = []  # int64, the likeliest token at each position
        for part, (log_q, *log_p) in predictions_in_chunks(run.answers, *([finetuned.answers] if finetuned else [])):
            nats += float(F.nll_loss(log_q, wanted[part], reduction="sum"))
            said.append(log_q.argmax(-1))
            for other in log_p:
                kl += float(divergence(other, log_q))
                agreeing += int((other.argmax(-1) == said[-1]).sum())
        general_kl = None
        if finetuned and finetuned.general and run.general:
            general_kl = mean_divergence(finetuned.general, run.general)
        advance("answering")
        tokens = greedy_answers(model, self._examples, torch.split(torch.cat(said), lengths), self._ends, self._batch)
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        hits = [is_match(text, e.reference, self._scoring) for text, e in zip(texts, self._examples, strict=True)]
        return Judgement(
            hits=hits,
            exact_match=sum(hits) / len(hits),
            nats_per_token=nats / len(wanted),
            kl=kl / len(wanted) if finetuned else None,
            top1_agreement=agreeing / len(wanted) if finetuned else None,
            general_kl=general_kl,
        ), run

    def _run(self, model: PreTrainedModel, advance: Advance) -> _Run:
        head = Head(model, exact=True)
        lengths = [len(example.answer) for example in self._examples]
        answers = final_hidden(model, self._asked, lengths, self._batch, advance)
        if not self._general:
            return _Run(Predictions(head, answers), None)
        general = final_hidden(model, self._general, list(map(len, self._general)), self._batch, advance)
        return _Run(Predictions(head, answers), Predictions(head, general))


def counter(progress: Progress | None, total: int) -> Advance:
    """A function that reports the step that begins."""
    done = itertools.count()
    return lambda name: progress(name, next(done), total) if progress else None
