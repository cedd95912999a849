"""A mixture in a batch ≡ its models' own log-probabilities, each asked alone, combined outside; by either decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.engine.mixtures import combine
from deltaserve.engine.types import Mixture, Row
from deltaserve.errors import BadRequest, DeltaLoadFailed

from .town import CODECS, PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deltaserve.engine.types import Request

    from .town import Town

NAMES = ["sign", "svd", None]
WEIGHTS = (0.5, 0.2, 0.3)
TOKENS = 6


def ask(
    town: Town, names: Sequence[str | None], weights: Sequence[float], alpha: float = 0.0, **params: Any
) -> Request:
    request = town.ask(names[0], max_tokens=TOKENS, **params)
    request.others = tuple(Row(digest=None if n is None else town.named(n).active.digest) for n in names[1:])
    request.mixture = Mixture(tuple(weights), alpha)
    return request


def outside(town: Town, answer: list[int], names: Sequence[str | None], alpha: float) -> list[torch.Tensor]:
    """The mixture's log-probabilities at each token of `answer`, from each model's own logits."""
    history, found = [0.0] * len(names), []
    for place, token in enumerate(answer):
        own = []
        for name in names:
            single = town.ask(name, prompt=[*PROMPT, *answer[:place]], max_tokens=1)
            town.run(single)
            own.append(town.logits(single))
        found.append(combine(Mixture(WEIGHTS, alpha), own, history)[0])
        history = [past + float(o.log_softmax(-1)[0, token]) for past, o in zip(history, own, strict=True)]
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0], ids=["reverse-kl", "alpha", "forward-kl"])
def test_a_mixture_is_its_models_combined_outside(make_town: Callable[..., Town], alpha: float) -> None:
    town = make_town(budget=20)
    mixed = ask(town, NAMES, WEIGHTS, alpha)
    noise = [town.ask(name) for name in (*CODECS, None)]
    town.run(noise[0], mixed, *noise[1:], ask(town, ["svd", "sparse"], (0.5, 0.5)))
    answer = town.answer(mixed)
    for row, expected in zip(town.logits(mixed), outside(town, answer, NAMES, alpha), strict=True):
        assert float((row - expected).abs().max()) <= 1e-4
    assert [int(row.argmax()) for row in town.logits(mixed)] == answer


def test_a_mixture_is_none_of_its_models(make_town: Callable[..., Town]) -> None:
    town = make_town()
    mixed = ask(town, NAMES, WEIGHTS)
    singles = [town.ask(name) for name in NAMES]
    town.run(mixed, *singles)
    for single in singles:
        assert float((town.logits(mixed)[0] - town.logits(single)[0].log_softmax(-1)).abs().max()) > 0.01


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_model_with_itself_is_that_model(make_town: Callable[..., Town], alpha: float) -> None:
    town = make_town()
    single, twice = town.ask("sign"), ask(town, ["sign", "sign"], (0.3, 0.7), alpha)
    town.run(single, twice)
    assert town.answer(twice) == town.answer(single)
    torch.testing.assert_close(town.logits(twice), town.logits(single).log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_preempted_mixture_goes_on_with_the_same_tokens(make_town: Callable[..., Town], alpha: float) -> None:
    town = make_town()
    single = ask(town, NAMES, WEIGHTS, alpha, temperature=1.0, seed=5)
    town.run(single)
    crowded = make_town(num_blocks=9 if town.model.runtime["decoder"] == "native" else 18)
    for name in CODECS:
        crowded.run(crowded.ask(name, max_tokens=1))
    again = ask(crowded, NAMES, WEIGHTS, alpha, temperature=1.0, seed=5)
    crowded.run(crowded.ask("sparse"), again, *(crowded.ask(name) for name in ("grown", None)))
    assert crowded.scheduler.num_preemptions > 0
    assert crowded.answer(again) == town.answer(single)


def test_two_mixtures_that_compete_for_the_slots_both_run(make_town: Callable[..., Town]) -> None:
    town = make_town(max_deltas=2)
    pairs = [("sign", "svd"), ("svd", "sparse"), ("sparse", "sign")]
    mixed = [ask(town, pair, (0.5, 0.5)) for pair in pairs]
    town.run(*mixed, *(town.ask(name) for name in (*CODECS, None)))
    assert [len(town.answer(request)) for request in mixed] == [TOKENS] * 3


def test_a_member_that_does_not_load_fails_the_mixture_and_nobody_else(make_town: Callable[..., Town]) -> None:
    town = make_town()
    path = town.path("svd")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    mixed, good = ask(town, NAMES, WEIGHTS), town.ask("sign")
    town.run(mixed, good)
    assert isinstance(town.errors[mixed.id], DeltaLoadFailed)
    assert (mixed.num_generated, len(town.answer(good))) == (0, TOKENS)


def test_a_mixture_of_more_than_the_device_holds_is_refused(make_town: Callable[..., Town]) -> None:
    town = make_town(max_deltas=1)
    mixed = ask(town, ["sign", "svd"], (0.5, 0.5))
    town.run(mixed, town.ask("sign"))
    assert isinstance(town.errors[mixed.id], BadRequest)
    said = "2 models do not fit on the device at once"
    assert said in str(town.errors[mixed.id])


def test_a_mixture_of_more_bytes_than_the_device_holds_is_refused(
    make_town: Callable[..., Town],
) -> None:
    """Sizes are known after a load: the second one finds no room, waits on the host, and the mixture ends."""
    town = make_town()
    size = {}
    for name in ("sign", "svd"):
        town.run(town.ask(name, max_tokens=1))
        digest = town.named(name).active.digest
        size[name] = town.residency.resident_bytes(digest) or 0
    small: Town = make_town(device_bytes=max(size.values()))
    mixed = ask(small, ["sign", "svd"], (0.5, 0.5))
    small.run(mixed, small.ask("sign"))
    assert "2 models do not fit" in str(small.errors[mixed.id])


def test_a_cancelled_mixture_gives_everything_back(make_town: Callable[..., Town]) -> None:
    town = make_town()
    mixed, stays = ask(town, NAMES, WEIGHTS), town.ask("sign")
    for request in (mixed, stays):
        town.scheduler.add(request)
    while mixed.num_generated < 2:
        town.ready.clear()
        if not town.step():
            assert town.ready.wait(20)
    town.scheduler.remove(mixed)
    town.run()
    assert all((row.blocks, row.pinned) == ([], False) for row in mixed.rows)
    assert len(town.answer(stays)) == TOKENS


def test_prompt_logprobs_are_the_mixtures(make_town: Callable[..., Town]) -> None:
    town = make_town(budget=9)
    mixed = ask(town, NAMES, WEIGHTS, prompt_logprobs=True, logprobs=0)
    town.run(mixed)
    assert [report.token_id for report in mixed.prompt_reports] == PROMPT[1:]
    heads = []
    for name in NAMES:
        single = town.ask(name, prompt=PROMPT[:-1], max_tokens=1)
        town.run(single)
        heads.append(town.logits(single))
    expected = combine(Mixture(WEIGHTS), heads, [0.0] * 3)[0, PROMPT[-1]]
    assert mixed.prompt_reports[-1].logprob == pytest.approx(float(expected), abs=1e-4)
