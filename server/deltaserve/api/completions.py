"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.api import sse
from deltaserve.api.constraints import read_grammar
from deltaserve.api.deps import Services, ServicesDep
from deltaserve.api.generation import Generation, sampling_params, until_disconnect
from deltaserve.api.openapi import ANSWERS, raises
from deltaserve.api.schemas import CompletionIn
from deltaserve.engine.text import Profile
from deltaserve.engine.types import Event, SamplingParams, TokenLogprob
from deltaserve.errors import BadRequest

router = APIRouter()
DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", response_model=None, openapi_extra=raises(*ANSWERS))
async def create_completion(body: CompletionIn, http: Request, services: ServicesDep) -> Response | dict[str, Any]:
    """Text after a prompt, or after each of several. With `stream` as events, the last of them `[DONE]`."""
    if body.max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens 0 answers nothing; it is of use with echo alone", param="max_tokens")
    generation = Generation(services, body, "cmpl", http)

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


async def start(generation: Generation, body: CompletionIn, services: Services) -> None:
    def prompts(profile: Profile) -> list[list[int]]:
        return [services.text.encode(profile, p) if isinstance(p, str) else p for p in body.prompts]

    def params(profile: Profile, num_prompt_tokens: int) -> SamplingParams:
        limit = body.max_tokens
        if limit is None:
            default = profile.defaults.get("max_new_tokens", DEFAULT_MAX_TOKENS)
            limit = min(default, max(services.max_model_len - num_prompt_tokens, 1))
        scored = bool(body.echo and body.logprobs is not None)
        return sampling_params(
            body,
            profile,
            num_prompt_tokens,
            services.max_model_len,
            max_tokens=limit,
            logprobs=body.logprobs,
            prompt_logprobs=scored,
        )

    await generation.start(prompts, params, lambda profile: read_grammar(body))


class _Choice:
    """One choice as it grows: how much text its log-probabilities already point past."""

    def __init__(self, generation: Generation, body: CompletionIn, index: int) -> None:
        self.index = index
        self._profile = generation.profile
        self._with_logprobs = body.logprobs is not None
        self._num_choices = generation.n
        prompt = generation.prompts[index // generation.n]
        self.echoed = self._prompt_text(body, prompt) if body.echo else None
        self._offset = 0

    def _prompt_text(self, body: CompletionIn, prompt: list[int]) -> str:
        sent = body.prompts[self.index // self._num_choices]
        return sent if isinstance(sent, str) else str(self._profile.tokenizer.decode(prompt))

    def take(self, event: Event) -> dict[str, Any]:
        """One event as the wire's choice; the echoed prompt comes with the first."""
        text = event.text
        if self.echoed is not None:
            text, self.echoed = self.echoed + text, None
        reports = (*event.prompt_logprobs, *event.logprobs)
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(reports) if self._with_logprobs else None,
            "finish_reason": event.finish_reason.value if event.finish_reason else None,
            "stop_reason": event.stop_reason,
        }

    def _logprobs(self, reports: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        tokens = [self._profile.token_text(report.token_id) for report in reports]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        top = [
            {self._profile.token_text(token): logprob for token, logprob in report.top} if report.top else None
            for report in reports
        ]
        return {
            "tokens": tokens,
            "token_logprobs": [report.logprob for report in reports],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def _envelope(generation: Generation, body: CompletionIn, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created,
        "model": body.model,
        "system_fingerprint": generation.system_fingerprint,
        "choices": choices,
    }


def _choices(generation: Generation, body: CompletionIn) -> list[_Choice]:
    return [_Choice(generation, body, index) for index in range(len(generation.prompts) * generation.n)]


async def _whole(generation: Generation, body: CompletionIn) -> dict[str, Any]:
    growing = _choices(generation, body)
    pieces: list[list[dict[str, Any]]] = [[] for _ in growing]
    async for index, event in generation.events():
        pieces[index].append(growing[index].take(event))
    return {**_envelope(generation, body, [_join(own) for own in pieces]), "usage": generation.usage}


def _join(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    whole = {**pieces[-1], "text": "".join(piece["text"] for piece in pieces)}
    if whole["logprobs"] is not None:
        parts = [piece["logprobs"] for piece in pieces]
        whole["logprobs"] = {key: [item for part in parts for item in part[key]] for key in whole["logprobs"]}
    return whole


async def _chunks(generation: Generation, body: CompletionIn) -> AsyncIterator[dict[str, Any]]:
    growing = _choices(generation, body)
    async for index, event in generation.events():
        choice = growing[index].take(event)
        if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
            yield _envelope(generation, body, [choice])
    if body.includes_usage:
        yield {**_envelope(generation, body, []), "usage": generation.usage}
