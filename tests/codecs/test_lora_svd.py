"""LoRA-SVD: numbers to check on paper, and the best error of its rank where the inputs are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.codecs.lora_svd import DAMP, LoraSvd
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import LowRank

# Orthogonal rows: σ = 4, 2
PAPER_SIZED = torch.tensor([[2.0, 2, 2, 2], [1, -1, 1, -1]])


def encode(codec: LoraSvd, delta: Tensor, gram: Tensor | None = None) -> LowRank:
    (term,) = codec.encode(delta, Site(number=5, seed=7, gram=gram))
    assert isinstance(term, LowRank)
    return term


def matrix(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))


def correlated(cols: int) -> Tensor:
    """float32 [cols, cols]: a few inputs much larger than the others."""
    x = matrix(4 * cols, cols) * torch.logspace(0, 1.5, cols)
    return x.T @ x / len(x)


def output_error(delta: Tensor, decoded: Tensor, gram: Tensor) -> float:
    """tr((Δ − Δ̂)·H·(Δ − Δ̂)ᵀ)"""
    error = (delta - decoded).double()
    return float(((error @ gram.double()) * error).sum())


def damped(gram: Tensor) -> Tensor:
    return gram + DAMP * gram.diagonal().mean() * torch.eye(len(gram))


def test_rank_one_on_paper() -> None:
    """σ₁ = 4, u₁ = (1, 0), v₁ = (½, ½, ½, ½): B = 2 u₁, A = 2 v₁."""
    term = encode(LoraSvd(rank=1), PAPER_SIZED)
    assert term.left.codes.abs().tolist() == [[2], [0]]
    assert term.right.codes.abs().tolist() == [[1, 1, 1, 1]]
    assert term.s.tolist() == [1]
    assert term.decode().tolist() == [[2, 2, 2, 2], [0, 0, 0, 0]]


def test_inputs_decide_which_direction_stays() -> None:
    """Δ = diag(2, 1): with the second input ten times as large, the second direction moves the output more."""
    delta = torch.diag(torch.tensor([2.0, 1]))
    plain = encode(LoraSvd(rank=1), delta)
    torch.testing.assert_close(plain.decode(), torch.diag(torch.tensor([2.0, 0])), rtol=2**-7, atol=0)
    seen = encode(LoraSvd(rank=1), delta, torch.diag(torch.tensor([1.0, 100])))
    assert seen.decode().tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("shape", [(20, 48), (48, 20)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_output_error_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    delta, gram = matrix(*shape), correlated(shape[1])
    weighted = delta.double() @ torch.linalg.cholesky(damped(gram).double())
    best = float(torch.linalg.svdvals(weighted)[rank:].square().sum())
    decoded = encode(LoraSvd(rank=rank), delta, gram).decode()
    assert output_error(delta, decoded, damped(gram)) == pytest.approx(best, rel=0.01)
    plain = encode(LoraSvd(rank=rank), delta).decode()
    assert output_error(delta, decoded, gram) < output_error(delta, plain, gram)


def test_without_calibration_it_is_delta_svd() -> None:
    delta = matrix(20, 48)
    site = Site(number=5, seed=7)
    plain, lora = decode(DeltaSvd(rank=6).encode(delta, site)), encode(LoraSvd(rank=6), delta).decode()
    assert float((plain - lora).norm() / plain.norm()) < 2**-7  # bfloat16 factors


def test_dead_inputs_leave_plain_least_squares() -> None:
    delta = matrix(6, 9)
    assert torch.equal(encode(LoraSvd(rank=2), delta, torch.zeros(9, 9)).decode(), encode(LoraSvd(2), delta).decode())


def test_the_factors_are_balanced_bfloat16_in_peft_shapes() -> None:
    term = encode(LoraSvd(rank=3), matrix(20, 48), correlated(48))
    b, a = term.left.codes, term.right.codes
    assert (b.shape, a.shape, b.dtype, a.dtype) == ((20, 3), (3, 48), torch.bfloat16, torch.bfloat16)
    assert term.s.tolist() == [1, 1, 1]
    torch.testing.assert_close(b.float().norm(dim=0), a.float().norm(dim=1), rtol=0.01, atol=0)


@pytest.mark.parametrize("exponent", [-41, 41, 80])
def test_any_power_of_two_only_moves_exponents(exponent: int) -> None:
    delta = matrix(20, 48)
    scaled = encode(LoraSvd(rank=3), delta * 2.0**exponent).decode()
    assert torch.equal(scaled * 2.0**-exponent, encode(LoraSvd(rank=3), delta).decode())


@pytest.mark.parametrize("bits", [1.0, 2.5, 6.0])
def test_bits_give_the_largest_rank_that_fits(bits: float) -> None:
    delta = matrix(64, 96)
    rank = len(encode(LoraSvd(bits=bits), delta).s)
    assert 8 * encode(LoraSvd(rank=rank), delta).nbytes <= bits * delta.numel()
    assert 8 * encode(LoraSvd(rank=rank + 1), delta).nbytes > bits * delta.numel()


def test_defaults_and_the_command_lines_budget() -> None:
    assert make_codec("lora-svd") == LoraSvd(rank=16)
    assert make_codec("lora-svd", Budget(rank=4)) == LoraSvd(rank=4)
    assert make_codec("lora-svd", Budget(bits=0.5)) == LoraSvd(bits=0.5)
    assert make_codec("lora-svd", None, {"bits": 0.01}) == LoraSvd(bits=0.01)


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (Budget(), {"rank": 4, "bits": 1.0}, ["exactly one of rank, bits"]),
        (Budget(rank=4), {"bits": 1.0}, ["exactly one of rank, bits"]),
        (Budget(rank=0), {}, ["rank 0", "≥ 1"]),
        (Budget(), {"rank": 2.5}, ["rank 2.5", "≥ 1"]),
        (Budget(), {"bits": float("nan")}, ["bits nan", "> 0"]),
        (Budget(bits=0.11), {}, ["--bits 0.11", "0.1114", "192 × 576"]),
        (Budget(energy=0.5), {}, ["--energy"]),
    ],
)
def test_what_is_refused(budget: Budget, options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec("lora-svd", budget, options)
    assert all(part in caught.value.message for part in says)
