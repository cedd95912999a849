"""One budget shared out among layers in proportion to what each is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from deltaserve.codecs.base import LayerStats

ROUNDS = 40


def share_out(
    worth: Mapping[str, float],
    bits: float,
    spread: float,
    fits: Callable[[Mapping[str, float]], bool],
) -> dict[str, float]:
    """Bits per parameter by layer: m · worth / mean worth · `bits`, within 1 / spread … spread times `bits`, for the
    largest m of a bisection for which `fits`; the least shares where none does."""
    mean = sum(worth.values()) / max(len(worth), 1) or 1.0

    def shares(multiplier: float) -> dict[str, float]:
        return {n: min(max(multiplier * w / mean, 1 / spread), spread) * bits for n, w in worth.items()}

    low, high, chosen = 0.0, 64.0, shares(0.0)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if fits(tried := shares(middle)):
            low, chosen = middle, tried
        else:
            high = middle
    return chosen


def level_out(
    worth: Mapping[str, float],
    parameters: Mapping[str, int],
    bits: float,
    spread: float,
    fits: Callable[[Mapping[str, float]], bool],
) -> dict[str, float]:
    """Bits per parameter by layer where noise falls by 2 a bit: m + log2(worth), within `spread` bits of m in the mean,
    for the largest m of a bisection for which `fits`; what makes Σ worth² · 4^−bits · parameters least."""
    logs = {name: math.log2(value) if value > 0 else -math.inf for name, value in worth.items()}
    known = {name: log for name, log in logs.items() if math.isfinite(log)}
    total = sum(parameters[name] for name in known) or 1
    mean = sum(log * parameters[name] for name, log in known.items()) / total

    def shares(offset: float) -> dict[str, float]:
        return {name: bits + offset + min(max(log - mean, -spread), spread) for name, log in logs.items()}

    low, high = -bits - spread, spread + 1.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(shares(middle)) else (low, middle)
    return shares(low)


def importance(layer: LayerStats) -> float:
    """√(curvature · mean Δ²); without a measured curvature, of Δ against the layer's own weights."""
    if layer.sensitivity is not None:
        return float((layer.sensitivity * layer.norm**2 / layer.parameters) ** 0.5)
    return layer.norm / layer.base_norm if layer.base_norm else 1.0
