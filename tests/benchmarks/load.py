"""Load on an OpenAI-compatible server: all requests at once, or arriving at random whether or not it keeps up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openai


@dataclass(frozen=True)
class Job:
    model: str
    prompt: list[int]  # token ids: no server's tokenizer has a say


@dataclass(frozen=True)
class Timing:
    first: float  # seconds from arrival to the first token
    each: float  # seconds per token after it


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    ended: bool  # by the end-of-text token, which is counted and has no text


def burst(url: str, jobs: Sequence[Job], tokens: int, *, ignore_eos: bool = True) -> tuple[float, list[Answer]]:
    """(seconds, answers) of all jobs sent at the same time, greedy, `tokens` tokens each or up to the end."""

    async def run() -> tuple[float, list[Answer]]:
        async with _client(url) as client:
            began = time.perf_counter()
            bodies = [_body(job, tokens, ignore_eos=ignore_eos) for job in jobs]
            got = await asyncio.gather(*(client.completions.create(**body) for body in bodies))
            took = time.perf_counter() - began
        assert [one.usage.prompt_tokens for one in got] == [len(job.prompt) for job in jobs]
        ended = [one.choices[0].finish_reason == "stop" for one in got]
        counts = [one.usage.completion_tokens for one in got]
        assert all(end or count == tokens for end, count in zip(ended, counts, strict=True))
        return took, [Answer(one.choices[0].text, *rest) for one, *rest in zip(got, counts, ended, strict=True)]

    return asyncio.run(run())


def open_loop(url: str, jobs: Sequence[Job], tokens: int, rate: float, seed: int) -> tuple[float, list[Timing]]:
    """(seconds from first arrival to last token, timings) of jobs that arrive `rate` a second, exponential gaps."""
    draw, arrivals = random.Random(seed), [0.0]
    while len(arrivals) < len(jobs):
        arrivals.append(arrivals[-1] + draw.expovariate(rate))

    async def one(client: openai.AsyncOpenAI, job: Job, wait: float) -> Timing:
        await asyncio.sleep(wait)
        began = time.perf_counter()
        first = last = 0.0
        async for event in await client.completions.create(**_body(job, tokens), stream=True):
            if event.choices:
                last = time.perf_counter()
                first = first or last
        return Timing(first - began, (last - first) / (tokens - 1))

    async def run() -> tuple[float, list[Timing]]:
        async with _client(url) as client:
            began = time.perf_counter()
            timings = await asyncio.gather(*(one(client, *pair) for pair in zip(jobs, arrivals, strict=True)))
            return time.perf_counter() - began, timings

    return asyncio.run(run())


def _client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600, max_retries=0)


def _body(job: Job, tokens: int, *, ignore_eos: bool = True) -> dict[str, Any]:
    extra = {"ignore_eos": ignore_eos}
    return {"model": job.model, "prompt": job.prompt, "max_tokens": tokens, "temperature": 0, "extra_body": extra}
