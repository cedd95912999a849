"""The data that crosses the engine's seams. No torch here: the HTTP layer reads these."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from deltaserve.errors import DeltaServeError
from deltaserve.ids import BASE_SLOT, DeltaDigest, RequestId, Slot

MAX_LOGPROBS = 20


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued; ranges are checked at the edge (api.schemas)."""

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    seed: int | None = None  # None = drawn anew
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    logprobs: int | None = None  # alternatives reported for each new token; None = no log-probabilities at all
    prompt_logprobs: bool = False  # the same for the prompt's tokens


@dataclass(frozen=True)
class TokenLogprob:
    """log-probability of one token under the unmodified logits, and the most likely ones beside it."""

    token_id: int
    logprob: float | None  # None: the first token of a prompt has none
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), descending


@dataclass(frozen=True)
class Event:
    """What a request hears. The last event has a finish reason; nothing follows it."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it
    num_cached: int = 0  # the last one tells how many tokens of the prompt were not computed
    error: DeltaServeError | None = None


class TextSink(Protocol):
    """Turns one sequence's tokens into text and knows its stop strings (engine.text)."""

    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:
        """(text that is certain now, the stop string that was completed if one may be)"""
        ...

    def finish(self) -> str:
        """The text that was held back."""
        ...


class Guide(Protocol):
    """What may follow in one sequence (engine.grammars)."""

    def is_ready(self, deadline_s: float) -> bool:
        """Is the next mask there by `deadline_s` of the monotonic clock? Raises GrammarError if it takes too long."""
        ...

    def allowed(self) -> tuple[bytes, bool]:
        """(one bit a token id, lowest first; may the sequence end here). Raises GrammarError."""
        ...

    def advance(self, token_id: int) -> bool:
        """Takes the next token; True if nothing may follow it. Raises GrammarError."""
        ...


@dataclass(frozen=True)
class Mixture:
    """How the next-token distributions of a request's rows become one (engine.mixtures)."""

    weights: tuple[float, ...]  # one a row, positive, sum 1
    alpha: float = 0.0  # 0 = linear in log-probabilities


@dataclass(eq=False, kw_only=True)
class Row:
    """One model on its way through a sequence of tokens: what it holds of the device."""

    digest: DeltaDigest | None  # None = the base
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)  # of the first of them (engine.blocks)
    slot: Slot = BASE_SLOT
    pinned: bool = False
    logprob: float = 0.0  # of the tokens generated so far, under this model alone; kept for mixtures with alpha only


@dataclass(eq=False, kw_only=True)
class Request(Row):
    """One sequence on its way through the engine.

    tokens = prompt + generated; [0, num_computed) of them are in the KV cache of every row. A mixture runs the same
    tokens through several models: it is the first row itself, and `others` are the rest. The engine's thread owns it.
    """

    id: RequestId
    prompt_ids: Sequence[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    vocab_size: int
    sink: TextSink
    emit: Callable[[Event], None]
    arrival_s: float = 0.0
    tenant: str = ""  # opaque: whose it is, "" = nobody in particular
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_charged: int = 0  # tokens of the prompt that its party's counter knows of
    num_cached: int | None = None  # tokens of the prompt whose KV was found when it first ran
    guide: Guide | None = None
    mixture: Mixture | None = None
    others: tuple[Row, ...] = ()
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_reports: list[TokenLogprob] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)

    @property
    def rows(self) -> tuple[Row, ...]:
        return (self, *self.others)

    @property
    def party(self) -> str:
        """Whom fairness counts this request for: its tenant, else its model."""
        return self.tenant or self.digest or ""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that the KV cache lacks."""
        return len(self.tokens) - self.num_computed


class DeltaGate(Protocol):
    """What the scheduler sees of residency."""

    def try_pin(self, digest: DeltaDigest) -> Slot | None:
        """The slot, pinned, or None while the delta is on its way or every slot is in use. Raises DeltaLoadFailed."""
        ...

    def unpin(self, slot: Slot) -> None: ...

    def is_ready(self, digest: DeltaDigest) -> bool:
        """Would `try_pin` have an answer now, a slot or a failure?"""
        ...

    def check_together(self, digests: Collection[DeltaDigest]) -> None:
        """Raises BadRequest if these can never be on the device at the same time."""

    def want(self, digests: Sequence[DeltaDigest], held: Collection[DeltaDigest] = ()) -> None:
        """Deltas that requests wait for, the first in turn first; and what the first of these requests has already."""
        ...

    def overdue(self) -> Sequence[Slot]:
        """Slots whose requests have to give way to a delta that has waited too long."""
        ...
