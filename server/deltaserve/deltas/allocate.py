"""Bits by layer under one budget, around any codec with a field `bits`: what each option costs and does, then a solver.

Options of a layer: the codec at `bits` times FACTORS (of a planner: what its plan gives the layer there), where it can
be made so. Their cost is what their terms weigh when the layer is really coded; the budget is `bits` for all layers
together. An allocator is a measure of loss and a solver (allocation.solvers):

    linear    α_l · t²,  t = ‖Δ − Δ̂‖/‖Δ‖,  α_l = ½ · curvature · ‖Δ‖²       nats a token (deltas.gradients)
              the linearity theorem of HIGGS (arXiv 2411.17525): the loss grows by Σ_l α_l · t_l² [abstract; formula
              from memory]. The paper has t against W, and finds α_l by noise of several norms in layer l
    measured  KL of the fine-tune with layer l alone at an option, nats a token, mean over calibration texts
              (deltas.lone_layers). Ours: measured at the first and the last option, between them a straight line of
              log KL over log t²
    synergy   Ω_l · t² + pairs. After a summary of Mix-QSAM (arXiv 2505.04861): importance Ω_l = mean_t I_l(t), the KL
              with layer l taken out (here its Δ), and synergy S_lm = log(1 + mean_t 1/(|I_l − I_m| + ε)), I against its
              mean over all layers; where synergy is high, bits are to be alike. Its objective is not public; ours:
              + ρ · mean loss · S_lm/mean S · (factor_l − factor_m)² for layers next to each other in natural order

A layer that the measurement does not reach counts as the mean of those that it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch

from deltaserve.allocation.problem import Problem
from deltaserve.allocation.solvers import SOLVERS
from deltaserve.codecs.auto import Auto
from deltaserve.codecs.base import CodingError, Planner, Site, decode
from deltaserve.deltas.compress import layer_deltas
from deltaserve.deltas.lone_layers import LoneLayers
from deltaserve.errors import CheckpointError, CodecError
from deltaserve_kernels.terms import site_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from deltaserve.allocation.problem import Losses
    from deltaserve.codecs.base import Codec, LayerStats
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Grams, Progress
    from deltaserve_kernels.terms import Term

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
ALIKE = 0.1  # ρ
NEAREST = 0.01  # ε
TINY = 1e-30

Measure = Literal["linear", "measured", "synergy"]
ALLOCATORS: dict[str, tuple[Measure, str]] = {
    "gradient": ("linear", "gradient"),
    "ilp": ("linear", "ilp"),
    "kl": ("measured", "dynamic"),
    "lagrangian": ("linear", "lagrangian"),
    "linearity": ("linear", "dynamic"),
    "synergy": ("synergy", "lagrangian"),
    "threshold": ("linear", "threshold"),
    "uniform": ("linear", "uniform"),
}


@dataclass(frozen=True)
class Allocated:
    """A codec whose layers have the settings of an allocator; a layer that was not planned has the codec's own."""

    needs_sensitivity: ClassVar[bool] = False
    codec: Codec
    layers: Mapping[str, Codec]
    record: Mapping[str, Any]  # for the manifest: the allocator, its loss and the bound on it

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def needs_gram(self) -> bool:
        return self.codec.needs_gram

    def config(self) -> dict[str, Any]:
        return {**self.codec.config(), **self.record}

    def plan(self, layers: Sequence[LayerStats]) -> Mapping[str, Codec]:
        return {layer.name: self.layers.get(layer.name, self.codec) for layer in layers}

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        return self.codec.encode(delta, site)


def check_allocatable(codec: Codec, allocator: str) -> None:
    """Raises CodecError."""
    if allocator not in ALLOCATORS:
        raise CodecError(f"allocator {allocator!r} does not exist; there are {', '.join(ALLOCATORS)}")
    if isinstance(codec, Auto):
        raise CodecError("auto: has an allocation of its own; an allocator takes its codec, seeded-vq, or another")
    if not any(field.name == "bits" and "float" in str(field.type) for field in fields(cast(Any, codec))):
        raise CodecError(f"{codec.name}: has no bits per parameter that an allocator could share out")
    if codec.config()["bits"] is None:
        raise CodecError(f"{codec.name}: an allocator needs bits per parameter, the budget that it shares out")


def allocated(
    base: Checkpoint,
    finetuned: Checkpoint,
    codec: Codec,
    allocator: str,
    layers: Sequence[LayerStats],
    *,
    seed: int = 0,
    grams: Grams | None = None,
    lone: Callable[[], LoneLayers],
    progress: Progress | None = None,
) -> Allocated:
    """`lone` loads the fine-tune for allocators that measure. Raises CodecError naming the least bits that will do."""
    check_allocatable(codec, allocator)
    measure, solver = ALLOCATORS[allocator]
    if not layers:
        return Allocated(codec, {}, {"allocator": allocator})
    budget_bits = codec.config()["bits"]
    factors, options = _options(codec, layers)
    probed = _probed(measure, len(options))
    survey = _survey(base, finetuned, options, probed, lone() if probed else None, seed, grams, progress)
    loss, pairs = _losses(measure, survey, layers, np.array(factors))
    parameters = sum(layer.parameters for layer in layers)
    budget, least = math.floor(budget_bits * parameters / 8), int(survey.cost.min(1).sum())
    if budget < least:
        lowest = math.ceil(8e4 * least / parameters) / 1e4
        raise CodecError(f"{codec.name}: bits {budget_bits:g}: the least that layers can share is {lowest:g}")
    solution = SOLVERS[solver](Problem(survey.cost, loss, budget, pairs))
    chosen = {
        layer.name: options[option][layer.name] for layer, option in zip(layers, solution.choice.tolist(), strict=True)
    }
    record = {"allocator": allocator, "allocated_loss": solution.loss, "allocated_bound": solution.bound}
    return Allocated(codec, chosen, record)


def _options(codec: Codec, layers: Sequence[LayerStats]) -> tuple[list[float], list[Mapping[str, Codec]]]:
    """Factors that the codec can be made at, and the layers' codecs there."""
    factors, options = [], []
    for factor in FACTORS:
        try:
            at = replace(cast(Any, codec), bits=codec.config()["bits"] * factor)
            plan = at.plan(layers) if isinstance(at, Planner) else {layer.name: at for layer in layers}
        except CodecError:
            continue
        factors.append(factor)
        options.append(plan)
    return factors, options


def _probed(measure: Measure, options: int) -> list[int | None]:
    """What `lone` is asked about: options, or None, the base's weight."""
    match measure:
        case "linear":
            return []
        case "measured":
            return [0, options - 1]
        case "synergy":
            return [None]


class _Survey(NamedTuple):
    cost: np.ndarray[Any, np.dtype[np.int64]]  # [L, O] bytes
    error: Losses  # [L, O] t²
    divergence: list[list[Tensor]]  # by probe and layer, float64 [tokens]


def _survey(
    base: Checkpoint,
    finetuned: Checkpoint,
    options: Sequence[Mapping[str, Codec]],
    probed: Sequence[int | None],
    lone: LoneLayers | None,
    seed: int,
    grams: Grams | None,
    progress: Progress | None,
) -> _Survey:
    """Codes every layer at every option; `lone` is asked about those that are `probed`."""
    costs, errors = [], []
    divergence: list[list[Tensor | None]] = [[] for _ in probed]
    for done, (name, delta, before) in enumerate(layer_deltas(base, finetuned)):
        if progress:
            progress(f"every option of {name}", done, len(options[0]))
        site = Site(site_number(name), seed, grams.gram(name) if grams else None)
        coded: dict[Codec, tuple[int, float]] = {}
        weights: dict[int | None, Tensor] = {None: before}
        for number, plan in enumerate(options):
            codec = plan[name]
            if codec not in coded or number in probed:
                terms = codec.encode(delta, site)
                decoded = decode(terms)
                coded[codec] = sum(term.nbytes for term in terms), CodingError.of(delta, decoded).relative ** 2
                if number in probed:
                    weights[number] = before + decoded
        costs.append([coded[plan[name]][0] for plan in options])
        errors.append([coded[plan[name]][1] for plan in options])
        if lone:
            for probe, found in zip(probed, divergence, strict=True):
                found.append(lone.divergence(name, weights[probe]))
    return _Survey(np.array(costs), np.array(errors), [_whole(found) for found in divergence])


def _whole(found: Sequence[Tensor | None]) -> list[Tensor]:
    """Layers that were not reached get the mean of the others."""
    reached = [divergence for divergence in found if divergence is not None and len(divergence)]
    if not reached:
        raise CheckpointError("the calibration texts predict no token through a linear layer: nothing to measure")
    mean = torch.stack(reached).mean(0)
    return [mean if divergence is None else divergence for divergence in found]


def _losses(
    measure: Measure, survey: _Survey, layers: Sequence[LayerStats], factors: Losses
) -> tuple[Losses, Losses | None]:
    """[L, O], and of pairs [L − 1, O, O]."""
    if measure == "linear":
        return np.array([[_alpha(layer)] for layer in layers]) * survey.error, None
    means = [np.array([float(tokens.mean()) for tokens in probe]) for probe in survey.divergence]  # [L] a probe
    if measure == "measured":
        first, last = (np.log(np.maximum(mean, TINY)) for mean in means)
        return np.stack(
            [_between(*line) for line in zip(np.log(np.maximum(survey.error, TINY)), first, last, strict=True)]
        ), None
    loss = means[0][:, None] * survey.error
    importance = torch.stack(survey.divergence[0]).numpy()  # [L, tokens]
    importance = importance / max(importance.mean(), TINY)
    synergy = np.log1p((1 / (np.abs(np.diff(importance, axis=0)) + NEAREST)).mean(1))  # [L − 1]
    typical = loss[:, np.abs(factors - 1).argmin()].mean()
    weight = ALIKE * typical * synergy / (synergy.mean() if len(synergy) else 1)
    return loss, weight[:, None, None] * (factors[:, None] - factors) ** 2


def _alpha(layer: LayerStats) -> float:
    """What t² = 1 costs; without a measured curvature, Δ's power against the layer's own weights'."""
    if layer.sensitivity is not None:
        return 0.5 * layer.sensitivity * layer.norm**2
    return (layer.norm / layer.base_norm) ** 2 if layer.base_norm else 1.0


def _between(error: Losses, first: float, last: float) -> Losses:
    """[O] KL by the line through the first and the last option's; all arguments are logarithms."""
    ends = (error[0], first), (error[-1], last)
    (x0, y0), (x1, y1) = sorted(ends)
    line: Losses = np.exp(np.interp(error, [x0, x1], [y0, y1]))
    return line
