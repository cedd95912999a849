"""What the left factor has to meet once the right one is rounded: Δ ≈ U·A in the metric of H."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DAMP = 1e-3


class Moments(NamedTuple):
    """What U has to meet: ‖(Δ − U·A)·x‖² = power − 2 ⟨cross, U⟩ + tr(U · coupling · Uᵀ), float64."""

    power: Tensor  # [] tr(Δ·H·Δᵀ)
    cross: Tensor  # [rows, r] Δ·H·Aᵀ
    coupling: Tensor  # [r, r] A·H·Aᵀ

    @classmethod
    def of(cls, delta: Tensor, a: Tensor, gram: Tensor | None) -> Moments:
        delta, a = delta.double(), a.double()
        seen, across = (delta, a) if gram is None else (delta @ gram.double(), a @ gram.double())
        return cls((seen * delta).sum(), delta @ across.T, across @ a.T)


def corrected(u: Tensor, moments: Moments) -> Tensor:
    """Ũ, float64 [rows, r]: the least squares of Δ·x over V̂·x, drawn towards U where A·H·Aᵀ says nothing."""
    coupling = moments.coupling
    power = coupling.diagonal()
    ridge = coupling + torch.diag(torch.where(power > 0, DAMP * power, 1))
    correction: Tensor = torch.linalg.solve(ridge, (moments.cross - u @ coupling).T).T
    return u + correction
