"""Masks of a grammar over a real tokenizer, and what a slow one costs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.engine import grammars
from deltaserve.engine.grammars import Grammar, Grammars
from deltaserve.errors import GrammarError

if TYPE_CHECKING:
    from deltaserve.engine.types import Guide

WAIT_S = 20.0


def mask(guide: Guide) -> tuple[set[int], bool]:
    assert guide.is_ready(time.monotonic() + WAIT_S)
    bits, may_end = guide.allowed()
    return {token for token in range(8 * len(bits)) if bits[token >> 3] >> (token & 7) & 1}, may_end


def accepts(guide: Guide, tokenizer: Any, text: str) -> bool:
    """Does the grammar let `text` follow, token by token, and end there?"""
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        allowed, _ = mask(guide)
        if token not in allowed:
            return False
        if guide.advance(token):
            return True
    return mask(guide)[1]


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("regex", "[0-9]{3}-(a|ü)+"), ["123-aü", "000-a"], ["12-a", "123-", "123-b"]),
        (Grammar("json", '{"type":"array","items":{"type":"integer","maximum":9}}'), ["[]", "[1, 2]"], ["[10]", "[a]"]),
        (Grammar("json", '{"type":"object"}'), ['{"a": [null]}', "{}"], ["[]", '"a"', "{" + 30 * " " + "}"]),
        (Grammar("grammar", 'start: "a" start "b" | "ab"'), ["ab", "aaabbb"], ["aab", "ba"]),
        (Grammar("grammar", 'root ::= "x" rest\nrest ::= [0-9]+'), ["x12"], ["x", "12"]),
    ],
    ids=["regex", "schema", "object", "lark", "gbnf"],
)
def test_a_grammar_accepts_its_texts_and_no_others(
    compiler: Grammars, tokenizer: Any, grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    compiled = compiler.compile(grammar, tokenizer)
    assert [accepts(compiled.guide(), tokenizer, text) for text in good] == [True] * len(good)
    assert [accepts(compiled.guide(), tokenizer, text) for text in bad] == [False] * len(bad)


def test_special_tokens_are_no_text(compiler: Grammars, tokenizer: Any) -> None:
    allowed, _ = mask(compiler.compile(Grammar("regex", "(.|\\n)*"), tokenizer).guide())
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    assert special
    assert not special & allowed
    assert len(allowed) > 200


def test_guides_of_one_grammar_are_independent(compiler: Grammars, tokenizer: Any) -> None:
    compiled = compiler.compile(Grammar("regex", "ab"), tokenizer)
    first, second = compiled.guide(), compiled.guide()
    allowed, _ = mask(first)
    assert first.advance(tokenizer.convert_tokens_to_ids("a")) is False
    assert mask(first)[0] != allowed
    assert mask(second)[0] == allowed


def test_a_token_that_the_grammar_excludes_is_an_error(compiler: Grammars, tokenizer: Any) -> None:
    guide = compiler.compile(Grammar("regex", "a"), tokenizer).guide()
    mask(guide)
    with pytest.raises(GrammarError, match="satisfy"):
        guide.advance(tokenizer.convert_tokens_to_ids("b"))


def test_a_mask_that_is_late_is_waited_for_and_one_that_takes_too_long_is_an_error(
    compiler: Grammars, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, busy = compiler.compile(Grammar("regex", "a"), tokenizer), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(busy.wait, WAIT_S)
        guide = grammars.MatcherGuide(compiled._matcher.deep_copy(), pool)
        assert not guide.is_ready(time.monotonic())  # it waits for its turn: that is not its fault
        monkeypatch.setattr(grammars, "MASK_TIMEOUT_S", 0.0)
        assert not guide.is_ready(time.monotonic())
        guide._began_s = time.monotonic() - 1
        with pytest.raises(GrammarError, match="for one token"):
            guide.is_ready(time.monotonic())
        busy.set()
    assert guide.is_ready(time.monotonic() + WAIT_S)


def test_a_grammar_is_tried_once(compiler: Grammars, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar("regex", "once")
    compiler.compile(grammar, tokenizer)
    monkeypatch.setattr(grammars, "_try", lambda grammar: pytest.fail("tried again"))
    compiler.compile(grammar, tokenizer)
