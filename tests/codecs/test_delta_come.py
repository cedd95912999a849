"""Delta-CoMe: a rank that two bits hold exactly, the groups, the options against each other."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Estimator, Site, decode
from deltaserve.codecs.delta_come import DeltaCome
from deltaserve.codecs.rank_widths import group_bytes
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import LowRank


def fine_tune(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Singular values that fall like a fine-tune's."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, cols)
    left, right = (torch.randn(n, count, generator=generator) for n in (rows, cols))
    return (left * torch.linspace(0, -4, count).exp()) @ right.T / 100


def gram_of(cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return inputs.T @ inputs / len(inputs)


def encode(codec: DeltaCome, delta: Tensor, gram: Tensor | None = None) -> list[LowRank]:
    terms = codec.encode(delta, Site(5, 7, gram))
    assert all(isinstance(term, LowRank) for term in terms)
    return terms  # type: ignore[return-value]


def output_error(delta: Tensor, terms: list[LowRank], gram: Tensor) -> float:
    missed = delta - decode(terms)
    return float(((missed @ gram) * missed).sum() / ((delta @ gram) * delta).sum())


def test_signs_of_one_rank_on_paper() -> None:
    """u = (1, −1, 1, 1)/2, v = (1, 1, −1, 1)/2, σ = 4: one magnitude, so that every width is exact."""
    delta = torch.tensor([[1.0, -1, 1, 1]]).T @ torch.tensor([[1.0, 1, -1, 1]])
    for bits in (1.0, 100.0):
        (term,) = encode(DeltaCome(bits), delta)
        assert term.right.bits == (2 if bits == 1 else 8)
        torch.testing.assert_close(term.decode(), delta)


def test_three_groups_as_many_ranks_as_fit() -> None:
    delta = fine_tune(96, 128)
    terms = encode(DeltaCome(2.0), delta)
    assert [(term.left.bits, term.right.bits) for term in terms] == [(8, 8), (3, 3), (2, 2)]
    ranks = [len(term.s) for term in terms]
    assert ranks[:2] == [1, 2]
    num_bytes = sum(term.nbytes for term in terms)
    assert num_bytes == sum(group_bytes(n, 96, 128, b, b) for n, b in zip(ranks, (8, 3, 2), strict=True))
    assert 8 * num_bytes <= 2 * delta.numel()
    assert all(term.left.row is None and term.right.row is None for term in terms)


@pytest.mark.parametrize("bits", [0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("shape", [(96, 128), (160, 64)], ids=str)
def test_bits_are_a_ceiling(bits: float, group: int | None, shape: tuple[int, int]) -> None:
    terms = encode(DeltaCome(bits, group), fine_tune(*shape))
    one_rank = 8 * group_bytes(1, *shape, 2, 2, group)
    assert 8 * sum(term.nbytes for term in terms) <= max(bits * shape[0] * shape[1], one_rank)


def test_the_papers_groups_of_entries() -> None:
    (*_, last) = encode(DeltaCome(3.0, step_group=32, scale="peak"), fine_tune(96, 128))
    assert last.left.group == last.right.group == 32
    assert last.right.row is not None
    assert last.left.row is not None
    assert (last.right.row.dtype, last.right.row.shape) == (torch.bfloat16, (len(last.s), 4))
    assert last.left.row.shape == (96, -(-len(last.s) // 32))


def test_what_is_not_the_papers_is_better() -> None:
    """At equal bytes: H, least squares, and steps that cost nothing."""
    delta, gram = fine_tune(96, 128), gram_of(128)
    ours = output_error(delta, encode(DeltaCome(1.0), delta, gram), gram)
    assert ours < 0.9 * output_error(delta, encode(DeltaCome(1.0), delta), gram)
    assert ours < 0.9 * output_error(delta, encode(DeltaCome(1.0, scale="peak"), delta, gram), gram)
    assert ours < output_error(delta, encode(DeltaCome(1.0, step_group=32, scale="peak"), delta, gram), gram)


@pytest.mark.parametrize("gram", [None, gram_of(128)], ids=["no gram", "gram"])
def test_unbiased_along_delta_as_the_outputs_see_it(gram: Tensor | None) -> None:
    delta, metric = fine_tune(96, 128), torch.eye(128) if gram is None else gram

    def gain(estimator: Any) -> float:
        decoded = decode(encode(DeltaCome(1.0, estimator=estimator), delta, gram))
        return float(((delta @ metric) * decoded).sum() / ((delta @ metric) * delta).sum())

    assert gain("unbiased") == pytest.approx(1, rel=1e-4)
    assert gain("paper") < 0.99


def test_few_ranks_of_many_alike_are_at_most_doubled() -> None:
    delta = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    paper, unbiased = (decode(encode(DeltaCome(0.2, estimator=e), delta)) for e in get_args(Estimator)[::-1])
    torch.testing.assert_close(unbiased, 2 * paper)


def test_more_bits_less_error() -> None:
    delta = fine_tune(96, 128)
    errors = [CodingError.of(delta, decode(encode(DeltaCome(bits), delta))).relative for bits in (0.25, 0.5, 1.0, 2.0)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 0}, "bits 0"),
        ({"bits": float("inf")}, "bits inf"),
        ({"step_group": 4}, "step_group 4"),
        ({"step_group": 64.0}, "step_group 64.0"),
        ({"scale": "mse"}, "scale 'mse'"),
        ({"estimator": "fair"}, "estimator 'fair'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(CodecError, match=f"delta-come: {said}"):
        DeltaCome(**options)
