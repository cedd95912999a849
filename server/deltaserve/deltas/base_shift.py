"""DBMS' two numbers, found by distillation: how much of the base, how much of the delta. arXiv 2505.11344, section 3.

    y = (1 + λ) · x·W_baseᵀ + γ · x·Δ̂ᵀ
    min over γ, λ of KL(fine-tune ‖ compressed)      mean over the tokens of texts that are predicted

One pair for the whole model ("task") or for each layer. The start is γ = 1, λ = 0; a held-out part of the texts decides
between it and what was found, so that texts are never fitted for nothing. The model only moves towards what the texts
show: with texts that have nothing to do with the task, γ falls below what the task wants (decision 0007).

In memory: the fine-tune, the base, Δ̂ of all layers, in bfloat16, and what one layer computes. The held-out part, Adam
and the steps are ours.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaserve.codecs.base import CodingError, decode
from deltaserve.deltas.calibration import decoder_layers, layer_linears, make_batches
from deltaserve.deltas.compress import Scalars, write_artifact
from deltaserve.deltas.manifest import ErrorSpec
from deltaserve.deltas.recompute import recomputed, tokens_at_once
from deltaserve.deltas.reference_model import load_reference
from deltaserve.deltas.tensorfile import TensorFileWriter
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.calibration import Batch, Text
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Progress

Span: TypeAlias = Literal["task", "layer"]
Numbers: TypeAlias = Literal["both", "gamma", "shift"]

GAMMAS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # tried one after the other
NEAR = 1.05  # of the least KL: what is as good, where the largest γ is taken
STEPS = 32
RATE, SHIFT_RATE = 0.1, 0.004  # of Adam, for γ and λ, falling as a cosine
BATCH = 8  # texts of a step
HELD_OUT = 4  # every fourth batch


class Fit(NamedTuple):
    """KL on the texts held out, nats a token, and what was found: nothing where it was no better."""

    before: float
    after: float
    scalars: Mapping[str, Scalars]


def fit_scalars(
    base: Checkpoint,
    finetuned: Checkpoint,
    artifact: Artifact,
    texts: Sequence[Text],
    *,
    span: Span = "layer",
    numbers: Numbers = "both",
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Fit:
    """By layer, for the artifact's terms; layers that are no linears keep theirs. Raises CheckpointError."""
    if span not in get_args(Span) or numbers not in get_args(Numbers):
        raise ValueError(f"{span!r}, {numbers!r}: not in {get_args(Span)}, {get_args(Numbers)}")
    lessons = _lessons(load_reference(base, None, finetuned, torch.bfloat16), texts)
    if len(lessons) < 2:
        raise CheckpointError(f"{len(texts)} texts are too few to fit scalars: at least {BATCH + 1} are needed")
    held_out = lessons[HELD_OUT - 1 :: HELD_OUT] or lessons[-1:]
    fitted = [lesson for lesson in lessons if not any(lesson is held for held in held_out)]
    student = load_reference(base, artifact, None, torch.bfloat16)
    with _student(student, base, artifact, span) as knobs:
        chosen = [*(knobs.gammas if numbers != "shift" else []), *(knobs.shifts if numbers != "gamma" else [])]
        before = _mean_divergence(student, held_out)
        rates = [RATE if any(knob is gamma for gamma in knobs.gammas) else SHIFT_RATE for knob in chosen]
        optimizer = torch.optim.Adam([{"params": [k], "lr": r} for k, r in zip(chosen, rates, strict=True)])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            if progress:
                progress("fitting scalars", step, steps)
            lesson = fitted[int(torch.randint(len(fitted), (), generator=generator))]
            optimizer.zero_grad()
            _divergence(student, lesson).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        after = _mean_divergence(student, held_out)
        found = knobs.scalars()
    return Fit(before, after, found if after < before else {})


def find_gamma(
    base: Checkpoint,
    finetuned: Checkpoint,
    artifact: Artifact,
    texts: Sequence[Text],
    *,
    progress: Progress | None = None,
) -> float:
    """One γ ≤ 1 for all layers: 1, or less where the noise of Δ̂ costs more than what is lost of Δ. Ours.

    KL(γ) on the texts is followed down from 1 until it rises; of those near the least the largest is taken: texts that
    are not of the task prefer a smaller one than the task does (decision 0026). Raises CheckpointError."""
    lessons = _lessons(load_reference(base, None, finetuned, torch.bfloat16), texts)
    student = load_reference(base, artifact, None, torch.bfloat16)
    found: dict[float, float] = {}
    with _student(student, base, artifact, "task") as knobs, torch.no_grad():
        for gamma in (1.0, *GAMMAS):
            if progress:
                progress("weighing noise", len(found), 1 + len(GAMMAS))
            knobs.gammas[0].fill_(gamma)
            found[gamma] = _mean_divergence(student, lessons)
            if found[gamma] > min(found.values()):
                break
    return max(gamma for gamma, divergence in found.items() if divergence <= NEAR * min(found.values()))


def rescaled(base: Checkpoint, finetuned: Checkpoint, artifact: Artifact, scalars: Mapping[str, Scalars]) -> Artifact:
    """The file again, with other scalars, and errors that count them; in the place of the old one."""
    path: Path = artifact.file.path
    layers = dict(artifact.manifest.layers)
    for name, chosen in scalars.items():
        before = base.tensor(name).float().flatten(1)
        delta = finetuned.tensor(name).float().flatten(1) - before
        decoded = chosen.gamma * decode(artifact.terms(name)) + chosen.base_shift * before
        error = {key: float(f"{value:.4g}") for key, value in asdict(CodingError.of(delta, decoded)).items()}
        layers[name] = layers[name].model_copy(update={**asdict(chosen), "error": ErrorSpec(**error)})
    writer = TensorFileWriter(path.parent)
    try:
        for name in artifact.entries:
            writer.add(name, artifact.read(name))
        manifest = artifact.manifest.model_copy(update={"layers": layers})
        write_artifact(path, manifest, writer, packed=manifest.packed)
    finally:
        writer.close()
    return type(artifact).open(path)


class _Knobs:
    """γ and λ by layer; with span "task" all layers have the same."""

    def __init__(self, names: Sequence[str], span: Span) -> None:
        count = 1 if span == "task" else len(names)
        self.gammas = [torch.ones((), requires_grad=True) for _ in range(count)]
        self.shifts = [torch.zeros((), requires_grad=True) for _ in range(count)]
        self._of = {name: 0 if span == "task" else index for index, name in enumerate(names)}

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return self.gammas[self._of[name]], self.shifts[self._of[name]]

    def scalars(self) -> dict[str, Scalars]:
        """Rounded, as they are stored."""
        return {
            name: Scalars(gamma=round(float(gamma.detach()), 3), base_shift=round(float(shift.detach()), 5))
            for name in self._of
            for gamma, shift in [self[name]]
        }


@contextmanager
def _student(model: PreTrainedModel, base: Checkpoint, artifact: Artifact, span: Span) -> Iterator[_Knobs]:
    """The restored model with its linears taken apart into base and delta, and the numbers between them."""
    prefix, layers = decoder_layers(model)
    linears = {n: m for n, m in layer_linears(prefix, layers).items() if n in artifact.manifest.layers}
    if not linears:
        raise CheckpointError("the artifact compresses no linear layer: there is nothing to scale")
    knobs = _Knobs(list(linears), span)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, linear in linears.items():
        weight = linear.weight
        linear.weight = nn.Parameter(base.tensor(name).to(weight), requires_grad=False)
        delta = decode(artifact.terms(name)).to(weight)
        linear.forward = partial(_mixed, linear, delta, *knobs[name])  # type: ignore[method-assign]
    try:
        with recomputed(layers):
            yield knobs
    finally:
        for linear in linears.values():
            vars(linear).pop("forward", None)


def _mixed(linear: nn.Linear, delta: Tensor, gamma: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    out = F.linear(x, linear.weight) * (1 + shift) + F.linear(x, delta) * gamma
    out = out.to(x.dtype)
    return out if linear.bias is None else out + linear.bias


class _Lesson(NamedTuple):
    batch: Batch
    wanted: Tensor  # [n, D], the teacher's final hidden states before the tokens that are predicted
    head: nn.Module  # the teacher's


def _lessons(teacher: PreTrainedModel, texts: Sequence[Text]) -> list[_Lesson]:
    head: nn.Module = teacher.get_output_embeddings()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        batches = make_batches(texts, BATCH, teacher.device)
        return [_Lesson(batch, batch.hidden(teacher), head) for batch in batches]


def _mean_divergence(student: PreTrainedModel, lessons: Sequence[_Lesson]) -> float:
    with torch.no_grad():
        return sum(float(_divergence(student, lesson)) for lesson in lessons) / len(lessons)


def _divergence(student: PreTrainedModel, lesson: _Lesson) -> Tensor:
    """KL(teacher ‖ student), mean over the tokens of a batch that are predicted."""
    heads: tuple[nn.Module, nn.Module] = lesson.head, student.get_output_embeddings()  # type: ignore[no-untyped-call]
    tokens = tokens_at_once(student)
    pieces = zip(torch.split(lesson.wanted, tokens), torch.split(lesson.batch.hidden(student), tokens), strict=True)
    parts = [checkpoint(_summed, *heads, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(parts).sum() / len(lesson.wanted)


def _summed(teacher: nn.Module, student: nn.Module, wanted: Tensor, hidden: Tensor) -> Tensor:
    """KL summed over tokens, of two heads for their hidden states [n, D]."""
    with torch.no_grad():
        log_p = F.log_softmax(teacher(wanted).float(), -1)
    log_q = F.log_softmax(student(hidden).float(), -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
