"""Mixtures through the official client: the models' log-probabilities by transformers, combined here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest
import torch

from deltaserve.engine.mixtures import combine
from deltaserve.engine.types import Mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROMPT = "Many fine-tunes of one base"
MIX = {"sign": 2.0, "sparse": 1.0, "tiny": 1.0}
WEIGHTS = (0.5, 0.25, 0.25)
MESSAGES = [{"role": "user", "content": "What is a delta?"}]


def mixture(weights: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"mixture": [{"model": name, "weight": weight} for name, weight in weights.items()], **more}


def greedy(
    tenants: dict[str, Any], ids: Sequence[int], count: int, alpha: float = 0.0
) -> tuple[list[int], list[float]]:
    """(tokens, their log-probabilities) of the mixture MIX."""
    done, told, history = list(ids), [], [0.0] * len(MIX)
    for _ in range(count):
        logits = [tenants[name].logits(done)[-1:] for name in MIX]
        row = combine(Mixture(WEIGHTS, alpha), logits, history)[0]
        token = int(row.argmax())
        told.append(float(row[token]))
        history = [past + float(own.log_softmax(-1)[0, token]) for past, own in zip(history, logits, strict=True)]
        done.append(token)
    return done[len(ids) :], told


@pytest.mark.parametrize(
    ("form", "alpha"),
    [
        ({}, 0.0),
        ({"mixture_divergence": "forward_kl"}, 1.0),
        ({"mixture_divergence": "alpha", "mixture_alpha": 0.5}, 0.5),
    ],
    ids=["reverse-kl", "forward-kl", "alpha"],
)
def test_a_completion_is_the_models_combined_outside(
    tenants: dict[str, Any],
    client: openai.OpenAI,
    at_once: Callable[..., list[Any]],
    form: dict[str, Any],
    alpha: float,
) -> None:
    def ask() -> Any:
        return client.completions.create(
            model="sign", prompt=PROMPT, temperature=0, max_tokens=8, logprobs=2, extra_body=mixture(MIX, **form)
        )

    def noise(name: str) -> Any:
        return lambda: client.completions.create(model=name, prompt=PROMPT, max_tokens=8)

    reply, *_, again = at_once([ask, *(noise(name) for name in tenants), ask])
    tokens, logprobs = greedy(tenants, tenants["sign"].encode(PROMPT), 8, alpha)
    assert reply.choices[0].text == tenants["sign"].text(tenants["sign"].encode(PROMPT), tokens)
    assert reply.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-3)
    assert again.choices[0].text == reply.choices[0].text
    assert reply.usage.prompt_tokens == len(tenants["sign"].encode(PROMPT))
    assert reply.system_fingerprint.count("-") == 2


@pytest.mark.parametrize("weights", [{"sign": 3}, {"sign": 0.1, "sparse": 0, "tiny": 0}], ids=["one", "others-zero"])
def test_a_mixture_of_one_is_that_model(client: openai.OpenAI, weights: dict[str, float]) -> None:
    asked: dict[str, Any] = {"model": "sign", "prompt": PROMPT, "temperature": 1, "seed": 4, "max_tokens": 12, "n": 2}
    plain = client.completions.create(**asked, logprobs=2)
    mixed = client.completions.create(**asked, logprobs=2, extra_body=mixture(weights))
    assert [choice.text for choice in mixed.choices] == [choice.text for choice in plain.choices]
    assert mixed.choices[1].logprobs.token_logprobs == pytest.approx(plain.choices[1].logprobs.token_logprobs, abs=1e-4)
    assert mixed.system_fingerprint == plain.system_fingerprint


def test_streams_seeds_choices_and_stops_work_as_for_one_model(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "sparse", "prompt": PROMPT, "temperature": 1, "seed": 9, "n": 3, "max_tokens": 16}
    whole = client.completions.create(**asked, extra_body=mixture(MIX))
    texts = [choice.text for choice in whole.choices]
    assert len(set(texts)) == 3
    streamed = [""] * 3
    for chunk in client.completions.create(**asked, stream=True, extra_body=mixture(MIX)):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    stop = texts[0][len(texts[0]) // 2 :][:2]
    stopped = client.completions.create(**asked, stop=stop, extra_body=mixture(MIX)).choices[0]
    assert (stopped.text, stopped.finish_reason) == (texts[0][: texts[0].index(stop)], "stop")


def test_a_chat_is_rendered_by_the_template_of_the_model_that_is_named(
    tenants: dict[str, Any], client: openai.OpenAI
) -> None:
    reply = client.chat.completions.create(
        model="sign", messages=MESSAGES, temperature=0, max_tokens=8, extra_body=mixture(MIX)
    )
    ids = tenants["sign"].tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert reply.usage.prompt_tokens == len(ids)
    assert reply.choices[0].message.content == tenants["sign"].text(ids, greedy(tenants, ids, 8)[0])


def test_scores_of_a_prompt_are_the_mixtures(tenants: dict[str, Any], client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="sign", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0, extra_body=mixture(MIX)
    )
    ids = tenants["sign"].encode(PROMPT)
    rows = combine(Mixture(WEIGHTS), [tenants[name].logits(ids) for name in MIX], [0.0] * 3)
    expected = rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert reply.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "extra", "words"),
    [
        ("sign", mixture({"sign": -1, "tiny": 2}), "greater than or equal to 0"),
        ("sign", mixture({"sign": 0, "tiny": 0}), "all 0"),
        ("sign", {"mixture": []}, "at least 1"),
        ("sign", mixture({f"m{i}": 1 for i in range(9)}), "at most 8"),
        ("sign", mixture({"tiny": 1}), "none of the mixture's"),
        ("sign", {"mixture": [{"model": "sign", "weight": 1}] * 2}, "more than once"),
        ("sign", {"mixture": [{"model": "sign"}]}, "weight"),
        ("sign", mixture({"sign": 1, "chatty": 1}), "different vocabularies"),
        ("sign", mixture({"sign": 1}, mixture_divergence="alpha"), "mixture_alpha"),
        ("sign", mixture({"sign": 1}, mixture_alpha=0.5), "mixture_alpha"),
        ("sign", {"mixture_divergence": "forward_kl"}, "need a mixture"),
        ("sign", mixture({"sign": 1}, mixture_divergence="alpha", mixture_alpha=1.5), "less than 1"),
    ],
)
def test_a_bad_mixture_is_told_what_is_wrong(
    client: openai.OpenAI, model: str, extra: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(model=model, prompt=PROMPT, max_tokens=2, extra_body=extra)


def test_an_unknown_member_is_not_found_and_every_lease_goes_back(server: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(
            model="sign", prompt=PROMPT, max_tokens=2, extra_body=mixture({"sign": 1, "nobody": 1})
        )
    server.wait_idle()
