"""What a tenant may use, and the gate that its requests pass.

    requests_per_minute, tokens_per_minute   buckets that fill evenly: a minute's worth at most, refilled by the minute
    max_concurrent                           sequences (choices of all prompts) that wait or run
    max_queued                               of those, the ones that wait (`engine.loop`, at their submission)
    max_resident_bytes                       of deltas on the device, in use or pinned
    max_tokens                               tokens of one answer
    max_bytes, max_models                    of what is stored (`tenants.models`, at the commit of an upload)

Tokens are charged as they are: the prompt's when it begins, the answer's as they come. So an answer may overdraw the
bucket, and the next request waits until the debt is paid; nobody has to guess the length of an answer beforehand.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from deltaserve.errors import BadRequest, QuotaExceeded, RateLimited
from deltaserve.ids import DeltaDigest

MINUTE_S = 60.0
MAX_HELD_BYTES = 64 * 2**20  # of one tenant's bodies in memory at once
LONGEST_RETRY_S = 120  # clients of OpenAI's do not retry at all after more


@dataclass(frozen=True)
class Limits:
    """None = no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_tokens: int | None = None
    max_bytes: int | None = None
    max_models: int | None = None
    max_queued: int | None = None
    max_resident_bytes: int | None = None

    def given(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def with_changes(self, changes: dict[str, Any]) -> Limits:
        return Limits(**{**asdict(self), **changes})


UNLIMITED = Limits()


class _Bucket:
    """Holds a minute's worth at most; a level below 0 is a debt."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self._at = now

    def refill(self, per_minute: int, now: float) -> None:
        if per_minute != self.per_minute:  # the limit was changed: what was used stays used
            self.level = min(self.level, 0) + max(self.level, 0) / self.per_minute * per_minute
            self.per_minute = per_minute
        self.level = min(self.level + (now - self._at) * per_minute / MINUTE_S, per_minute)
        self._at = now

    def wait_s(self, wanted: float) -> float:
        """Seconds until it holds `wanted`, or is full."""
        return max(min(wanted, self.per_minute) - self.level, 0) * MINUTE_S / self.per_minute

    def headers(self, of: str) -> dict[str, str]:
        """As OpenAI's: limit, remaining, time until full."""
        return {
            f"x-ratelimit-limit-{of}": str(self.per_minute),
            f"x-ratelimit-remaining-{of}": str(max(math.floor(self.level), 0)),
            f"x-ratelimit-reset-{of}": _span(self.wait_s(self.per_minute)),
        }


class _Account:
    """The state of one tenant."""

    def __init__(self) -> None:
        self.requests: _Bucket | None = None
        self.tokens: _Bucket | None = None
        self.concurrent = 0
        self.uploading = 0  # bytes
        self.held = 0  # bytes of bodies in memory
        self.users: Counter[DeltaDigest] = Counter()  # requests that use a delta
        self.weights: dict[DeltaDigest, int] = {}  # bytes of those on the device

    def refill(self, limits: Limits, now: float) -> None:
        self.requests = _refilled(self.requests, limits.requests_per_minute, now)
        self.tokens = _refilled(self.tokens, limits.tokens_per_minute, now)

    def headers(self) -> dict[str, str]:
        return {
            **(self.requests.headers("requests") if self.requests else {}),
            **(self.tokens.headers("tokens") if self.tokens else {}),
        }


class Ticket:
    """One API request on its way: `begin` when its size is known, `spend` as it answers, `end` in any case. `headers`
    says how the buckets stand after each of the first two, or as they refused it."""

    def __init__(self, gate: Gate, tenant_id: int, limits: Limits, headers: dict[str, str]) -> None:
        self._gate = gate
        self._headers = headers
        self._tenant_id = tenant_id
        self._limits = limits
        self._num_sequences = 0
        self._spent = 0
        self._weights: Mapping[DeltaDigest, int] = {}

    def begin(self, num_sequences: int, prompt_tokens: int, weights: Mapping[DeltaDigest, int] | None = None) -> None:
        """`weights`: bytes of what the request needs on the device, and of what is pinned there. Raises RateLimited;
        BadRequest for more sequences than may ever run at once, QuotaExceeded for more weights."""
        weights = weights or {}
        most, most_bytes = self._limits.max_concurrent, self._limits.max_resident_bytes
        if most_bytes is not None:
            check_weights(weights, most_bytes)
        if most is not None and num_sequences > most:
            raise BadRequest(
                f"{num_sequences} sequences in one request; this tenant may have {most} at once", param="n"
            )
        with self._gate.account(self._tenant_id, self._limits) as account:
            if most is not None and account.concurrent + num_sequences > most:
                raise RateLimited(f"this tenant has {account.concurrent} sequences of {most} at once", retry_after_s=1)
            if account.tokens is not None and (wait_s := account.tokens.wait_s(prompt_tokens)) > 0:
                raise _too_many("tokens", account.tokens, wait_s)
            if most_bytes is not None and (held := sum({**account.weights, **weights}.values())) > most_bytes:
                raise RateLimited(f"{held} bytes of models would be in use, of at most {most_bytes}", retry_after_s=1)
            account.users.update(weights.keys())
            account.weights |= weights
            self._weights = weights
            account.concurrent += num_sequences
            self._num_sequences = num_sequences
            self.spend(prompt_tokens)
            self._headers.update(account.headers())

    def spend(self, tokens: int) -> None:
        with self._gate.account(self._tenant_id, self._limits) as account:
            self._spent += tokens
            if account.tokens is not None:
                account.tokens.level -= tokens

    def end(self, *, did_run: bool = True) -> None:
        """May be called again."""
        if not did_run:
            self.spend(-self._spent)
        with self._gate.account(self._tenant_id, self._limits) as account:
            account.concurrent -= self._num_sequences
            self._num_sequences = 0
            account.users.subtract(self._weights.keys())
            for digest in [digest for digest in self._weights if not account.users[digest]]:
                del account.users[digest], account.weights[digest]
            self._weights = {}


class Gate:
    """Where every request for an answer enters. In memory: a restart fills all buckets. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._accounts: dict[int, _Account] = {}

    def enter(self, tenant_id: int, limits: Limits, headers: dict[str, str]) -> Ticket:
        """Takes one request from the bucket, before any work is done for it. Raises RateLimited."""
        with self.account(tenant_id, limits) as account:
            self.refuse_if_empty(tenant_id, limits, headers)
            if account.requests is not None:
                account.requests.level -= 1
            headers.update(account.headers())
        return Ticket(self, tenant_id, limits, headers)

    def refuse_if_empty(self, tenant_id: int, limits: Limits, headers: dict[str, str]) -> None:
        """Takes nothing: before the body of what would be refused by `enter` is read. Raises RateLimited."""
        with self.account(tenant_id, limits) as account:
            if account.requests is not None and (wait_s := account.requests.wait_s(1)) > 0:
                headers.update(account.headers())
                raise _too_many("requests", account.requests, wait_s)

    def hold(self, tenant_id: int, num_bytes: int) -> None:
        """So many bytes of a body more, until they are let go: less than none. Raises RateLimited."""
        with self._lock:
            account = self._accounts.setdefault(tenant_id, _Account())
            if num_bytes > 0 and account.held + num_bytes > MAX_HELD_BYTES:
                raise RateLimited(f"this tenant has {account.held} bytes of bodies in memory", retry_after_s=1)
            account.held += num_bytes

    @contextmanager
    def upload(self, tenant_id: int, limits: Limits, num_bytes: int) -> Iterator[None]:
        """While an upload of so many bytes at most is under way. Raises RateLimited where all of a tenant's together
        would be over `max_bytes`: so the disk never holds more than twice that of it, and what a complete joins."""
        self.reserve(tenant_id, limits, num_bytes)
        try:
            yield
        finally:
            self.release(tenant_id, num_bytes)

    def reserve(self, tenant_id: int, limits: Limits, num_bytes: int) -> None:
        """`upload` that lasts until `release`. Raises RateLimited."""
        with self.account(tenant_id, limits) as account:
            if limits.max_bytes is not None and account.uploading + num_bytes > limits.max_bytes:
                raise RateLimited(
                    f"uploads of {account.uploading} bytes are under way, and this tenant may store {limits.max_bytes}",
                    retry_after_s=1,
                )
            account.uploading += num_bytes

    def release(self, tenant_id: int, num_bytes: int) -> None:
        with self._lock:
            self._accounts[tenant_id].uploading -= num_bytes

    @contextmanager
    def account(self, tenant_id: int, limits: Limits) -> Iterator[_Account]:
        """The tenant's, filled up to now, while nobody else has it."""
        with self._lock:
            account = self._accounts.setdefault(tenant_id, _Account())
            account.refill(limits, self._clock())
            yield account


def check_weights(weights: Mapping[DeltaDigest, int], most_bytes: int) -> None:
    """Raises QuotaExceeded for what may never be on the device at once."""
    if (needed := sum(weights.values())) > most_bytes:
        raise QuotaExceeded(
            f"with what is pinned this needs {needed} bytes of models on the device; this tenant may have {most_bytes}"
        )


def _refilled(bucket: _Bucket | None, per_minute: int | None, now: float) -> _Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return _Bucket(per_minute, now)
    bucket.refill(per_minute, now)
    return bucket


def _too_many(what: str, bucket: _Bucket, wait_s: float) -> RateLimited:
    return RateLimited(
        f"this tenant may use {bucket.per_minute} {what} a minute; the next are free in {_span(wait_s)}",
        retry_after_s=min(math.ceil(wait_s), LONGEST_RETRY_S),
    )


def _span(seconds: float) -> str:
    """As OpenAI writes them: 20ms, 7s, 1m5s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
