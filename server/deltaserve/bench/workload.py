"""Who asks when for how much. Open loop: a request is sent when it is due, however late the others' answers are."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaserve.errors import BadRequest


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers: (least, most), drawn evenly."""

    prompt: tuple[int, int] = (64, 64)
    answer: tuple[int, int] = (64, 64)
    prefix: int = 0  # of the prompt's tokens, those that all requests of one model share
    vocab_size: int = 256  # token ids are below


@dataclass(frozen=True)
class Job:
    due_s: float
    model: str
    prompt: list[int]
    max_tokens: int


def shares(popularity: str, models: Sequence[str]) -> dict[str, float]:
    """Of one request a second, how many go to each model. identical: all to the first; uniform; zipf:S: the k-th model
    in proportion to k^−S. Raises BadRequest."""
    name, _, exponent = popularity.partition(":")
    if name == "identical":
        return {models[0]: 1.0}
    try:
        power = {"uniform": 0.0, "zipf": float(exponent or 1)}[name]
    except (KeyError, ValueError):
        raise BadRequest(f"popularity {popularity!r}: identical, uniform, or zipf:S with a number S") from None
    weights = [(place + 1) ** -power for place in range(len(models))]
    return {model: weight / sum(weights) for model, weight in zip(models, weights, strict=True)}


def poisson(rates: Mapping[str, float], duration_s: float, lengths: Lengths, seed: int) -> list[Job]:
    """Arrivals of `rates[model]` a second, by time. A model's own do not depend on who else asks."""
    jobs = []
    for model, rate in rates.items():
        chance = random.Random(f"{seed} {model}")
        prefix, due = _ids(chance, lengths.prefix, lengths), 0.0
        while rate and (due := due + chance.expovariate(rate)) < duration_s:
            jobs.append(_job(chance, due, model, prefix, lengths))
    return sorted(jobs, key=lambda job: job.due_s)


def at_once(weights: Mapping[str, float], count: int, lengths: Lengths, seed: int) -> list[Job]:
    """`count` requests at time 0, to the models in proportion to their weights, mixed."""
    total, due = sum(weights.values()), dict.fromkeys(weights, 0.0)
    chances = {model: random.Random(f"{seed} {model}") for model in weights}
    prefixes = {model: _ids(chances[model], lengths.prefix, lengths) for model in weights}
    jobs = []
    for _ in range(count):
        for model, weight in weights.items():
            due[model] += weight / total
        model = max(due, key=lambda name: due[name])
        due[model] -= 1
        jobs.append(_job(chances[model], 0.0, model, prefixes[model], lengths))
    return jobs


def parse_range(text: str) -> tuple[int, int]:
    """ "64" or "16:256". Raises ValueError."""
    least, _, most = text.partition(":")
    found = int(least), int(most or least)
    if not 1 <= found[0] <= found[1] < math.inf:
        raise ValueError(f"{text} is not LEAST:MOST with 1 ≤ LEAST ≤ MOST")
    return found


def _job(chance: random.Random, due_s: float, model: str, prefix: list[int], lengths: Lengths) -> Job:
    own = chance.randint(*lengths.prompt)
    prompt = [*prefix[:own], *_ids(chance, max(own - len(prefix), 0), lengths)]
    return Job(due_s, model, prompt, chance.randint(*lengths.answer))


def _ids(chance: random.Random, count: int, lengths: Lengths) -> list[int]:
    return [chance.randrange(lengths.vocab_size) for _ in range(count)]
