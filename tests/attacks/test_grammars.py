"""Grammars written to overflow, exhaust or occupy the server. Each ends soon: as a clear error, or it was harmless."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.engine.grammars import Grammar, Grammars
from deltaserve.errors import GrammarError

if TYPE_CHECKING:
    from collections.abc import Callable

SOON_S = 12.0  # of a shared machine; the limit is 2 s of processor time


def rules(count: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(count)) + f'r{count}: "a"\n'


def all_of(count: int) -> str:
    return json.dumps({"type": "string", "allOf": [{"pattern": f"a.*{i}.*b"} for i in range(count)]})


REFUSED = {
    "rules-overflow-the-stack": Grammar("grammar", rules(4000)),
    "intersections-never-end": Grammar("json", all_of(300)),
    "repetitions-of-repetitions": Grammar("regex", "x(a{1000}){1000}"),
    "parentheses": Grammar("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000),
    "gbnf-parentheses": Grammar("grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000),
    "regex-parentheses": Grammar("regex", "(" * 9000 + "a" + ")" * 9000),
    "deep-schema": Grammar("json", '{"items":' * 5000 + "{}" + "}" * 5000),
    "product-of-choices": Grammar(
        "json",
        json.dumps({"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(4)]} for i in range(12)]}),
    ),
    "a-schema-of-itself": Grammar("json", '{"$ref":"#"}'),
    "a-file": Grammar("json", '{"$ref":"file:///etc/passwd"}'),
}
ALLOWED = {
    "a-million-items": Grammar("json", '{"type":"array","items":{"type":"null"},"minItems":1000000}'),
    "a-million-characters": Grammar("json", '{"type":"string","minLength":999999}'),
    "left-recursion": Grammar("grammar", 'start: start start | "a" | '),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_soon(name: str, compiler: Grammars, tokenizer: Any) -> None:
    began = time.monotonic()
    with pytest.raises(GrammarError) as caught:
        compiler.compile(REFUSED[name], tokenizer)
    assert time.monotonic() - began < SOON_S
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_only_large_compiles_soon_and_gives_masks(name: str, compiler: Grammars, tokenizer: Any) -> None:
    guide = compiler.compile(ALLOWED[name], tokenizer).guide()
    for _ in range(20):
        assert guide.is_ready(time.monotonic() + SOON_S)
        bits, _ = guide.allowed()
        token = next(token for token in range(8 * len(bits)) if bits[token >> 3] >> (token & 7) & 1)
        if guide.advance(token):
            break


def test_a_server_under_hostile_grammars_answers_others(start_server: Callable[..., Any], at_once: Any) -> None:
    server = start_server()

    def ask(**fields: Any) -> int:
        body = {"model": "tiny", "prompt": "Many", "max_tokens": 20, "ignore_eos": True, **fields}
        return int(server.http.post("/v1/completions", json=body).status_code)

    hostile = [
        {"structured_outputs": {"grammar": rules(4000)}},
        {"structured_outputs": {"json": all_of(300)}},
        {"structured_outputs": {"regex": "x(a{1000}){1000}"}},
    ]
    calls = [lambda fields=fields: ask(**fields) for fields in (*hostile, {}, {}, {})]
    assert at_once(calls) == [400, 400, 400, 200, 200, 200]
    server.wait_idle()
