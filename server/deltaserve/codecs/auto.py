"""auto: the codec that a user gets who asks for none. Ours.

Without a budget it takes what the tenant needs: the noise of a seeded sketch, ‖N‖ ≈ ‖Δ‖ / √(c · bits) with c ≈ 1, is
to be `noise` of the weights:

    bits = (‖Δ‖ / ‖W_base‖)² / (c · noise²), within 0.015 … 1

Where a budget leaves more noise than that, deltas.prepare looks for one γ that takes less of both (decision 0026).

Below `TURNED_FROM` bits layers are coded by `seeded-vq`; from there on by `higgs`, whose noise falls by 2 a bit, with
log2 √(curvature · mean Δ²) bits more or less than the mean (decisions 0006, 0028). `bits` is a ceiling on the whole
file (deltas.prepare).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltaserve.codecs.base import Codec, LayerStats, Site
from deltaserve.codecs.higgs import Higgs
from deltaserve.codecs.seeded_vq import LEAST_BITS, SeededVq
from deltaserve.codecs.shares import importance, level_out
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Term

LEAST, MOST = 0.015, 1.0
LEAST_FILE, MOST_FILE = 0.003, 4.0
TURNED_FROM, SPREAD = 1.25, 2.0  # bits per parameter
LEAST_TURNED, MOST_TURNED = 0.29, 5.0
EFFICIENCY = 1.05  # c of the seeded quantiser with 12-bit codes


@dataclass(frozen=True)
class Auto:
    bits: float | None = None  # bits per parameter, 0.003 … 4; None: by the tenant
    noise: float = 0.04  # of the weights, in (0, 1]: what decides where bits is None

    needs_sensitivity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits is not None and not LEAST_FILE <= self.bits <= MOST_FILE:
            raise CodecError(f"auto: bits {self.bits:g} is not in 0.003 … 4")
        if not 0 < self.noise <= 1:
            raise CodecError(f"auto: noise {self.noise} is not in (0, 1]")

    @property
    def name(self) -> str:
        return "auto"

    @property
    def needs_gram(self) -> bool:
        return True

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def budget(self, layers: Sequence[LayerStats]) -> float:
        """Bits per parameter of the whole file."""
        if self.bits is not None:
            return self.bits
        needed = _change(layers) ** 2 / (EFFICIENCY * self.noise**2)
        return min(max(needed, LEAST), MOST)

    def noise_of(self, layers: Sequence[LayerStats]) -> float:
        """‖N‖ / ‖W_base‖ that its budget leaves."""
        return _change(layers) / math.sqrt(EFFICIENCY * self.budget(layers))

    def plan(self, layers: Sequence[LayerStats]) -> Mapping[str, Codec]:
        bits = max(self.budget(layers), LEAST_BITS)
        return SeededVq(bits=bits).plan(layers) if bits < TURNED_FROM else _turned(layers, bits)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        """A layer that no plan knows."""
        bits = self.bits or MOST
        return (SeededVq(bits=bits) if bits < TURNED_FROM else Higgs(bits=bits)).encode(delta, site)


def _change(layers: Sequence[LayerStats]) -> float:
    """‖Δ‖ / ‖W_base‖"""
    delta, weights = (math.hypot(*(getattr(layer, part) for layer in layers)) for part in ("norm", "base_norm"))
    return delta / weights if weights else math.inf


def _turned(layers: Sequence[LayerStats], bits: float) -> Mapping[str, Codec]:
    budget = bits * sum(layer.parameters for layer in layers)

    def codecs(shares: Mapping[str, float]) -> dict[str, Higgs]:
        return {name: Higgs(bits=min(max(share, LEAST_TURNED), MOST_TURNED)) for name, share in shares.items()}

    def fits(shares: Mapping[str, float]) -> bool:
        chosen = codecs(shares)
        return sum(chosen[layer.name].cost(layer.rows, layer.cols) for layer in layers) <= budget

    parameters = {layer.name: layer.parameters for layer in layers}
    worth = {layer.name: importance(layer) for layer in layers}
    return dict(codecs(level_out(worth, parameters, bits, SPREAD, fits)))
