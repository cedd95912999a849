"""Reported log-probabilities are those of a forward pass of transformers, and echo shows the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Ask = Callable[..., Any]

PROMPT = "Many fine-tunes of one base"
CLOSE = {"abs": 1e-3}


def _best(tenant: Any, row: Any, count: int) -> dict[str, float]:
    """As the wire has it: by the token's text; of tokens with the same text the least likely one is kept."""
    top = row.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return {tenant.tokenizer.decode([token]): value for token, value in pairs}


@pytest.mark.parametrize("name", ["tiny", "sign", "sparse", "lowrank", "chatty"])
def test_prompt_and_answer_are_scored_as_by_transformers(name: str, tenants: dict[str, Any], complete: Ask) -> None:
    tenant = tenants[name]
    prompt = tenant.encode(PROMPT)
    new = tenant.greedy(prompt, 8)[1]
    ids = [*prompt, *new]
    expected = tenant.logits(ids).log_softmax(-1)

    choice = complete(name, max_tokens=8, echo=True, logprobs=4).choices[0]

    scores = choice.logprobs
    assert scores.tokens == [tenant.tokenizer.decode([token]) for token in ids]
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    for place, token in enumerate(ids[1:], start=1):
        assert scores.token_logprobs[place] == pytest.approx(expected[place - 1, token].item(), **CLOSE)
        assert scores.top_logprobs[place] == pytest.approx(_best(tenant, expected[place - 1], 4), **CLOSE)
    assert scores.text_offset[: len(prompt)] == [len(tenant.tokenizer.decode(ids[:end])) for end in range(len(prompt))]


def test_a_long_prompt_is_scored_across_blocks_and_steps(tenants: dict[str, Any], complete: Ask) -> None:
    tenant = tenants["sparse"]
    ids = tenant.encode("A delta is small, and so it is compressed. " * 14)[:480]
    expected = tenant.logits(ids).log_softmax(-1)[:-1].gather(1, expected_index(ids)).flatten().tolist()
    scores = complete("sparse", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    assert scores.token_logprobs[1:] == pytest.approx(expected, **CLOSE)


def expected_index(ids: list[int]) -> Any:
    import torch

    return torch.tensor(ids[1:])[:, None]


def test_log_probabilities_are_those_before_bias_and_temperature(tenants: dict[str, Any], complete: Ask) -> None:
    tenant = tenants["tiny"]
    token = tenant.tokenizer.convert_tokens_to_ids("q")
    row = tenant.logits(tenant.encode(PROMPT))[-1].log_softmax(-1)
    reply = complete(max_tokens=1, logprobs=1, logit_bias={token: 100}, temperature=1.7, frequency_penalty=1)
    assert reply.choices[0].logprobs.token_logprobs == [pytest.approx(row[token].item(), **CLOSE)]


def test_chat_log_probabilities_have_bytes_and_alternatives(tenants: dict[str, Any], client: Any) -> None:
    tenant = tenants["sign"]
    messages = [{"role": "user", "content": "Hello"}]
    ids = tenant.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    new = tenant.greedy(ids, 5)[1]
    expected = tenant.logits([*ids, *new]).log_softmax(-1)[len(ids) - 1 :]

    reply = client.chat.completions.create(
        model="sign", messages=messages, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )

    content = reply.choices[0].logprobs.content
    assert len(content) == len(new)
    for place, (entry, token) in enumerate(zip(content, new, strict=True)):
        assert entry.token == tenant.tokenizer.decode([token])
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == pytest.approx(expected[place, token].item(), **CLOSE)
        tops = [alternative.logprob for alternative in entry.top_logprobs]
        assert tops == pytest.approx(expected[place].topk(3).values.tolist(), **CLOSE)


def test_without_the_parameter_there_are_no_log_probabilities(client: Any, complete: Ask) -> None:
    assert complete().choices[0].logprobs is None
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert chat.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_puts_the_prompt_before_the_answer(stream: bool, complete: Ask, answer: Ask) -> None:
    prompts = ["Many fine-tunes", "你好 🦊 base"]
    reply = complete(prompt=prompts, n=2, max_tokens=6, echo=True, stream=stream)
    texts = [""] * 4
    for chunk in reply if stream else [reply]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    wanted = [prompt + answer(prompt=prompt, max_tokens=6) for prompt in prompts]
    assert texts == [wanted[0], wanted[0], wanted[1], wanted[1]]


def test_echo_without_an_answer_is_the_prompt_alone(complete: Ask) -> None:
    reply = complete(max_tokens=0, echo=True)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (PROMPT, "length")
    assert reply.usage.completion_tokens == 0
