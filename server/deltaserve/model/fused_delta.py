"""A delta as the fused kernels read it: everything they can in one block of memory. Made once a delta, at load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deltaserve.deltas.base_factors import BaseFactors
from deltaserve.deltas.resident import ResidentDelta, ResidentLayer
from deltaserve_kernels.fused.bundle import LaunchNumbers, make_bundle
from deltaserve_kernels.fused.parts import FusedTerm, rescale


def bundled(delta: ResidentDelta, sites: Sequence[tuple[str, int]], numbers: LaunchNumbers) -> ResidentDelta:
    """`sites`: name of each weight, and its rows. What the kernels do not read stays in the delta's layers: factors on
    the base's columns, terms of rare forms."""
    layers: dict[str, ResidentLayer] = {}
    terms: list[list[tuple[FusedTerm, float]]] = []
    for name, rows in sites:
        layer = delta.layers.get(name)
        terms.append([] if layer is None else _terms(layer, rows))
        if layer is not None:
            others = tuple(term for term in layer.terms if not isinstance(term, FusedTerm))
            if others or layer.factors.cols is not None:
                layers[name] = ResidentLayer(others, layer.gamma, factors=BaseFactors(cols=layer.factors.cols))
    packed = [site for site, (name, _) in enumerate(sites) if name in layers and layers[name].factors.cols is not None]
    return replace(delta, layers=layers, bundle=make_bundle(terms, numbers, packed))


def _terms(layer: ResidentLayer, rows: int) -> list[tuple[FusedTerm, float]]:
    fused = [(term, layer.gamma) for term in layer.terms if isinstance(term, FusedTerm)]
    if layer.base_shift or layer.factors.rows is not None:
        fused.insert(0, (rescale(rows, 1 + layer.base_shift, layer.factors.rows), 1.0))
    return fused
