"""One API request as sequences in the engine: set up off the event loop, listened to, and always cleaned up.

A request resolves its model's name once, here, to a digest that it leases until its last sequence has ended; a mixture
each of its names. A name that does not resolve is an error; nothing ever falls back to the base.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from deltaserve.api.deps import Services
from deltaserve.api.metering import Meter
from deltaserve.api.mixing import read_mixture
from deltaserve.api.schemas import Generation as Wire
from deltaserve.engine.grammars import Grammar
from deltaserve.engine.text import Profile, Sink
from deltaserve.engine.types import Event, Request, Row, SamplingParams
from deltaserve.errors import BadRequest, ContextLengthExceeded, DeltaServeError
from deltaserve.ids import DeltaDigest, RequestId
from deltaserve.tenants.migrations import DEFAULT_TENANT
from deltaserve.tenants.models import Version

T = TypeVar("T")
Prompts = Callable[[Profile], list[list[int]]]


class Generation:
    """The choices of one API request: prompt i has the choices [i·n, (i+1)·n). Use as an async context manager."""

    def __init__(self, services: Services, body: Wire, kind: str, http: HttpRequest) -> None:
        if body.stream_options is not None and not body.stream:
            raise BadRequest("stream_options needs stream: true", param="stream_options")
        self._services = services
        self._body = body
        self._meter = Meter(services, http)
        self._billed: dict[str, str] = {}  # name in the request → name on the bill
        self._models: Sequence[str] = ()  # of the request's names, those whose tokens are computed
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._leased: list[DeltaDigest] = []
        self._named: dict[str, DeltaDigest] = {}
        self._versions: dict[DeltaDigest, Version] = {}  # those that are leased
        self._digests: list[DeltaDigest | None] = []  # of the models that answer; None = the base
        self._live: dict[int, Request] = {}
        self._unfinished = 0  # requests whose last event has not come
        self._closed = False
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.n = body.n or 1
        self.prompts: list[list[int]] = []
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}  # of each choice that has ended: tokens of its prompt that were not computed
        self.profile: Profile = services.text.base_profile
        self._first: tuple[int, Event] | None = None

    async def start(
        self,
        prompts: Prompts,
        params: Callable[[Profile, int], SamplingParams],
        grammar: Callable[[Profile], Grammar | None],
    ) -> None:
        """Resolves the model, reads the prompts, submits, and waits for the first event, so that what goes wrong
        before it is still an HTTP status. Raises DeltaServeError."""
        self._services.refuse_if_draining()
        self._meter.enter()
        preparing = asyncio.ensure_future(asyncio.to_thread(self._prepare, prompts, params, grammar))
        try:
            requests = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            preparing.add_done_callback(self._drop)  # its lease may come after we are gone
            raise
        self._meter.begin(len(requests), sum(map(len, self.prompts)), len(self._models))
        try:
            self._services.engine.submit(requests, self._meter.max_queued)
        except DeltaServeError:
            self._meter.undo()
            raise
        self._services.metrics.request_params_n.observe(self.n)
        self._live = dict(enumerate(requests))
        self._unfinished = len(requests)
        index, event = await self._next()
        self._first = (index, event)

    def _drop(self, prepared: asyncio.Future[list[Request]]) -> None:
        prepared.exception()  # nobody waits for it
        self.close()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs. The lease goes back when the last of it has ended. May be called again."""
        for request in self._live.values():
            self._services.engine.cancel(request.id)
        self._live.clear()
        self._closed = True
        self._release_if_done()

    def _release_if_done(self) -> None:
        if self._closed and not self._unfinished:
            while self._leased:
                self._loop.run_in_executor(
                    None, self._services.store.release, self._leased.pop()
                )  # the disk may be slow

    def _hear(self, index: int, event: Event) -> None:
        self._events.put_nowait((index, event))
        self._meter.spend(len(event.token_ids))
        if event.finish_reason is not None:
            self._cached[index] = event.num_cached
            self._unfinished -= 1
            if not self._unfinished:
                models = [self._billed[name] for name in self._models]
                self._meter.end(self._billed[self._body.model], models, self._cached_tokens)
            self._release_if_done()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) of all choices as they come, until the last one has ended. Raises a choice's error."""
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        while self._live:
            yield await self._next()

    @property
    def system_fingerprint(self) -> str:
        """Which weights answered: base, and deltas where there are any."""
        return "-".join([self._services.base_fingerprint[:12], *(d[:12] for d in self._digests if d is not None)])

    @property
    def usage(self) -> dict[str, Any]:
        """A prompt counts once, and as cached what none of its choices computed."""
        prompt = sum(map(len, self.prompts))
        done = self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": done,
            "total_tokens": prompt + done,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    @property
    def _cached_tokens(self) -> int:
        choices = [range(i * self.n, (i + 1) * self.n) for i in range(len(self.prompts))]
        return sum(min(self._cached.get(index, 0) for index in own) for own in choices)

    async def _next(self) -> tuple[int, Event]:
        index, event = await self._events.get()
        self.completion_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._live.pop(index, None)
        if event.error is not None:
            raise event.error
        return index, event

    def _prepare(
        self,
        prompts: Prompts,
        params: Callable[[Profile, int], SamplingParams],
        grammar: Callable[[Profile], Grammar | None],
    ) -> list[Request]:
        """Off the event loop: disk, templates, tokenizers."""
        services = self._services
        names, mixture = read_mixture(self._body)
        self._models = names
        self.profile = services.text.profile(self._lease(self._body.model))
        self._digests = [self._lease(name) for name in names]
        eos_ids = self.profile.eos_ids
        for name, digest in zip(names, self._digests, strict=True):
            profile = services.text.profile(digest)
            eos_ids |= profile.eos_ids  # any model of a mixture may end the answer
            if not profile.shares_vocabulary(self.profile):
                raise BadRequest(f"{self._body.model!r} and {name!r} have different vocabularies", param="mixture")
        self._meter.weigh(self._versions[digest] for digest in self._digests if digest is not None)
        self.prompts = prompts(self.profile)
        wanted = grammar(self.profile)
        compiled = wanted and services.grammars.compile(wanted, self.profile.tokenizer)
        now = time.monotonic()
        requests: list[Request] = []
        owner = self._meter.caller.tenant
        for ids in self.prompts:
            self._check_ids(ids)
            sampling = self._meter.bounded(params(self.profile, len(ids)), self._body.asked_tokens)
            for choice in range(self.n):
                index = len(requests)
                requests.append(
                    Request(
                        id=RequestId(f"{self.id}-{index}"),
                        digest=self._digests[0],
                        others=tuple(Row(digest=digest) for digest in self._digests[1:]),
                        mixture=mixture,
                        guide=compiled.guide() if compiled else None,
                        prompt_ids=ids,
                        params=_for_choice(sampling, choice),
                        eos_ids=eos_ids,
                        vocab_size=self.profile.vocab_size,
                        sink=Sink(self.profile, ids, sampling),
                        emit=self._emitter(index),
                        arrival_s=now,
                        tenant="" if owner.id == DEFAULT_TENANT else owner.name,  # alone, its models are the parties
                    )
                )
        return requests

    def _lease(self, name: str) -> DeltaDigest | None:
        """The digest behind a model's name, leased, the same for the whole request; None = the base. Raises
        ModelNotFound."""
        if name == self._services.base_id:
            self._billed[name] = name
            return None
        if name not in self._named:
            caller = self._meter.caller
            model, version = self._services.store.lease(caller, name, self._body.user or self.id)
            self._leased.append(version.digest)
            self._services.sightings.ask(version.digest, caller.tenant.id, model.tenant_id)
            self._named[name] = version.digest
            self._versions[version.digest] = version
            self._billed[name] = model.called_by(caller)
        return self._named[name]

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise BadRequest("the prompt has no tokens", param="prompt")
        if max(ids) >= self.profile.vocab_size:
            raise BadRequest(f"token id {max(ids)} is not below {self.profile.vocab_size}", param="prompt")

    def _emitter(self, index: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._hear, index, event)

        return emit


def sampling_params(
    body: Wire, profile: Profile, num_prompt_tokens: int, max_model_len: int, *, max_tokens: int | None, **extra: Any
) -> SamplingParams:
    """The request's values, else the model's generation defaults, else OpenAI's. Raises ContextLengthExceeded."""
    room = max_model_len - num_prompt_tokens
    if room < (max_tokens if max_tokens is not None else 1):
        asked = f" and {max_tokens} for the answer" if max_tokens is not None else ""
        raise ContextLengthExceeded(
            f"the model's context is {max_model_len} tokens; the prompt has {num_prompt_tokens}{asked}",
            param="prompt" if hasattr(body, "prompt") else "messages",
        )

    def given(name: str, fallback: Any) -> Any:
        value = getattr(body, name)
        return value if value is not None else profile.defaults.get(name, fallback)

    if (body.min_tokens or 0) > (room if max_tokens is None else max_tokens):
        raise BadRequest(f"min_tokens {body.min_tokens} is over max_tokens, {max_tokens or room}", param="min_tokens")
    bias = tuple((_token_id(key, profile), value) for key, value in (body.logit_bias or {}).items())
    return SamplingParams(
        max_tokens=room if max_tokens is None else max_tokens,
        temperature=given("temperature", 1.0),
        top_p=given("top_p", 1.0),
        top_k=max(given("top_k", 0), 0),
        min_p=given("min_p", 0.0),
        seed=body.seed,
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop=body.stop_strings,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        skip_special_tokens=body.skip_special_tokens is not False,
        **extra,
    )


async def until_disconnect(http: HttpRequest, work: Awaitable[T]) -> T:
    """`work`, cancelled when the client goes away. Raises ClientDisconnect."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        task.cancel()
        await asyncio.wait({task})
        raise ClientDisconnect
    finally:
        watcher.cancel()
        task.cancel()


def _for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Choice i of a seeded request draws from seed + i."""
    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=params.seed + choice)


def _token_id(key: str, profile: Profile) -> int:
    canonical = key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key
    if not canonical or int(key) >= profile.vocab_size:
        raise BadRequest(f"logit_bias: {key[:40]!r} is no token id below {profile.vocab_size}", param="logit_bias")
    return int(key)
