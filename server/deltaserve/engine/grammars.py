"""What an answer may be: JSON schemas, regular expressions and grammars, as masks over the vocabulary (llguidance).

Owns: the processes that try a grammar first (`grammar_worker.py`), the threads that compute masks, and a matcher for
each sequence. Does not know: models, sampling, HTTP. A grammar comes from a client and is hostile input: it is bounded
in bytes, tried in a process that may die, and its masks are computed on threads that the engine does not wait for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from deltaserve.engine.grammar_worker import CPU_S, LIMITS, MEMORY_BYTES
from deltaserve.errors import GrammarError, QueueFull

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORKER_FILE = Path(__file__).with_name("grammar_worker.py")
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_TRIALS = 2  # at once
TRIAL_TIMEOUT_S = 10.0
MAX_KNOWN = 256  # grammars that were tried and found good
DEBUG_TAG = "<non-verbose/>"  # of the library's own
MAX_REASON_CHARS = 500
MASK_THREADS = 2
MASK_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Grammar:
    """What a client asked for: a JSON schema, a regular expression (Rust's syntax), or a grammar in Lark or GBNF."""

    kind: Literal["json", "regex", "grammar", "lark"]  # grammar: either, by its looks
    text: str


class Grammars:
    """Compiles. Thread-safe; blocks, so not for the event loop nor the engine's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trials = threading.Semaphore(MAX_TRIALS)
        self._known: OrderedDict[Grammar, str] = OrderedDict()
        self._tokenizers: WeakKeyDictionary[PreTrainedTokenizerFast, LLTokenizer] = WeakKeyDictionary()
        self._pool = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="mask")

    def compile(self, grammar: Grammar, tokenizer: PreTrainedTokenizerFast) -> Compiled:
        """Raises GrammarError with the reason, QueueFull when too many are tried at once."""
        matcher = LLMatcher(self._tokenizer(tokenizer), self._tried(grammar), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        return Compiled(matcher, self._pool)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def warm_up(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Reads the vocabulary: half a second for 49k tokens, in which no other thread of Python runs."""
        self._tokenizer(tokenizer)

    def _tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> LLTokenizer:
        with self._lock:
            if tokenizer not in self._tokenizers:
                self._tokenizers[tokenizer] = from_tokenizer(tokenizer)
            return self._tokenizers[tokenizer]

    def _tried(self, grammar: Grammar) -> str:
        size = len(grammar.text.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"the grammar has {size} bytes, allowed are {MAX_GRAMMAR_BYTES}")
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
                return self._known[grammar]
        if not self._trials.acquire(timeout=TRIAL_TIMEOUT_S):
            raise QueueFull("other grammars are being compiled and none finished in time")
        try:
            made = _try(grammar)
        finally:
            self._trials.release()
        with self._lock:
            self._known[grammar] = made
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return made


@dataclass(frozen=True)
class Compiled:
    """A grammar at its beginning."""

    _matcher: LLMatcher
    _pool: ThreadPoolExecutor

    def guide(self) -> MatcherGuide:
        """For one sequence."""
        return MatcherGuide(self._matcher.deep_copy(), self._pool)


class MatcherGuide:
    """Implements engine.types.Guide. The mask of the next token is computed while the model runs."""

    def __init__(self, matcher: LLMatcher, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._pool = pool
        self._began_s: float | None = None
        self._mask: Future[tuple[bytes, bool]] = pool.submit(self._compute)

    def is_ready(self, deadline_s: float) -> bool:
        try:
            self._mask.exception(max(deadline_s - time.monotonic(), 0))
        except NotYet:
            if self._began_s is not None and time.monotonic() - self._began_s > MASK_TIMEOUT_S:
                raise GrammarError(f"the grammar needs more than {MASK_TIMEOUT_S:g} s for one token") from None
            return False
        return True

    def allowed(self) -> tuple[bytes, bool]:
        return self._mask.result()

    def advance(self, token_id: int) -> bool:
        if not self._matcher.consume_token(token_id):
            raise GrammarError(_reason(self._matcher.get_error()))
        if self._matcher.is_stopped():
            return True
        self._began_s = None
        self._mask = self._pool.submit(self._compute)
        return False

    def _compute(self) -> tuple[bytes, bool]:
        self._began_s = time.monotonic()
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(_reason(self._matcher.get_error()))
        return mask, self._matcher.is_accepting()


def _try(grammar: Grammar) -> str:
    """The matcher's form of `grammar`, compiled once where it can do no harm. Raises GrammarError."""
    job = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode()
    command = [sys.executable, "-I", str(WORKER_FILE)]
    try:
        done = subprocess.run(command, input=job, capture_output=True, timeout=TRIAL_TIMEOUT_S, env={}, cwd="/")
        reply = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise GrammarError(
            f"the grammar is too complex: compiling it takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB"
        ) from None
    if "error" in reply:
        raise GrammarError(_reason(reply["error"]))
    return str(reply["grammar"])


def _reason(message: str) -> str:
    return f"the grammar cannot be used: {message.removesuffix(DEBUG_TAG).strip()[:MAX_REASON_CHARS]}"
