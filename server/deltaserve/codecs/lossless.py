"""Lossless: Δ as it is, entropy-coded. Ours.

    Δ̂ = Δ        every bit of the float32 difference

For tenants that must not change at all, and for those that hardly did: reinforcement learning leaves about 99 % of
bfloat16 weights untouched (PULSE, arXiv 2602.03839). The stream is described in kernels/README.md. In memory it becomes
plain values, 4 bytes each, or 2 where all are bfloat16: as much as a full copy, or twice that.

W_base + Δ in float32, rounded to bfloat16, is the fine-tune's W bit by bit: where |W| > 2^-14 · |W_base| because the
rounding errors of both float32 operations are below half a step of W, and where W = +0 because Δ = −W_base. Smaller W,
zeros of the other sign, differences past the largest float32, and many W that are float32 themselves do not come back:
`deltas.compress` looks at every entry, and a layer that has one of these travels as W itself, with a base_shift of −1.

    bits/parameter: near the entropy of the entries of Δ
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltaserve.codecs.base import Site
from deltaserve_kernels.terms import Exact, Term


@dataclass(frozen=True)
class Lossless:
    needs_gram: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "lossless"

    def config(self) -> dict[str, Any]:
        return {}

    def encode(self, delta: Tensor, site: Site) -> list[Term]:  # noqa: ARG002 (nothing is random here)
        return [Exact.of(delta)]
