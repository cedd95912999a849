"""Greedy answers are those of transformers on the restored checkpoint, whoever else is in the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS = ["Many fine-tunes of one base", "def serve(request):", "Zwölf Boxkämpfer", "1234567890 ?! 你好 🦊"]
NUM_TOKENS = 24


def test_every_model_answers_like_transformers_when_all_are_asked_at_once(
    tenants: dict[str, Any], complete: Callable[..., Any], at_once: Callable[..., list[Any]]
) -> None:
    cases = [(tenant, prompt) for prompt in PROMPTS for tenant in tenants.values()]

    def ask(tenant: Any, prompt: str) -> Any:
        return lambda: complete(tenant.name, prompt=prompt, max_tokens=NUM_TOKENS)

    replies = at_once([ask(*case) for case in cases])

    for (tenant, prompt), reply in zip(cases, replies, strict=True):
        ids = tenant.encode(prompt)
        text, new = tenant.greedy(ids, NUM_TOKENS)
        assert (tenant.name, reply.choices[0].text) == (tenant.name, text)
        assert reply.model == tenant.name
        assert reply.choices[0].finish_reason == ("stop" if new[-1] == tenant.tokenizer.eos_token_id else "length")
        usage = (len(ids), len(new), len(ids) + len(new))
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == usage


def test_the_tenants_differ_from_the_base_and_from_each_other(
    tenants: dict[str, Any], answer: Callable[..., str]
) -> None:
    assert len({answer(name) for name in tenants}) == len(tenants)


@pytest.mark.parametrize("name", ["tiny", "sign", "chatty"])
def test_a_chat_reads_the_models_own_template(name: str, tenants: dict[str, Any], client: Any) -> None:
    tenant = tenants[name]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a delta?"}]

    reply = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=12)

    ids = tenant.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert reply.usage.prompt_tokens == len(ids)
    assert reply.choices[0].message.content == tenant.greedy(ids, 12)[0]
    assert reply.choices[0].message.role == "assistant"


def test_token_ids_and_batches_are_prompts_too(tenants: dict[str, Any], complete: Callable[..., Any]) -> None:
    tenant = tenants["sign"]
    ids = [tenant.encode(prompt) for prompt in PROMPTS]
    texts = [tenant.greedy(own, 8)[0] for own in ids]

    assert complete("sign", prompt=ids[0], max_tokens=8).choices[0].text == texts[0]
    for batch in (PROMPTS, ids):
        reply = complete("sign", prompt=batch, max_tokens=8)
        assert [choice.text for choice in reply.choices] == texts
        assert [choice.index for choice in reply.choices] == list(range(len(texts)))
        assert reply.usage.prompt_tokens == sum(map(len, ids))


def test_content_parts_are_one_text(client: Any) -> None:
    def ask(content: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a delta?"}]
    assert ask(parts).choices[0].message.content == ask("What is a delta?").choices[0].message.content


def test_the_fingerprint_names_the_weights(tenants: dict[str, Any], complete: Callable[..., Any]) -> None:
    prints = {name: complete(name, max_tokens=1).system_fingerprint for name in tenants}
    assert len(set(prints.values())) == len(tenants)
    assert all(value.startswith(prints["tiny"]) for value in prints.values())
