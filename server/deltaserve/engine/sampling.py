"""Logits → one token for each row. What a row draws depends on its own logits and seed alone, never on its neighbours.

Order, as in vLLM: logit_bias, min_tokens and the grammar, penalties, temperature, min-p, top-k, top-p, draw. The draw
inverts the cumulative distribution with one uniform number from the request's own generator. Log-probabilities are
those of the logits as the model gave them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaserve.engine.types import Request, TokenLogprob


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None
    finite: bool  # False: the model gave NaN, the token means nothing


class Generators:
    """One random generator a request, made when it first draws, on the CPU, so that devices agree."""

    def __init__(self) -> None:
        self._by_request: dict[Request, torch.Generator] = {}

    def uniform(self, request: Request) -> float:
        if request not in self._by_request:
            generator = torch.Generator()
            seed = request.params.seed
            generator.manual_seed(seed % 2**63) if seed is not None else generator.seed()
            self._by_request[request] = generator
        return float(torch.rand((), generator=self._by_request[request], dtype=torch.float64))

    def forget(self, request: Request) -> None:
        self._by_request.pop(request, None)


def sample(logits: Tensor, requests: Sequence[Request], generators: Generators) -> list[Sampled]:
    """logits float32 [R, V], row r of requests[r]; not changed."""
    chosen, finite = _likeliest(logits)
    changed = logits
    if any(_changes_logits(request) for request in requests):
        changed = logits.clone()
        for row, request in enumerate(requests):
            if _changes_logits(request):
                _change(changed[row], request)
        chosen, still = _likeliest(changed)
        finite = [one and other for one, other in zip(finite, still, strict=True)]
    drawn = [row for row, request in enumerate(requests) if request.params.temperature > 0 and finite[row]]
    if drawn:
        chosen[drawn] = _draw(changed[drawn], [requests[row] for row in drawn], generators)
    token_ids = chosen.tolist()
    reports = token_logprobs(logits, token_ids, [request.params.logprobs for request in requests])
    return [Sampled(*row) for row in zip(token_ids, reports, finite, strict=True)]


def _likeliest(logits: Tensor) -> tuple[Tensor, list[bool]]:
    """int64 [R], and whether that logit is finite: NaN anywhere is the largest."""
    # on a CPU NumPy takes a tenth of torch's time
    best = torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)
    return best, logits.gather(1, best[:, None])[:, 0].isfinite().tolist()


def token_logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprob | None]:
    """For each row of logits [R, V] its token's log-probability and the `counts` most likely; None where count is."""
    reports: list[TokenLogprob | None] = [None] * len(token_ids)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return reports
    logprobs = logits[rows].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor([token_ids[row] for row in rows], device=logits.device)[:, None])[
        :, 0
    ].tolist()
    most = max(counts[row] or 0 for row in rows)
    top = logprobs.topk(most, -1) if most else None
    for place, row in enumerate(rows):
        best: tuple[tuple[int, float], ...] = ()
        if top is not None and (count := counts[row]):
            best = tuple(zip(top.indices[place, :count].tolist(), top.values[place, :count].tolist(), strict=True))
        reports[row] = TokenLogprob(token_ids[row], own[place], best)
    return reports


def _changes_logits(request: Request) -> bool:
    p = request.params
    penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
    return penalised or bool(p.logit_bias) or request.num_generated < p.min_tokens or request.guide is not None


def _change(row: Tensor, request: Request) -> None:
    """row float32 [V], changed in place."""
    p = request.params
    if p.logit_bias:
        ids, bias = zip(*p.logit_bias, strict=True)
        row[list(ids)] += torch.tensor(bias, device=row.device)
    ends = [token for token in {*request.eos_ids, *p.stop_token_ids} if token < len(row)]
    if request.guide is not None:
        row.masked_fill_(~_allowed(request, ends, len(row)).to(row.device), -torch.inf)
    elif request.num_generated < p.min_tokens:
        row[ends] = -torch.inf
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(request.tokens)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = Counter(request.tokens[len(request.prompt_ids) :])
        if counts:
            given = torch.tensor(list(counts), device=row.device)
            times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
            row[given] -= p.presence_penalty + p.frequency_penalty * times


def _allowed(request: Request, ends: Sequence[int], size: int) -> Tensor:
    """bool [size]: what the request's grammar lets follow. min_tokens yields where nothing but the end may follow."""
    assert request.guide is not None
    mask, may_end = request.guide.allowed()
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[:size]
    allowed = torch.zeros(size, dtype=torch.bool)
    allowed[: len(bits)] = torch.from_numpy(bits).bool()
    allowed[list(ends)] = False
    if may_end and (request.num_generated >= request.params.min_tokens or not bool(allowed.any())):
        allowed[list(ends)] = True
    return allowed


def _draw(logits: Tensor, requests: Sequence[Request], generators: Generators) -> Tensor:
    """logits float32 [R, V] → token ids int64 [R]."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(r.params, name) for r in requests], device=logits.device)[:, None]

    probs = (logits / column("temperature").clamp(min=1e-5)).softmax(-1)
    if any(request.params.min_p > 0 for request in requests):
        probs = probs.masked_fill(probs < column("min_p") * probs.amax(-1, keepdim=True), 0)
    narrowed = [i for i, r in enumerate(requests) if r.params.top_p < 1 or 0 < r.params.top_k < logits.shape[1]]
    if narrowed:
        probs[narrowed] = _narrow(probs[narrowed], [requests[i] for i in narrowed])
    cumulative = probs.double().cumsum(-1)
    uniform = torch.tensor([generators.uniform(r) for r in requests], dtype=torch.float64, device=logits.device)
    total = cumulative[:, -1:]
    below = total.nextafter(torch.zeros_like(total))  # rounding may reach the total
    target = (uniform[:, None] * total).minimum(below)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _narrow(probs: Tensor, requests: Sequence[Request]) -> Tensor:
    """Zero outside the top k, then outside the smallest set whose share of the rest reaches top_p. [R, V] → [R, V]"""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(probs.shape[1], device=probs.device)
    k = torch.tensor([r.params.top_k or probs.shape[1] for r in requests], device=probs.device)[:, None]
    ordered = ordered.masked_fill(place >= k, 0)
    p = torch.tensor([r.params.top_p for r in requests], device=probs.device)[:, None]
    before = ordered.cumsum(-1) - ordered  # mass above each token
    beyond = (place > 0) & (before >= p * ordered.sum(-1, keepdim=True))  # the first stays, where p rounds to 0 too
    ordered = ordered.masked_fill(beyond, 0)
    return torch.zeros_like(probs).scatter_(1, index, ordered)
