"""Definition of the materialised weights, and reference of their tests.

out = round(diag(scale) · W + Σ_j gamma_j · decode(Term_j))        in float32, rounded once, never in place
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltaserve_kernels.terms import Term


def materialize(weight: Tensor, terms: Sequence[tuple[Term, float]], scale: Tensor | float = 1.0) -> Tensor:
    """W [rows, cols], terms with their gamma, scale float32 [rows, 1] or one number → W's dtype."""
    whole = weight.float() * scale
    for term, gamma in terms:
        whole = whole + gamma * term.decode()
    return whole.to(weight.dtype)
