"""What a grammar costs on a real tokenizer: trying it, compiling it, and each token's mask.

    python tests/benchmarks/grammar_cost.py BASE [--rounds N]

Walks a valid JSON document through its schema. `trial` is a process of its own, once a grammar; `mask` runs on a thread
while the model computes; `apply` and `advance` are what the engine's own thread does for a row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

import torch

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.engine.grammars import Grammar, Grammars
from deltaserve.engine.sampling import Generators, sample
from deltaserve.engine.types import Request, SamplingParams
from deltaserve.ids import RequestId

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaserve.engine.types import TextSink

TEXT = {"type": "string"}
ADDRESS = {"city": TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}
FIELDS = {
    "name": TEXT,
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "email": {"type": "string", "format": "email"},
    "tags": {"type": "array", "items": TEXT, "maxItems": 5},
    "address": {"type": "object", "properties": ADDRESS, "required": [*ADDRESS], "additionalProperties": False},
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}
DOCUMENT = (
    '{"name": "Ada Lovelace", "age": 36, "email": "ada@example.com", "tags": ["math", "poetry and programming"], '
    '"address": {"city": "London", "zip": "12345"}}'
)


class Mute:
    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:  # noqa: ARG002
        return "", None

    def finish(self) -> str:
        return ""


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def request_of(size: int, sink: TextSink) -> Request:
    return Request(
        id=RequestId("r"),
        digest=None,
        prompt_ids=[1],
        params=SamplingParams(max_tokens=1000, temperature=0.0),
        eos_ids=frozenset({2}),
        vocab_size=size,
        sink=sink,
        emit=lambda event: None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(Checkpoint.open(args.base).directory, None)
    grammars, size = Grammars(), len(tokenizer)
    print(f"vocabulary {size}")  # noqa: T201
    built = timed(lambda: grammars.compile(Grammar("regex", "a"), tokenizer))
    print(f"first grammar of a tokenizer: {1e3 * built:.0f} ms")  # noqa: T201
    ids = tokenizer(DOCUMENT, add_special_tokens=False).input_ids
    times: dict[str, list[float]] = {"trial": [], "compile": [], "mask": [], "apply": [], "advance": []}
    logits = torch.randn(1, size)
    plain = request_of(size, Mute())
    free = statistics.median(timed(lambda: sample(logits, [plain], Generators())) for _ in range(100))
    for turn in range(args.rounds):
        grammar = Grammar("json", json.dumps({**SCHEMA, "title": str(turn)}))
        times["trial"].append(timed(lambda g=grammar: grammars._tried(g)))  # type: ignore[misc]
        times["compile"].append(timed(lambda g=grammar: grammars.compile(g, tokenizer)))  # type: ignore[misc]
        guide = grammars.compile(grammar, tokenizer).guide()
        request = request_of(size, Mute())
        request.guide = guide
        for token in ids:
            guide._mask.result()
            times["mask"].append(timed(guide._compute))
            times["apply"].append(timed(lambda r=request: sample(logits, [r], Generators())) - free)  # type: ignore[misc]
            times["advance"].append(timed(lambda g=guide, t=token: g.advance(t)))  # type: ignore[misc]
    print(f"sampling a row without a grammar: {1e6 * free:.0f} us; {len(ids)} tokens, {args.rounds} rounds")  # noqa: T201
    print("us        median       p95       max")  # noqa: T201
    for name, seconds in times.items():
        ordered = sorted(1e6 * s for s in seconds)
        at95 = ordered[int(0.95 * len(ordered))]
        print(f"{name:8s}{statistics.median(ordered):9.1f} {at95:9.1f} {ordered[-1]:9.1f}")  # noqa: T201
    grammars.close()


if __name__ == "__main__":
    sys.exit(main())
