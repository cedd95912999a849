"""A delta as the native decoder reads it: for each site its parts, for each norm its weights. Made once a delta."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deltaserve.deltas.artifact import Override
from deltaserve.deltas.resident import ResidentDelta, ResidentLayer
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.fused.parts import FusedTerm
from deltaserve_kernels.native.library import Arena, Library
from deltaserve_kernels.native.parts import Part, base_scale, vector
from deltaserve_kernels.native.site import PackedSite, PartList
from deltaserve_kernels.terms import Term


def side_by_side(delta: ResidentDelta, library: Library) -> ResidentDelta:
    """With its parts in one piece of memory: a step reads those of many deltas, a few kilobytes of each at a time."""
    parts = [term for layer in delta.layers.values() for term in layer.terms if isinstance(term, Part)]
    arena = Arena(library, sum(part.arena_bytes for part in parts))
    layers = {
        name: replace(layer, terms=tuple(term.moved(arena) if isinstance(term, Part) else term for term in layer.terms))
        for name, layer in delta.layers.items()
    }
    return replace(delta, layers=layers)


@dataclass(frozen=True)
class Linear:
    """A linear layer within a site: rows [first, first + rows) of its output."""

    weight: str
    bias: str
    first: int
    rows: int
    base_bias: Tensor | None


@dataclass(frozen=True)
class Slow:
    """What the kernels do not read of a layer: factors on the base's columns, terms of rare forms."""

    linear: Linear
    layer: ResidentLayer
    terms: tuple[Term, ...]

    def add(self, library: Library, x: Tensor, y: Tensor, site: PackedSite) -> None:
        """x bfloat16 [T, in], y float32 [T, out] of the site's rows of one run; changes y."""
        first, rows = self.linear.first, self.linear.rows
        own, factors, x = y[:, first : first + rows], self.layer.factors, x.float()
        if factors.cols is not None:
            changed = site.product(library, (x * (factors.cols.float() - 1)).bfloat16(), first, rows)
            scale = 1 + self.layer.base_shift
            own += scale * changed if factors.rows is None else scale * changed * factors.rows.float()
        for term in self.terms:
            own += self.layer.gamma * apply_term(x, term)


class NativeDelta:
    """`counts`, `addresses` int64 [sites]: the parts at each; `norms`: addresses of all norm weights; `head`: what its
    override of the head holds."""

    def __init__(
        self,
        delta: ResidentDelta,
        sites: Sequence[Sequence[Linear]],
        norms: Mapping[str, Tensor],
        head: Override | None,
    ) -> None:
        values = None if head is None or not len(head.values) else head.values
        self.head = None if values is None else PackedSite(len(values), values.shape[1], values)
        self.slow: dict[int, list[Slow]] = {}
        self._lists: list[PartList | None] = []
        for number, linears in enumerate(sites):
            parts = [part for linear in linears for part in self._parts(delta, linear, number)]
            self._lists.append(PartList(parts) if parts else None)
        self.counts = np.array([own.length if own else 0 for own in self._lists], dtype=np.int32)
        self.addresses = np.array([own.address if own else 0 for own in self._lists], dtype=np.uint64)
        self._norms = [
            weight if (override := delta.overrides.get(name)) is None else override.apply(weight).to(torch.bfloat16)
            for name, weight in norms.items()
        ]
        self.norms = norm_table(self._norms)

    def _parts(self, delta: ResidentDelta, linear: Linear, site: int) -> list[tuple[Part, int, float]]:
        parts: list[tuple[Part, int, float]] = []
        if (layer := delta.layers.get(linear.weight)) is not None:
            if layer.base_shift or layer.factors.rows is not None:
                parts.append((base_scale(linear.rows, 1 + layer.base_shift, layer.factors.rows), linear.first, 1.0))
            parts += [(term, linear.first, layer.gamma) for term in layer.terms if isinstance(term, Part)]
            others = tuple(term for term in layer.terms if not isinstance(term, Part | FusedTerm))
            if others or layer.factors.cols is not None:
                self.slow.setdefault(site, []).append(Slow(linear, layer, others))
        if (override := delta.overrides.get(linear.bias)) is not None:
            own = override.apply(linear.base_bias).float()
            parts.append(
                (vector(own if linear.base_bias is None else own - linear.base_bias.float()), linear.first, 1.0)
            )
        return parts


def norm_table(weights: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of bfloat16 vectors, which must outlive it."""
    return (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
