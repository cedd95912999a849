"""What was read once is not read again: the usage says so, the answers do not; and only for the same model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = "The prefix cache keeps what it has read, sentence by sentence, for whoever begins alike. " * 3
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": 3}


def cached(reply: Any) -> int:
    return int(reply.usage.prompt_tokens_details.cached_tokens)


def test_the_same_prompt_is_cached_for_its_model_alone_and_answered_alike(client: Any, server: Any) -> None:
    hits = server.metric("vllm:prefix_cache_hits_total")
    first = client.completions.create(model="sign", prompt=TEXT, **ASKED)
    again = client.completions.create(model="sign", prompt=TEXT, **ASKED)
    assert cached(first) == 0
    assert 0 < cached(again) < again.usage.prompt_tokens
    assert again.usage.prompt_tokens - cached(again) <= 16
    assert again.choices[0].text == first.choices[0].text
    assert server.metric("vllm:prefix_cache_hits_total") == hits + cached(again)
    assert server.metric("vllm:prefix_cache_queries_total") >= 2 * again.usage.prompt_tokens
    assert cached(client.completions.create(model="tiny", prompt=TEXT, **ASKED)) == 0
    assert cached(client.completions.create(model="sparse", prompt=TEXT, **ASKED)) == 0


def test_a_conversation_is_cached_up_to_its_last_words_and_a_stream_tells_it_too(client: Any) -> None:
    messages = [{"role": "user", "content": "A conversation of its own. " + TEXT}]
    opening = client.chat.completions.create(model="chatty", messages=messages, max_tokens=8, temperature=0)
    assert cached(opening) == 0
    messages += [
        {"role": "assistant", "content": opening.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    *_, last = client.chat.completions.create(
        model="chatty", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    assert opening.usage.prompt_tokens - 32 <= cached(last) < last.usage.prompt_tokens


def test_what_some_choice_has_computed_is_not_called_cached(client: Any) -> None:
    prompts = ["Two choices at once. " + TEXT, "And two of another. " + TEXT]
    reply = client.completions.create(model="sign", prompt=prompts, n=2, max_tokens=2, temperature=0)
    assert cached(reply) == 0
    again = client.completions.create(model="sign", prompt=prompts, n=2, max_tokens=2, temperature=0)
    assert again.usage.prompt_tokens - 32 <= cached(again) < again.usage.prompt_tokens


def test_an_echo_with_log_probabilities_is_read_again(client: Any) -> None:
    asked = {"model": "sign", "prompt": "An echo. " + TEXT, "echo": True, "logprobs": 1, "max_tokens": 1}
    first, again = (client.completions.create(**asked, temperature=0) for _ in range(2))
    assert (cached(first), cached(again)) == (0, 0)
    assert again.choices[0].logprobs == first.choices[0].logprobs


def test_a_new_version_under_a_name_is_answered_by_its_own_weights(
    start_server: Callable[..., Any], tenants: dict[str, Any]
) -> None:
    server = start_server("--dtype", "bfloat16")

    def ask(model: str) -> Any:
        return client.completions.create(model=model, prompt=TEXT, **ASKED)

    with server.client() as client:
        for model, kind in [("name", "sign"), ("fresh", "sparse")]:
            assert server.upload(model, tenants[kind].artifact).status_code == 201
        old = ask("name")
        assert cached(ask("name")) > 0
        assert server.upload("name", tenants["sparse"].artifact).status_code == 200
        new = ask("name")
        assert cached(new) == 0
        assert new.choices[0].text != old.choices[0].text
        fresh = ask("fresh")  # the same bytes by another name: the same weights, so the same KV
        assert cached(fresh) > 0
        assert fresh.choices == new.choices


def test_without_the_cache_everything_is_read_and_answered_alike(
    start_server: Callable[..., Any], client: Any, tenants: dict[str, Any]
) -> None:
    server = start_server("--no-prefix-caching")
    assert server.upload("sign", tenants["sign"].artifact).status_code == 201
    with server.client() as plain:
        replies = [plain.completions.create(model="sign", prompt=TEXT, **ASKED) for _ in range(2)]
    assert [cached(reply) for reply in replies] == [0, 0]
    assert server.metric("vllm:prefix_cache_queries_total") == 0
    assert replies[0].choices[0].text == client.completions.create(model="sign", prompt=TEXT, **ASKED).choices[0].text
