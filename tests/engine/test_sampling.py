"""Each parameter against a slow reference written from its definition, and what a neighbour must not change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deltaserve.engine.sampling import Generators, sample, token_logprobs
from deltaserve.engine.types import Request, SamplingParams
from deltaserve.ids import RequestId

V = 12
EOS = 2


class Mute:
    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:  # noqa: ARG002
        return "", None

    def finish(self) -> str:
        return ""


class Fixed(Generators):
    """Gives the numbers it is told to."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self._numbers = list(numbers)

    def uniform(self, request: Request) -> float:  # noqa: ARG002
        return self._numbers.pop(0)


def make_request(prompt: tuple[int, ...] = (1, 3, 3), generated: tuple[int, ...] = (), **params: Any) -> Request:
    params.setdefault("max_tokens", 10)
    request = Request(
        id=RequestId("r"),
        digest=None,
        prompt_ids=list(prompt),
        params=SamplingParams(**params),
        eos_ids=frozenset({EOS}),
        vocab_size=V,
        sink=Mute(),
        emit=lambda event: None,
    )
    request.tokens += generated
    return request


def logits_of(seed: int, rows: int = 1, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def reference(logits: list[float], request: Request) -> list[float]:
    """The distribution that a request draws from, in Python floats, step by step; ties go to the lower id."""
    p, values = request.params, list(logits)
    for token, bias in p.logit_bias:
        values[token] += bias
    if request.num_generated < p.min_tokens:
        for token in (*request.eos_ids, *p.stop_token_ids):
            values[token] = -math.inf
    generated = request.tokens[len(request.prompt_ids) :]
    for token in set(request.tokens):
        values[token] *= 1 / p.repetition_penalty if values[token] > 0 else p.repetition_penalty
    for token in set(generated):
        values[token] -= p.presence_penalty + p.frequency_penalty * generated.count(token)
    top = max(values)
    if p.temperature == 0:
        return [float(token == values.index(top)) for token in range(len(values))]
    weights = [math.exp((value - top) / p.temperature) for value in values]
    order = sorted(range(len(values)), key=lambda token: (-weights[token], token))
    kept = [token for token in order if weights[token] >= p.min_p * max(weights)]
    kept = kept[: p.top_k or None]
    total, nucleus, mass = sum(weights[token] for token in kept), [], 0.0
    for token in kept:
        if mass >= p.top_p * total:
            break
        nucleus.append(token)
        mass += weights[token]
    return [weights[token] / mass if token in nucleus else 0.0 for token in range(len(values))]


def distribution(logits: torch.Tensor, request: Request, points: int = 2000) -> list[float]:
    """How often each token is drawn over evenly spread uniform numbers: the distribution up to 1/points."""
    numbers = [(i + 0.5) / points for i in range(points)]
    drawn = sample(logits.expand(points, -1), [request] * points, Fixed(*numbers))
    counts = torch.tensor([one.token_id for one in drawn]).bincount(minlength=logits.shape[-1])
    return (counts / points).tolist()


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": V},
    {"top_k": 100},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.7},
    {"logit_bias": ((0, 3.0), (5, -100.0))},
    {"min_tokens": 5},
    {"min_tokens": 5, "stop_token_ids": (4, 7)},
    {"min_tokens": 2},
    {"top_k": 5, "top_p": 0.8},
    {"top_k": 4, "min_p": 0.05, "temperature": 0.7},
    {"top_p": 0.7, "min_p": 0.02, "temperature": 1.5, "presence_penalty": 0.4},
    {
        "top_k": 6,
        "top_p": 0.95,
        "temperature": 0.8,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "logit_bias": ((3, 2.0),),
        "min_tokens": 8,
    },
]


@pytest.mark.parametrize("params", CASES, ids=lambda params: "-".join(params) or "plain")
def test_the_distribution_drawn_from_is_the_one_that_is_defined(params: dict[str, Any]) -> None:
    request = make_request(generated=(4, 4, 9), **params)
    for seed in range(2):
        logits = logits_of(seed)
        expected = reference(logits[0].tolist(), request)
        found = distribution(logits, request)
        assert found == pytest.approx(expected, abs=1 / 900)
        assert all(weight > 0 for weight, share in zip(expected, found, strict=True) if share)


@pytest.mark.parametrize("params", CASES, ids=lambda params: "-".join(params) or "plain")
def test_greedy_takes_the_largest_changed_logit(params: dict[str, Any]) -> None:
    request = make_request(generated=(4, 4, 9), **{**params, "temperature": 0.0})
    for seed in range(10):
        logits = logits_of(seed)
        expected = reference(logits[0].tolist(), request)
        assert expected[sample(logits, [request], Generators())[0].token_id] == 1


def test_greedy_is_the_exact_argmax_and_of_equal_ones_the_first() -> None:
    logits = torch.zeros(1, V)
    logits[0, [4, 8]] = 1.0
    assert sample(logits, [make_request(temperature=0.0)], Fixed())[0].token_id == 4
    logits[0, 8] = 1.0 + 2**-23
    assert sample(logits, [make_request(temperature=0.0)], Fixed())[0].token_id == 8


def test_of_equal_logits_top_k_and_top_p_keep_as_many_as_they_say() -> None:
    logits = torch.zeros(1, V)
    assert distribution(logits, make_request(top_k=3), 600)[:4] == pytest.approx([1 / 3] * 3 + [0])
    assert distribution(logits, make_request(top_p=0.25), 600)[:4] == pytest.approx([1 / 3] * 3 + [0])


def test_min_tokens_lets_the_end_through_once_they_are_there() -> None:
    logits = torch.zeros(1, V)
    logits[0, EOS] = 50.0
    early, late = (make_request(generated=(5,) * n, min_tokens=3, temperature=0.0) for n in (2, 3))
    assert sample(logits, [early], Generators())[0].token_id != EOS
    assert sample(logits, [late], Generators())[0].token_id == EOS


def test_a_stop_token_beyond_the_vocabulary_bans_nothing() -> None:
    request = make_request(min_tokens=3, stop_token_ids=(V + 5,), temperature=0.0)
    request.eos_ids = frozenset()
    logits = logits_of(1)
    assert sample(logits, [request], Generators())[0].token_id == int(logits.argmax())


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 11 degrees of freedom: 31.3 is the 0.1 % point, and the seed is fixed."""
    draws, request, generators = 3000, make_request(seed=1234), Generators()
    logits = logits_of(3, scale=1.0)
    counts = [0] * V
    for _ in range(draws):
        counts[sample(logits, [request], generators)[0].token_id] += 1
    expected = [draws * weight for weight in reference(logits[0].tolist(), request)]
    assert sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True)) < 31.3


def test_a_seeded_request_draws_the_same_alone_and_among_others() -> None:
    own = logits_of(5, rows=20)

    def draws(neighbours: int, vocabulary: int) -> list[int]:
        generators, request, drawn = Generators(), make_request(seed=99, top_p=0.95), []
        others = [make_request(seed=i, top_k=i) for i in range(neighbours)]
        for step in range(20):
            rows = torch.full((neighbours + 1, vocabulary), -torch.inf)
            rows[:, :V] = logits_of(step, rows=neighbours + 1)
            rows[neighbours // 2, :V] = own[step]
            batch = [*others[: neighbours // 2], request, *others[neighbours // 2 :]]
            drawn.append(sample(rows, batch, generators)[neighbours // 2].token_id)
        return drawn

    alone = draws(0, V)
    assert len(set(alone)) > 3
    assert draws(1, V) == draws(4, V) == draws(7, V + 5) == alone


def test_an_unseeded_request_is_drawn_anew() -> None:
    logits = torch.zeros(1, 4096)
    drawn = {sample(logits, [make_request()], Generators())[0].token_id for _ in range(12)}
    assert len(drawn) > 1


def test_a_seed_is_forgotten_with_its_request() -> None:
    generators, request, logits = Generators(), make_request(seed=7), torch.zeros(1, 4096)
    first = sample(logits, [request], generators)[0].token_id
    assert sample(logits, [request], generators)[0].token_id != first
    generators.forget(request)
    generators.forget(request)
    assert sample(logits, [request], generators)[0].token_id == first


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53], ids=["lowest", "middle", "highest"])
@pytest.mark.parametrize("params", [{}, {"top_k": V + 1}, {"top_p": 0.999}, {"min_p": 1e-9}], ids=str)
def test_padding_of_the_vocabulary_is_never_drawn(uniform: float, params: dict[str, Any]) -> None:
    for seed in range(30):
        logits = torch.full((1, V + 8), -torch.inf)
        logits[:, 3 : V - 1] = logits_of(seed)[:, 3 : V - 1]
        token = sample(logits, [make_request(**params)], Fixed(uniform))[0].token_id
        assert 3 <= token < V - 1


@pytest.mark.parametrize("damage", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_flagged_and_its_neighbours_are_untouched(
    damage: float, temperature: float
) -> None:
    logits = logits_of(2, rows=3)
    requests = [make_request(temperature=temperature, seed=i, logprobs=2) for i in range(3)]
    clean = sample(logits, requests, Generators())
    logits[1, 4] = damage
    found = sample(logits, requests, Generators())
    assert [one.finite for one in found] == [True, False, True]
    assert [found[0], found[2]] == [clean[0], clean[2]]


def test_a_top_p_that_rounds_to_nothing_leaves_the_most_likely() -> None:
    logits = logits_of(3)
    [one] = sample(logits, [make_request(temperature=1.0, top_p=5e-324)], Fixed(0.99))
    assert (one.finite, one.token_id) == (True, int(logits.argmax()))


def test_a_row_that_its_parameters_made_infinite_is_flagged_and_draws_a_token_that_there_is() -> None:
    hostile = make_request(temperature=1.0, repetition_penalty=5e-324)
    [one] = sample(logits_of(1), [hostile], Fixed(0.5))
    assert (one.finite, one.token_id in range(V)) == (False, True)


def test_a_row_without_any_possible_token_is_flagged() -> None:
    logits = logits_of(2, rows=2)
    logits[0] = -torch.inf
    found = sample(logits, [make_request(seed=1), make_request(seed=2)], Generators())
    assert [one.finite for one in found] == [False, True]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_those_of_the_logits_as_the_model_gave_them(temperature: float) -> None:
    logits = logits_of(4)
    before = logits.clone()
    request = make_request(
        generated=(3,),
        temperature=temperature,
        logprobs=4,
        logit_bias=((6, 5.0),),
        presence_penalty=1.0,
        top_k=2,
        seed=3,
    )
    found = sample(logits, [request], Generators())[0]
    assert torch.equal(logits, before)
    expected = logits[0].log_softmax(-1)
    assert found.logprob is not None
    assert found.logprob.token_id == found.token_id
    assert found.logprob.logprob == pytest.approx(float(expected[found.token_id]))
    assert [token for token, _ in found.logprob.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in found.logprob.top] == pytest.approx(expected.topk(4).values.tolist())


def test_each_row_gets_as_many_logprobs_as_it_asked_for() -> None:
    logits = logits_of(1, rows=4)
    reports = token_logprobs(logits, [0, 1, 2, 3], [None, 0, 2, 5])
    assert [None if report is None else len(report.top) for report in reports] == [None, 0, 2, 5]
    assert token_logprobs(logits[:0], [], []) == []
