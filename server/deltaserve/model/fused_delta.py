"""A delta as the fused kernels read it: everything they can in one block of memory. Made once a delta, at load."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve.deltas.base_factors import BaseFactors
from deltaserve.deltas.resident import ResidentDelta, ResidentLayer
from deltaserve_kernels.fused.bundle import LaunchNumbers, make_bundle
from deltaserve_kernels.fused.parts import FusedTerm, rescale, vector


class Site(NamedTuple):
    """A place where a delta does something to the model; its number is its place among all of them."""

    name: str  # of the weight that takes terms, or of a vector that can be replaced
    rows: int
    own: Tensor | None  # the base's vector, on the host; None: a weight


def bundled(
    delta: ResidentDelta, sites: Sequence[Site], numbers: LaunchNumbers, dtype: torch.dtype, outside: Collection[str]
) -> ResidentDelta:
    """What the kernels do not read stays in the delta: factors on the base's columns, terms of rare forms, overrides of
    matrices. `dtype`: the model's. `outside`: tensors whose overrides are applied before or after all layers."""
    layers: dict[str, ResidentLayer] = {}
    overrides = dict(delta.overrides)
    terms: list[list[tuple[FusedTerm, float]]] = []
    for name, rows, own in sites:
        if own is not None:
            override = overrides.pop(name, None)
            terms.append([] if override is None else [(vector(override.apply(own).to(dtype)), 1.0)])
            continue
        layer = delta.layers.get(name)
        terms.append([] if layer is None else _terms(layer, rows))
        if layer is not None:
            others = tuple(term for term in layer.terms if not isinstance(term, FusedTerm))
            if others or layer.factors.cols is not None:
                layers[name] = ResidentLayer(others, layer.gamma, factors=BaseFactors(cols=layer.factors.cols))
    packed = [site for site, (name, *_) in enumerate(sites) if name in layers and layers[name].factors.cols is not None]
    within = not (layers.keys() | overrides.keys()) - set(outside)
    bundle = make_bundle(terms, numbers, packed)
    return replace(delta, layers=layers, overrides=overrides, bundle=bundle, fits_bundle=within)


def _terms(layer: ResidentLayer, rows: int) -> list[tuple[FusedTerm, float]]:
    fused = [(term, layer.gamma) for term in layer.terms if isinstance(term, FusedTerm)]
    if layer.base_shift or layer.factors.rows is not None:
        fused.insert(0, (rescale(rows, 1 + layer.base_shift, layer.factors.rows), 1.0))
    return fused
