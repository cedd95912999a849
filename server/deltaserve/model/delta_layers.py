"""The ONE place where kernels meet the model: layers of the base that add, for each row, the delta of the row's slot.

    y[rows of slot] = (1 + base_shift)·((x ⊙ cols)·W_baseᵀ) ⊙ rows + b + gamma·Σ_j x·Term_jᵀ

The base product is made once for all rows, whoever they belong to.

Rows of slot −1 take the base as it is; a step of base rows alone does nothing beyond the base. Overrides replace: a
norm or bias by its tenant's tensor, rows of an embedding or head by the tenant's rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaserve.deltas.artifact import Override
from deltaserve.deltas.resident import ResidentDelta, ResidentLayer
from deltaserve.model.step import Step, StepContext
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.fused.parts import FusedTerm
from deltaserve_kernels.native.library import load
from deltaserve_kernels.native.parts import Part
from deltaserve_kernels.native.site import apply_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltaserve_kernels.segments import Segment


def base_input(x: Tensor, name: str, step: Step, runs: Sequence[Segment]) -> Tensor:
    """x [..., in] as the base's weight `name` takes it: the runs of deltas with factors on its columns, scaled."""
    layers = ((run, step.delta(run).layers.get(name)) for run in runs)
    scaled = [(run, layer.factors.cols) for run, layer in layers if layer and layer.factors.cols is not None]
    if not scaled:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    for run, cols in scaled:
        x.flatten(0, -2)[run.start : run.stop] *= cols
    return x


def add_layer(x: Tensor, y: Tensor, layer: ResidentLayer, bias: Tensor | None) -> None:
    """Adds a delta to y [T, out], which is base_input(x)·W_baseᵀ + bias of x [T, in]; changes y."""
    if layer.factors.rows is not None:
        scale = (1 + layer.base_shift) * layer.factors.rows.float()  # float32 [out], and so are the products
        y.copy_(y * scale if bias is None else (y - bias.float()) * scale + bias)
    elif layer.base_shift:
        y += layer.base_shift * (y if bias is None else y - bias)
    for term in layer.terms:
        if isinstance(term, Part):
            y += apply_part(load(), x, term, layer.gamma)
            continue
        assert not isinstance(term, FusedTerm), "it lies in the delta's bundle"
        added = apply_term(x, term)
        y += added if layer.gamma == 1 else layer.gamma * added


class DeltaLinear(nn.Module):
    """y = x·Wᵀ + b, and the terms of each run's delta. `name` is the module's, weight and bias its tensors'; `site` is
    the weight's number, the bias has the next."""

    def __init__(self, base: nn.Linear, name: str, site: int, context: StepContext) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._site = site
        self.in_features, self.out_features = base.in_features, base.out_features
        self._weight_name, self._bias_name = f"{name}.weight", f"{name}.bias"
        self._context = [context]  # in a list: the context is no sub-module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] with one row for each row of the step → [..., out]."""
        step = self._context[0].current
        taken = base_input(x, self._weight_name, step, step.segments.runs)
        if (fused := self._context[0].fused) is not None:
            y = fused.linear(self._site, x, taken, self.weight, self.bias)
        else:
            y = F.linear(taken, self.weight, self.bias)
        rows, out = x.flatten(0, -2), y.flatten(0, -2)  # views
        if fused is not None and fused.replaces(self._site + 1):
            own = y.new_zeros(self.out_features) if self.bias is None else self.bias  # the weight may be quantised
            out += fused.vectors(self._site + 1, own) - own
        assert len(rows) == step.num_rows, f"{self._weight_name}: {len(rows)} rows in a step of {step.num_rows}"
        for run in step.segments.runs:
            self._add(rows[run.start : run.stop], out[run.start : run.stop], step.delta(run))
        return y

    def _add(self, x: Tensor, out: Tensor, delta: ResidentDelta) -> None:
        if (layer := delta.layers.get(self._weight_name)) is not None:
            add_layer(x, out, layer, self.bias)
        if (override := delta.overrides.get(self._bias_name)) is not None:
            bias = override.apply(self.bias).to(out.dtype)
            out += bias if self.bias is None else bias - self.bias


def head_override_name(delta: ResidentDelta, tied: bool, embedding: str, head: str) -> str:
    """The tensor that overrides the head's rows: a tied head is the embedding, unless the fine-tune has its own."""
    return embedding if tied and not delta.unties_head else head


def widest_vocabulary(base: int, overrides: Sequence[Override | None]) -> int:
    return max([base, *(override.shape[0] for override in overrides if override is not None)])


def override_logits(x: Tensor, y: Tensor, override: Override, bias: Tensor | None) -> None:
    """y [R, vocabulary] of the rows that a tenant changed or added: x [R, in] times them; changes y."""
    rows = torch.arange(override.shape[0], device=x.device) if override.rows is None else override.rows
    logits = F.linear(x, override.values.to(x.dtype)).to(y.dtype)
    if bias is not None:  # an added row has none
        logits += F.pad(bias, (0, max(override.shape[0] - len(bias), 0)))[rows]
    y[:, rows] = logits


def replace_embeddings(ids: Tensor, out: Tensor, override: Override | None) -> None:
    """out [T, size] of the ids int64 [T] whose rows a tenant changed or added; changes out."""
    if override is None or not len(override.values):
        return
    if override.rows is None:
        out.copy_(F.embedding(ids, override.values))
        return
    place = torch.searchsorted(override.rows, ids).clamp(max=len(override.rows) - 1)
    found = override.rows[place] == ids
    out[found] = override.values[place[found]].to(out.dtype)


class DeltaHead(nn.Module):
    """Logits of the rows that are asked for: the base's head, terms on it, and the tenant's own or added rows."""

    def __init__(
        self, base: nn.Linear, name: str, site: int, embedding_name: str, tied: bool, context: StepContext
    ) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._site = site
        self.weight_name, self._bias_name = f"{name}.weight", f"{name}.bias"
        self._embedding_name = f"{embedding_name}.weight"
        self._tied = tied
        self._context = [context]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], R rows for those of the step's head segments → [..., largest vocabulary], −inf past a row's."""
        y = self._logits(x.flatten(0, -2))
        return y.view(*x.shape[:-1], y.shape[1])

    def _logits(self, x: Tensor) -> Tensor:
        step = self._context[0].current
        y = F.linear(base_input(x, self.weight_name, step, step.head_segments.runs), self.weight, self.bias)
        runs = [(run, step.delta(run)) for run in step.head_segments.runs]
        overrides = [delta.overrides.get(self._override_name(delta)) for _, delta in runs]
        if (widest := widest_vocabulary(y.shape[1], overrides)) > y.shape[1]:
            y = F.pad(y, (0, widest - y.shape[1]), value=-torch.inf)
        for (run, _), override in zip(runs, overrides, strict=True):
            own, out = x[run.start : run.stop], y[run.start : run.stop]
            if override is not None:
                override_logits(own, out, override, self.bias)
        if (fused := self._context[0].fused_head) is not None:
            fused.add(self._site, x, y, self.bias, rows=len(self.weight))
        for run, delta in runs:
            own, out = x[run.start : run.stop], y[run.start : run.stop]
            if (layer := delta.layers.get(self.weight_name)) is not None:
                add_layer(own, out[:, : len(self.weight)], layer, self.bias)
        if widest > len(self.weight):
            self._context[0].absent = y == -torch.inf
        return y

    def _override_name(self, delta: ResidentDelta) -> str:
        return head_override_name(delta, self._tied, self._embedding_name, self.weight_name)


class DeltaEmbedding(nn.Module):
    """Rows of the base's embedding, or the tenant's where it changed or added them; times the model's scale, if any."""

    def __init__(self, base: nn.Embedding, name: str, context: StepContext) -> None:
        super().__init__()
        self.weight = base.weight
        self.num_embeddings = base.num_embeddings
        self.embedding_dim = base.embedding_dim
        scale = getattr(base, "embed_scale", None)
        self._scale = scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale
        self._weight_name = f"{name}.weight"
        self._context = [context]

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [..., T] with one id for each row of the step → [..., T, size]."""
        y = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)  # an added token exists in its delta alone
        step = self._context[0].current
        flat, out = ids.flatten(), y.flatten(0, -2)
        assert len(flat) == step.num_rows, f"{self._weight_name}: {len(flat)} ids in a step of {step.num_rows}"
        for run in step.segments.runs:
            override = step.delta(run).overrides.get(self._weight_name)
            replace_embeddings(flat[run.start : run.stop], out[run.start : run.stop], override)
        return y if self._scale is None else y * self._scale


class DeltaModule(nn.Module):
    """Any other module with weights that works row by row, such as a norm: run again with the tenant's tensors, or once
    with a vector for each row where it takes those."""

    def __init__(self, base: nn.Module, name: str, axis: int, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self._axis = axis
        self._tensors = {f"{name}.{local}": local for local, _ in base.named_parameters(recurse=False)}
        self.vector_sites: dict[str, int] = {}  # numbers of its tensors, by their local names
        for local, parameter in base.named_parameters(recurse=False):
            setattr(self, local, parameter)  # models look at the type of a norm's weight
        self._context = [context]

    def forward(self, x: Tensor) -> Tensor:
        """x with the T rows of the step along the axis that was named: [1, T, …], [T, …] or [1, heads, T, …]."""
        step, axis, fused = self._context[0].current, self._axis, self._context[0].fused
        assert x.shape[axis] == step.num_rows, f"{next(iter(self._tensors))}: {tuple(x.shape)} in {step.num_rows} rows"
        if fused is not None and self.vector_sites:
            replaced = [(local, site) for local, site in self.vector_sites.items() if fused.replaces(site)]
            if vectors := {local: fused.vectors(site, getattr(self, local)) for local, site in replaced}:
                return self._with_vectors(vectors, x)
        y: Tensor = self.base(x)
        for run in step.segments.runs:
            overrides = step.delta(run).overrides
            tensors = {local: overrides[name] for name, local in self._tensors.items() if name in overrides}
            if tensors:
                own = {local: it.apply(getattr(self, local)).to(x.dtype) for local, it in tensors.items()}
                rows = (slice(None),) * axis + (slice(run.start, run.stop),)
                y[rows] = self._with_tensors(own, x[rows])
        return y

    def takes_vectors(self) -> bool:
        """Does it give the same with a vector for each row?"""
        vectors = [getattr(self, local) for local in self._tensors.values()]
        if self._axis > 2 or len({len(vector) for vector in vectors}) != 1:
            return False
        rows, size = 3, len(vectors[0])
        x = torch.linspace(-1, 1, rows * size, dtype=vectors[0].dtype, device=vectors[0].device)
        x = x.view(*(1,) * self._axis, rows, size)
        given = {local: getattr(self, local).expand(rows, size) for local in self._tensors.values()}
        try:
            return torch.equal(self._with_vectors(given, x), self.base(x))
        except RuntimeError:
            return False

    def _with_vectors(self, vectors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`vectors`: [T, n] each."""
        shape = [1] * x.dim()
        shape[self._axis], shape[-1] = x.shape[self._axis], -1
        return self._with_tensors({local: vector.view(shape) for local, vector in vectors.items()}, x)

    def _with_tensors(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The base module's own arithmetic, with other weights for the time of one call."""
        parameters = self.base._parameters
        kept = dict(parameters)
        try:
            parameters.update(tensors)  # type: ignore[arg-type]
            result: Tensor = self.base(x)
            return result
        finally:
            parameters.update(kept)
