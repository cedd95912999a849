"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.api import sse
from deltaserve.api.deps import Services, ServicesDep
from deltaserve.api.generation import Generation, sampling_params, until_disconnect
from deltaserve.api.schemas import ChatIn
from deltaserve.engine.text import Profile
from deltaserve.engine.types import Event, SamplingParams, TokenLogprob
from deltaserve.errors import BadRequest

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatIn, http: Request, services: ServicesDep) -> Response | dict[str, Any]:
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    generation = Generation(services, body, "chatcmpl", http)

    async def whole() -> dict[str, Any]:
        await start(generation, body, services)
        return await _whole(generation, body)

    if not body.stream:
        async with generation:
            return await until_disconnect(http, whole())
    try:
        await until_disconnect(http, start(generation, body, services))
    except BaseException:
        generation.close()
        raise
    return sse.EventStream(_chunks(generation, body), generation.close)


async def start(generation: Generation, body: ChatIn, services: Services) -> None:
    def prompts(profile: Profile) -> list[list[int]]:
        return [services.text.chat_prompt(profile, [message.for_template() for message in body.messages])]

    def params(profile: Profile, num_prompt_tokens: int) -> SamplingParams:
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if limit is None and "max_new_tokens" in profile.defaults:
            limit = min(profile.defaults["max_new_tokens"], max(services.max_model_len - num_prompt_tokens, 1))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return sampling_params(
            body, profile, num_prompt_tokens, services.max_model_len, max_tokens=limit, logprobs=logprobs
        )

    await generation.start(prompts, params)


def _envelope(generation: Generation, body: ChatIn, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": body.model,
        "system_fingerprint": generation.system_fingerprint,
        "choices": choices,
    }


def _logprobs(profile: Profile, event: Event) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = profile.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def report(token: TokenLogprob) -> dict[str, Any]:
        return {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*best) for best in token.top]}

    return {"content": [report(token) for token in event.logprobs], "refusal": None}


async def _whole(generation: Generation, body: ChatIn) -> dict[str, Any]:
    texts = [""] * generation.n
    contents: list[list[dict[str, Any]]] = [[] for _ in texts]
    last: dict[int, Event] = {}
    async for index, event in generation.events():
        texts[index] += event.text
        last[index] = event
        if body.logprobs:
            contents[index] += _logprobs(generation.profile, event)["content"]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": {"content": contents[index], "refusal": None} if body.logprobs else None,
            "finish_reason": last[index].finish_reason,
            "stop_reason": last[index].stop_reason,
        }
        for index, text in enumerate(texts)
    ]
    return {**_envelope(generation, body, "chat.completion", choices), "usage": generation.usage}


async def _chunks(generation: Generation, body: ChatIn) -> AsyncIterator[dict[str, Any]]:
    def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
        return _envelope(generation, body, "chat.completion.chunk", choices)

    for index in range(generation.n):
        opening = {"role": "assistant", "content": ""}
        yield chunk([{"index": index, "delta": opening, "logprobs": None, "finish_reason": None}])
    async for index, event in generation.events():
        if not event.text and not event.finish_reason and not (body.logprobs and event.logprobs):
            continue
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": _logprobs(generation.profile, event) if body.logprobs else None,
            "finish_reason": event.finish_reason,
        }
        if event.finish_reason:
            choice["stop_reason"] = event.stop_reason
        yield chunk([choice])
    if body.includes_usage:
        yield {**chunk([]), "usage": generation.usage}
