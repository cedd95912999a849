"""What a codec is, and the error it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from deltaserve_kernels.terms import Term

Estimator: TypeAlias = Literal["unbiased", "paper"]  # of scales: ⟨Δ, Δ̂⟩ = ‖Δ‖² over a scale's span, or the paper's


@dataclass(frozen=True)
class Site:
    """Where a matrix sits: what a codec may know of it besides its entries."""

    number: int  # 32 bit, deltaserve_kernels.terms.site_number of the tensor's name
    seed: int  # 64 bit, one for the whole artifact
    gram: Tensor | None = None  # H = E[xᵀx] of the layer's input x, float32 [cols, cols]; None where not calibrated


class Codec(Protocol):
    """One method of the literature, or ours.

    Frozen, validated configuration on construction (CodecError names the field and its range). `encode` is pure and
    deterministic for a site; its input is finite float32 [rows, cols] and is not changed. A codec that `needs_gram` may
    still meet a site without one (a layer the calibration does not reach): then H = 1, plain least squares.
    """

    @property
    def needs_gram(self) -> bool: ...

    @property
    def name(self) -> str: ...

    def encode(self, delta: Tensor, site: Site) -> list[Term]: ...

    def config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LayerStats:
    """One compressed layer, as a whole model's plan sees it."""

    name: str
    rows: int
    cols: int
    norm: float  # ‖Δ‖_F
    std: float  # of the entries of Δ
    base_norm: float  # ‖W_base‖_F
    sensitivity: float | None = None  # curvature of the loss in an entry of Δ, mean over the layer; None: not measured

    @property
    def parameters(self) -> int:
        return self.rows * self.cols


@runtime_checkable
class Planner(Protocol):
    """A codec whose configuration differs by layer: it sees all layers before the first is encoded."""

    needs_sensitivity: ClassVar[bool]

    def plan(self, layers: Sequence[LayerStats]) -> Mapping[str, Codec]: ...


@dataclass(frozen=True)
class CodingError:
    """How well Δ̂ stands for Δ.

    relative  ‖Δ − Δ̂‖ / ‖Δ‖
    gain      ⟨Δ, Δ̂⟩ / ‖Δ‖², 1 where the code is unbiased along Δ
    cosine    ⟨Δ, Δ̂⟩ / (‖Δ‖ ‖Δ̂‖)
    """

    relative: float
    gain: float
    cosine: float

    @classmethod
    def of(cls, delta: Tensor, decoded: Tensor) -> CodingError:
        a, b = delta.double().flatten(), decoded.double().flatten()
        norm2, decoded2, dot = float(a @ a), float(b @ b), float(a @ b)
        residual = a - b
        residual2 = float(residual @ residual)
        if norm2 == 0:
            return cls(0.0 if decoded2 == 0 else float("inf"), 1.0, 1.0)
        cosine = dot / (norm2 * decoded2) ** 0.5 if decoded2 else 0.0
        return cls((residual2 / norm2) ** 0.5, dot / norm2, cosine)


def decode(terms: Sequence[Term]) -> Tensor:
    """Δ̂ = Σ_j Term_j, float32 [rows, cols]. `terms` has at least one term."""
    total = terms[0].decode()
    for term in terms[1:]:
        total = total + term.decode()
    return total
