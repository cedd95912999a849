"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.api import sse
from deltaserve.api.constraints import read_grammar
from deltaserve.api.deps import Services, ServicesDep
from deltaserve.api.generation import Generation, sampling_params, until_disconnect
from deltaserve.api.openapi import ANSWERS, raises
from deltaserve.api.schemas import ChatIn
from deltaserve.api.tools import ToolUse, read_tools
from deltaserve.engine.grammars import Grammar
from deltaserve.engine.text import Profile
from deltaserve.engine.tool_calls import CallOpened, Content, Piece
from deltaserve.engine.types import Event, FinishReason, SamplingParams, TokenLogprob
from deltaserve.errors import BadRequest

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None, openapi_extra=raises(*ANSWERS))
async def create_chat_completion(body: ChatIn, http: Request, services: ServicesDep) -> Response | dict[str, Any]:
    """An answer to messages, by the model's chat template. With `stream` as events, the last of them `[DONE]`."""
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    generation = Generation(services, body, "chatcmpl", http)

    async def whole() -> dict[str, Any]:
        await start(generation, body, services)
        return await _whole(generation, body, services)

    if not body.stream:
        async with generation:
            return await until_disconnect(http, whole())
    try:
        await until_disconnect(http, start(generation, body, services))
    except BaseException:
        generation.close()
        raise
    return sse.EventStream(_chunks(generation, body, services), generation.close)


async def start(generation: Generation, body: ChatIn, services: Services) -> None:
    def tools(profile: Profile) -> ToolUse | None:
        return read_tools(body, profile, services.settings.tool_call_parser)

    def prompts(profile: Profile) -> list[list[int]]:
        use = tools(profile)
        messages = [message.for_template() for message in body.messages]
        return [services.text.chat_prompt(profile, messages, use.for_template if use else None)]

    def grammar(profile: Profile) -> Grammar | None:
        use = tools(profile)
        return use.grammar if use else read_grammar(body)

    def params(profile: Profile, num_prompt_tokens: int) -> SamplingParams:
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if limit is None and "max_new_tokens" in profile.defaults:
            limit = min(profile.defaults["max_new_tokens"], max(services.max_model_len - num_prompt_tokens, 1))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        made = sampling_params(
            body, profile, num_prompt_tokens, services.max_model_len, max_tokens=limit, logprobs=logprobs
        )
        use = tools(profile)
        hides_tag = use is not None and use.form.tag in profile.tokenizer.all_special_tokens
        return replace(made, skip_special_tokens=False) if hides_tag else made

    await generation.start(prompts, params, grammar)


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


class _Choice:
    """One choice as it grows."""

    def __init__(self, use: ToolUse | None) -> None:
        self._parser = use.parser() if use else None
        self._is_named = use is not None and use.is_named
        self._text = ""
        self._calls: list[dict[str, Any]] = []

    def take(self, event: Event) -> list[dict[str, Any]]:
        """One event as deltas of the wire."""
        if self._parser is None:
            pieces: list[Piece] = [Content(event.text)] if event.text else []
        else:
            pieces = self._parser.feed(event.text) + (self._parser.finish() if event.finish_reason else [])
        return [self._delta(piece) for piece in pieces]

    def finish_reason(self, event: Event) -> str | None:
        """As OpenAI: `tool_calls` where the model chose to call, `stop` where a named tool was forced."""
        if event.finish_reason is FinishReason.STOP and self._calls and not self._is_named:
            return "tool_calls"
        return event.finish_reason

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self._calls:
            message |= {"content": self._text or None, "tool_calls": self._calls}
        return message

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Content):
            self._text += piece.text
            return {"content": piece.text}
        if isinstance(piece, CallOpened):
            function = {"name": piece.name, "arguments": ""}
            call = {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
            self._calls.append({**call, "function": {**function}})
            return {"tool_calls": [{"index": piece.index, **call}]}
        self._calls[piece.index]["function"]["arguments"] += piece.text
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _choices(generation: Generation, body: ChatIn, services: Services) -> list[_Choice]:
    use = read_tools(body, generation.profile, services.settings.tool_call_parser)
    return [_Choice(use) for _ in range(generation.n)]


async def _whole(generation: Generation, body: ChatIn, services: Services) -> dict[str, Any]:
    growing = _choices(generation, body, services)
    contents: list[list[dict[str, Any]]] = [[] for _ in growing]
    last: dict[int, Event] = {}
    async for index, event in generation.events():
        growing[index].take(event)
        last[index] = event
        if body.logprobs:
            contents[index] += _logprobs(generation.profile, event)["content"]
    choices = [
        {
            "index": index,
            "message": choice.message,
            "logprobs": {"content": contents[index], "refusal": None} if body.logprobs else None,
            "finish_reason": choice.finish_reason(last[index]),
            "stop_reason": last[index].stop_reason,
        }
        for index, choice in enumerate(growing)
    ]
    return {**_envelope(generation, body, "chat.completion", choices), "usage": generation.usage}


async def _chunks(generation: Generation, body: ChatIn, services: Services) -> AsyncIterator[dict[str, Any]]:
    def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
        return _envelope(generation, body, "chat.completion.chunk", choices)

    growing = _choices(generation, body, services)
    for index in range(generation.n):
        opening = {"role": "assistant", "content": ""}
        yield chunk([{"index": index, "delta": opening, "logprobs": None, "finish_reason": None}])
    async for index, event in generation.events():
        deltas = growing[index].take(event)
        logprobs = _logprobs(generation.profile, event) if body.logprobs and event.logprobs else None
        if not deltas and (logprobs or event.finish_reason):
            deltas = [{}]
        for place, delta in enumerate(deltas):
            choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            if place == 0:
                choice["logprobs"] = logprobs
            if event.finish_reason and place == len(deltas) - 1:
                choice["finish_reason"] = growing[index].finish_reason(event)
                choice["stop_reason"] = event.stop_reason
            yield chunk([choice])
    if body.includes_usage:
        yield {**chunk([]), "usage": generation.usage}
