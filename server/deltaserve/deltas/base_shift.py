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

from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaserve.codecs.base import CodingError, decode
from deltaserve.deltas.calibration import decoder_layers, layer_linears, make_batches
from deltaserve.deltas.compress import Scalars, write_artifact
from deltaserve.deltas.head import Head, divergence
from deltaserve.deltas.manifest import ErrorSpec
from deltaserve.deltas.recompute import recomputed
from deltaserve.deltas.reference_model import load_reference
from deltaserve.deltas.tensorfile import TensorFileWriter
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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
    student = _Student(base, artifact, span)
    gammas = student.knobs.gammas if numbers != "shift" else []
    shifts = student.knobs.shifts if numbers != "gamma" else []
    before = student.mean_divergence(held_out)
    optimizer = torch.optim.Adam([{"params": k, "lr": r} for k, r in ((gammas, RATE), (shifts, SHIFT_RATE)) if k])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if progress:
            progress("fitting scalars", step, steps)
        lesson = fitted[int(torch.randint(len(fitted), (), generator=generator))]
        optimizer.zero_grad()
        student.divergence(lesson).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    after = student.mean_divergence(held_out)
    return Fit(before, after, student.knobs.scalars() if after < before else {})


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
    student = _Student(base, artifact, "task")
    found: dict[float, float] = {}
    for gamma in (1.0, *GAMMAS):
        if progress:
            progress("weighing noise", len(found), 1 + len(GAMMAS))
        student.knobs.gammas[0].data.fill_(gamma)
        found[gamma] = student.mean_divergence(lessons)
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


class _Student:
    """The restored model with its linears taken apart into base and delta, and the numbers between them."""

    def __init__(self, base: Checkpoint, artifact: Artifact, span: Span) -> None:
        self._model = load_reference(base, artifact, None, torch.bfloat16)
        self._head = Head(self._model)
        prefix, self._layers = decoder_layers(self._model)
        linears = {n: m for n, m in layer_linears(prefix, self._layers).items() if n in artifact.manifest.layers}
        if not linears:
            raise CheckpointError("the artifact compresses no linear layer: there is nothing to scale")
        self._model.requires_grad_(False)
        self.knobs = _Knobs(list(linears), span)
        for name, linear in linears.items():
            weight, delta = base.tensor(name).to(linear.weight), decode(artifact.terms(name)).to(linear.weight)
            apart = _Apart(weight, delta, linear.bias, *self.knobs[name])
            self._model.set_submodule(name.removesuffix(".weight"), apart)

    def divergence(self, lesson: _Lesson) -> Tensor:
        """KL(teacher ‖ student), mean over the tokens of a batch that are predicted."""
        with recomputed(self._layers):
            hidden = lesson.batch.hidden(self._model)
        pieces = zip(self._head.pieces(lesson.wanted), self._head.pieces(hidden), strict=True)
        parts = [checkpoint(_summed, lesson.head, self._head, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(parts).sum() / len(lesson.wanted)

    @torch.no_grad()
    def mean_divergence(self, lessons: Sequence[_Lesson]) -> float:
        return sum(float(self.divergence(lesson)) for lesson in lessons) / len(lessons)


class _Apart(nn.Module):
    """y = (1 + λ) · x·weightᵀ + γ · x·deltaᵀ + bias"""

    def __init__(self, weight: Tensor, delta: Tensor, bias: Tensor | None, gamma: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.weight, self.delta, self.bias, self.gamma, self.shift = weight, delta, bias, gamma, shift

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight) * (1 + self.shift) + F.linear(x, self.delta) * self.gamma
        out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias


class _Lesson(NamedTuple):
    batch: Batch
    wanted: Tensor  # [n, D], the teacher's final hidden states before the tokens that are predicted
    head: Head  # the teacher's


@torch.no_grad()
def _lessons(teacher: PreTrainedModel, texts: Sequence[Text]) -> list[_Lesson]:
    head = Head(teacher)
    batches = make_batches(texts, BATCH, teacher.device)
    return [_Lesson(batch, batch.hidden(teacher), head) for batch in batches]


def _summed(teacher: Head, student: Head, wanted: Tensor, hidden: Tensor) -> Tensor:
    """KL summed over tokens, of two heads for their hidden states [n, D]."""
    with torch.no_grad():
        log_p = teacher.log_p(wanted)
    return divergence(log_p, student.log_p(hidden))
