"""Linear algebra that several codecs need."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Round: TypeAlias = Callable[[Tensor, int], Tensor]  # values of column j, float32 [rows] → their levels


class Svd(NamedTuple):
    """Δ = u · diag(sigma) · vt, float64: [rows, k], [k] descending, [k, cols]; k: the σ above rounding, or 1."""

    u: Tensor
    sigma: Tensor
    vt: Tensor


def svd(delta: Tensor) -> Svd:
    """By the eigenvectors of the smaller Gram matrix, n × n in float64, whose eigenvalues are known to n · 2^-52 of the
    largest: singular values under √n · 2^-26 of the largest are lost."""
    rows, cols = delta.shape
    wide = delta.double() if rows <= cols else delta.double().T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    power, near = values.flip(0).clamp(min=0), vectors.flip(1)  # σ² descending; [small, small]
    rank = int((power > power[0] * len(power) * torch.finfo(torch.float64).eps).sum()) or 1
    sigma, near = power[:rank].sqrt(), near[:, :rank]
    far = (wide.T @ near) / sigma.clamp(min=torch.finfo(torch.float64).tiny)  # [large, rank]
    u, v = (near, far) if rows <= cols else (far, near)
    return Svd(u, sigma, v.T)


def gptq(
    weight: Tensor, gram: Tensor | None, fit: Callable[[Tensor, int], Round], *, group: int, damp: float = 0.01
) -> Tensor:
    """Column by column, each column's rounding error moved onto the columns not yet rounded (Frantar et al., arXiv
    2210.17323, with H = `gram` + damp · mean(diag H) · 1; no reordering of columns). → Ŵ float32 [rows, cols]

    weight float32 [rows, cols]; gram float32 [cols, cols] or None (1: plain rounding). Every `group` columns,
    `fit(block, j)` sees the columns j … as they are by then and gives the rounding of the group's columns.
    """
    rest, decoded = weight.clone(), torch.empty_like(weight)
    upper = None if gram is None else inverse_factor(gram, damp)
    for start in range(0, weight.shape[1], group):
        stop = min(start + group, weight.shape[1])
        round_column = fit(rest[:, start:stop], start)
        errors = torch.zeros(len(weight), stop - start)
        for j in range(start, stop):
            decoded[:, j] = round_column(rest[:, j], j)
            if upper is not None:
                error = (rest[:, j] - decoded[:, j]) / upper[j, j]
                rest[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
                errors[:, j - start] = error
        if upper is not None:
            rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return decoded


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper triangular U with UᵀU = (H + damp · mean(diag H) · 1)⁻¹, float32 [cols, cols]."""
    inverse = torch.cholesky_inverse(lower_factor(gram, damp))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def lower_factor(gram: Tensor, damp: float) -> Tensor:
    """Lower triangular L with LLᵀ = H + damp · mean(diag H) · 1, float64 [cols, cols]; H = 0 counts as 1."""
    wide = gram.double()
    mean = wide.diagonal().mean()
    floor = mean * damp if mean > 0 else torch.ones((), dtype=torch.float64)
    lower: Tensor = torch.linalg.cholesky(wide + floor * torch.eye(len(wide), dtype=torch.float64))
    return lower
