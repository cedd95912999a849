"""The disposable process in which a client's grammar is compiled for the first time. `grammars` starts it as a script.

A hostile grammar can overflow the compiler's stack, or keep it busy for minutes; here it ends this process alone. Its
limits are lower than the server's, so what passes here passes there.

    stdin    {"kind": "json" | "regex" | "grammar" | "lark", "text": str}
    stdout   {"grammar": str}, as the matcher reads it, or {"error": str}
"""

from __future__ import annotations

import json
import random
import resource
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
WHITESPACE = r"( |\n[ \t]{0,20})?"  # between JSON's tokens; unbounded, a weak model never leaves it
CPU_S = 2
MEMORY_BYTES = 2**30
STACK_BYTES = 4 * 2**20  # half of what a thread of the server has
WALK = 64  # bytes of a random text of the grammar, to meet what is compiled lazily


class Bytes:
    """A tokenizer of single bytes."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>"]
    special_token_ids = [256]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def read(kind: str, text: str) -> str:
    """The matcher's form of a grammar. Raises ValueError, RecursionError."""
    if kind == "json":
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(text if kind == "lark" else any_to_lark(text))


def check(grammar: str) -> None:
    """Compiles it and walks through one of its texts. Raises ValueError."""
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), grammar, log_level=0, limits=LIMITS)
    draw = random.Random(0)
    for _ in range(WALK):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(256) if mask[token >> 3] >> (token & 7) & 1]
        if not allowed:
            break
        matcher.consume_token(draw.choice(allowed))
    if matcher.is_error():
        raise ValueError(matcher.get_error())


def answer(job: dict[str, Any], reply: dict[str, str]) -> None:
    try:
        grammar = read(job["kind"], job["text"])
        check(grammar)
    except Exception as error:
        reply["error"] = str(error) or type(error).__name__
    else:
        reply["grammar"] = grammar


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = json.load(sys.stdin)
    reply: dict[str, str] = {}
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=answer, args=(job, reply))
    thread.start()
    thread.join()
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
