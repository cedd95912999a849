"""Calls in text, however it is cut; and grammars that force them."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.engine.grammars import Grammar, Grammars
from deltaserve.engine.tool_calls import (
    FORMATS,
    CallArguments,
    CallOpened,
    CallParser,
    Content,
    calls_grammar,
    detect_format,
)

if TYPE_CHECKING:
    pass

NAMES = {"f", "g"}
HERMES = {
    '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}\n</tool_call>': (
        "",
        [("f", '{"a": [1, {"b": "}"}]}')],
    ),
    'I see.\n<tool_call>{"arguments": {"q": "\\\\\\""}, "name": "g"}</tool_call>\n'
    '<tool_call>{"name":"f","arguments":{}}</tool_call>\n': ("I see.", [("g", '{"q": "\\\\\\""}'), ("f", "{}")]),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call> done': (" done", [("f", '{"a": 1}')]),
    '<tool_call>{"name": "f", "arguments": {"a": 1': ("", [("f", '{"a": 1')]),  # cut by max_tokens
    '<tool_call>{"name": "f", "arg': ('<tool_call>{"name": "f", "arg', []),
    '<tool_call>{"name": "other", "arguments": {}}</tool_call>': (
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        [],
    ),
    "<tool_call> oops </tool_call> x": ("<tool_call> oops </tool_call> x", []),
    "a  b < tool \n": ("a  b < tool \n", []),
    "a <tool": ("a <tool", []),
    "": ("", []),
}
LLAMA = {
    '{"name": "f", "parameters": {"a": 1}}': ("", [("f", '{"a": 1}')]),
    '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": null}}': (
        "",
        [("f", "{}"), ("g", '{"x": null}')],
    ),
    '{"answer": {"name": "f"}}': ('{"answer": {"name": "f"}}', []),
    '{"name": "f"}': ('{"name": "f"}', []),
    'Call {"name": "f", "parameters": {}}': ('Call {"name": "f", "parameters": {}}', []),
    "[1, 2]": ("[1, 2]", []),
    " \n": (" \n", []),
}
CASES = [("hermes", *case) for case in HERMES.items()] + [("llama3_json", *case) for case in LLAMA.items()]


def parse(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser, found = CallParser(FORMATS[name], NAMES), []
    for piece in pieces:
        found += parser.feed(piece)
    found += parser.finish()
    calls: list[list[str]] = []
    for piece in found:
        if isinstance(piece, CallOpened):
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.text
    assert parser.num_calls == len(calls)
    text = "".join(piece.text for piece in found if isinstance(piece, Content))
    return text, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_calls_are_found_however_the_text_is_cut(name: str, text: str, expected: Any, size: int) -> None:
    assert parse(name, [text[start : start + size] for start in range(0, len(text), size)]) == expected


def test_text_and_arguments_are_told_as_they_come() -> None:
    parser = CallParser(FORMATS["hermes"], NAMES)
    assert parser.feed("Let me ") == [Content("Let me")]
    assert parser.feed("see. <tool") == [Content(" see.")]
    assert parser.feed('_call>{"name": "f", "arguments": {"a": "b') == [
        CallOpened(0, "f"),
        CallArguments(0, '{"a": "b'),
    ]
    assert parser.feed('c"}}') == [CallArguments(0, 'c"}')]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", None),
        ("{{ tools }}", None),
        ("{{ tools }}<tool_call>", "hermes"),
        ('{{ tools }}Environment: ipython {"name": …, "parameters": …}', "llama3_json"),
    ],
)
def test_a_template_tells_its_format(template: str, expected: str | None) -> None:
    form = detect_format(template)
    assert (form and form.name) == expected


TOOLS = {
    "f": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    "g": {
        "$defs": {"x": {"enum": ["::=", "y"]}},
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/x"}},
        "required": ["x"],
        "additionalProperties": False,
    },
}
F, G = '{"name": "f", "%s": {"a": 1}}', '{"name": "g", "%s": {"x": "::="}}'
BAD = '{"name": "f", "%s": {"b": 1}}'
JSON = {"type": "array", "items": {"type": "null"}}


@pytest.mark.parametrize("name", [*FORMATS])
@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"forced": True, "several": True}, {(F,): 1, (F, G): 1, (): 0, (BAD,): 0, "text": 0}),
        ({"forced": True, "several": False}, {(F,): 1, (F, G): 0, "text": 0}),
        ({"forced": False, "several": True}, {(F, G): 1, "text": 1, (BAD,): 0, "": 1}),
        ({"forced": False, "several": False}, {(G,): 1, "text": 1}),
        ({"forced": False, "several": True, "answer": JSON}, {(F, G): 1, "[null]": 1, "text": 0}),
    ],
    ids=["required", "one", "auto", "auto-one", "auto-json"],
)
def test_a_grammar_accepts_calls_of_the_tools_and_nothing_else(
    compiler: Grammars, tokenizer: Any, name: str, options: dict[str, Any], texts: dict[Any, int]
) -> None:
    form = FORMATS[name]
    compiled = compiler.compile(Grammar("lark", calls_grammar(form, TOOLS, **options)), tokenizer)
    for said, expected in texts.items():
        calls = [form.tag + form.opening + call % form.arguments + form.end for call in said if "%" in call]
        text = said if isinstance(said, str) else form.separator.join(calls)
        assert _accepts(compiled.guide(), tokenizer, text) == bool(expected), text


def _accepts(guide: Any, tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for place, token in enumerate(ids):
        assert guide.is_ready(time.monotonic() + 20)
        bits, _ = guide.allowed()
        if not bits[token >> 3] >> (token & 7) & 1:
            return False
        if guide.advance(token):
            return place == len(ids) - 1
    assert guide.is_ready(time.monotonic() + 20)
    return bool(guide.allowed()[1])


def test_names_and_schemas_cannot_break_out_of_the_grammar(compiler: Grammars, tokenizer: Any) -> None:
    schema = {"type": "object", "description": 'x"\nstart: /.*/\n%json {}', "additionalProperties": False}
    text = calls_grammar(FORMATS["hermes"], {"f": schema}, forced=True, several=False)
    guide = compiler.compile(Grammar("lark", text), tokenizer).guide()
    call = "<tool_call>\n" + json.dumps({"name": "f", "arguments": {}}) + "\n</tool_call>"
    assert _accepts(guide, tokenizer, call)
