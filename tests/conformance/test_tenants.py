"""Tenants through the official client: one's own models, versions, errors as its exceptions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

MESSAGES: Any = [{"role": "user", "content": "Many"}]


@pytest.fixture(scope="module")
def acme(town: Any) -> Iterator[openai.OpenAI]:
    with town.openai("acme", "inference", "manage") as client:
        yield client


@pytest.fixture(scope="module")
def globex(town: Any) -> Iterator[openai.OpenAI]:
    with town.openai("globex", "inference") as client:
        yield client


def text(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="Many", max_tokens=12, temperature=0).choices[0].text


def test_two_tenants_ask_their_own_model_of_one_name(acme: Any, globex: Any, town: Any) -> None:
    with town.server.client() as admin:
        assert text(acme, "mine") == text(acme, "mine@1") == text(admin, "acme:mine")
        assert text(globex, "mine") == text(admin, "globex:mine@1")
    assert text(acme, "mine") != text(globex, "mine")
    stream = globex.chat.completions.create(model="secret", messages=MESSAGES, max_tokens=4, stream=True)
    assert any(chunk.choices[0].finish_reason for chunk in stream)


def test_models_are_ones_own_and_the_base(acme: Any, globex: Any) -> None:
    assert [card.id for card in acme.models.list()] == ["tiny", "mine"]
    assert [(card.id, card.owned_by) for card in globex.models.list()][1:] == [("mine", "globex"), ("secret", "globex")]
    assert globex.models.retrieve("secret").parent == "tiny"


@pytest.mark.parametrize("model", ["secret", "globex:secret", "globex:secret@1", "mine@2", "nothing"])
def test_another_tenants_model_is_not_found(acme: Any, model: str) -> None:
    for call in (
        lambda: text(acme, model),
        lambda: acme.chat.completions.create(model=model, messages=MESSAGES),
        lambda: acme.models.retrieve(model),
        lambda: acme.models.delete(model),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert caught.value.body["message"] == f"The model `{model}` does not exist."


def test_a_key_without_the_scope_is_a_permission_error_and_a_wrong_one_an_authentication_error(
    globex: Any, town: Any
) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        globex.models.delete("secret")
    assert caught.value.code == "insufficient_permissions"
    with town.server.client(api_key="ds-wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_tenants_ask_at_the_same_time_and_each_hears_its_own(acme: Any, globex: Any, town: Any) -> None:
    expected = {"acme": text(acme, "mine"), "globex": text(globex, "mine")}

    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(model="mine", prompt="Many", max_tokens=12, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_at_once() -> list[str]:
        keys = [town.new_key(tenant, "inference")["key"] for tenant in expected]
        clients = [openai.AsyncOpenAI(base_url=f"{town.server.url}/v1", api_key=key, max_retries=0) for key in keys]
        async with clients[0], clients[1]:
            return await asyncio.gather(*(ask(client) for client in clients * 6))

    assert asyncio.run(all_at_once()) == list(expected.values()) * 6


def test_limits_are_headers_and_a_rate_limit_error(town: Any) -> None:
    small = town.new_tenant(requests_per_minute=2, tokens_per_minute=1000)
    asked: Any = {"model": "tiny", "prompt": "Many", "max_tokens": 1}
    try:
        with town.openai(small, "inference") as client:
            headers = client.completions.with_raw_response.create(**asked).headers
            assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
            assert headers["x-ratelimit-limit-tokens"] == "1000" and headers["x-ratelimit-reset-requests"].endswith("s")
            stream = client.completions.with_raw_response.create(stream=True, **asked)
            assert stream.headers["x-ratelimit-remaining-requests"] == "0"
            assert list(stream.parse())
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**asked)
            assert caught.value.code == "rate_limit_exceeded"
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    finally:
        town.admin("DELETE", f"tenants/{small}")
