"""Calls of tools in a model's text: how they are written, found while they arrive, and forced.

Formats: `hermes` (Hermes, Qwen 2.5 and 3, SmolLM 3), one JSON object between tags for each call, text around them;
`llama3_json` (Llama 3.1 to 3.3), nothing but JSON objects. Does not know: templates' language, tokens, HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from deltaserve.engine.grammar_worker import WHITESPACE

ARGUMENTS = ("arguments", "parameters")
KEYS = {"name", "type", "id", *ARGUMENTS}
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolFormat:
    """`tag` opens a call in the text and `end` closes it; without a tag the whole answer is calls or none."""

    name: str
    tag: str
    opening: str  # between the tag and the object
    end: str
    separator: str  # between calls
    arguments: str  # key of the arguments


FORMATS = {
    "hermes": ToolFormat("hermes", "<tool_call>", "\n", "\n</tool_call>", "\n", "arguments"),
    "llama3_json": ToolFormat("llama3_json", "", "", "", "; ", "parameters"),
}


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallOpened:
    index: int  # of the call in its answer
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of call `index`'s arguments."""

    index: int
    text: str


Piece: TypeAlias = Content | CallOpened | CallArguments
State: TypeAlias = Callable[[list[Piece], bool], bool]  # takes from what is pending; False: it needs more


def detect_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it knows no tools, or writes calls in another way."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return FORMATS["hermes"]
    return FORMATS["llama3_json"] if "ipython" in template and '"parameters"' in template else None


def calls_grammar(
    form: ToolFormat, tools: Mapping[str, Any], *, forced: bool, several: bool, answer: Any | None = None
) -> str:
    """Lark, of an answer that calls `tools` (name → JSON schema of the arguments), with `forced` one at least. Else it
    may be text, or JSON of the schema `answer` where there is one. `several` calls, or one."""
    lines = ["%llguidance {}"]
    for place, (name, schema) in enumerate(tools.items()):
        opening = f'{{"name": {json.dumps(name)}, "{form.arguments}": '
        lines.append(f'call_{place}: {json.dumps(opening)} arguments_{place} "}}"')
        lines.append(f"arguments_{place}: %json {_schema(schema)}")
    lines.append("call: " + " | ".join(f"call_{place}" for place in range(len(tools))))
    body = " ".join(part for part in (_quoted(form.opening), "call", _quoted(form.end)) if part)
    tagged = f"{_quoted(form.tag)} {body}"
    if several:
        lines.append(f"calls: {tagged} ({_quoted(form.separator)} {tagged})*")
    else:
        lines.append(f"calls: {tagged}")
    if forced:
        return "\n".join([*lines, "start: calls"])
    if answer is not None:
        return "\n".join([*lines, "start: calls | answer", f"answer: %json {_schema(answer)}"])
    if not form.tag:
        return "\n".join([*lines, "start: calls | TEXT |", r"TEXT: /[^{](.|\n)*/"])
    lines += [r"TEXT: /(.|\n)*/", f"found[lazy]: TEXT {_quoted(form.tag)}", f"piece: found {body}"]
    return "\n".join([*lines, "start: piece* TEXT" if several else "start: piece | TEXT"])


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _schema(schema: Any) -> str:
    if isinstance(schema, dict):
        schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema}
    return json.dumps(schema)


class CallParser:
    """One answer's text → content and calls, as it arrives. A call of none of `names` is content, as it was written;
    white space before a call and around its tags is dropped."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._pending = ""  # not decided yet
        self._state: State = self._text if form.tag else self._start
        self._object = CallObject()
        self._is_open = False  # the object is known to be a call
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        self._pending += text
        return self._run(is_last=False)

    def finish(self) -> list[Piece]:
        """What was held back."""
        return self._run(is_last=True)

    def _run(self, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._state(pieces, is_last):
            pass
        return pieces

    def _start(self, _: list[Piece], is_last: bool) -> bool:
        """Without tags: is the answer calls?"""
        text = self._pending.lstrip().removeprefix(PYTHON_TAG).lstrip()
        if text.startswith("{"):
            self._pending = text
            self._state = self._open()
        elif PYTHON_TAG.startswith(text) and not is_last:
            return False
        else:
            self._state = self._text
        return True

    def _text(self, pieces: list[Piece], is_last: bool) -> bool:
        tag, text = self._form.tag, self._pending
        if tag and tag in text:
            before, _, self._pending = text.partition(tag)
            _say(before.rstrip(), pieces)
            self._state = self._open()
            return True
        held = 0 if is_last else _num_held(text, tag)
        self._pending = text[len(text) - held :]
        said = text[: len(text) - held]
        _say(said if said.strip() or not self.num_calls else "", pieces)
        return False

    def _open(self) -> State:
        self._object, self._is_open = CallObject(), False
        return self._inside

    def _inside(self, pieces: list[Piece], is_last: bool) -> bool:
        call = self._object
        self._pending = self._pending[call.feed(self._pending) :]
        if not self._is_open and call.name in self._names and call.has_arguments:
            pieces.append(CallOpened(self.num_calls, call.name))
            self._is_open = True
            self.num_calls += 1
        if self._is_open:
            if more := call.take():
                pieces.append(CallArguments(self.num_calls - 1, more))
            if call.is_closed:
                self._state = self._after
            return call.is_closed
        if call.is_closed or call.is_other or is_last:
            _say(self._form.tag + call.raw, pieces)
            self._state = self._text
            return True
        return False

    def _after(self, _: list[Piece], is_last: bool) -> bool:
        end = self._form.end.strip() or self._form.separator.strip()
        text = self._pending.lstrip()
        if end.startswith(text) and text != end and not is_last:
            return False
        self._pending = text.removeprefix(end)
        self._state = self._text if self._form.tag else self._next
        return True

    def _next(self, _pieces: list[Piece], _is_last: bool) -> bool:
        """Without tags: is there another call?"""
        text = self._pending.lstrip()
        if not text:
            return False
        self._state = self._open() if text.startswith("{") else self._text
        return True


class CallObject:
    """A JSON object while it arrives: its name, and the text of its arguments. As strict as telling the two needs."""

    def __init__(self) -> None:
        self.raw = ""
        self.name = ""
        self.is_closed = False
        self.is_other = False  # no call: no object, or an object of other keys
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._key: str | None = None
        self._value = ""  # of the key, or the key itself, so far
        self._arguments: str | None = None
        self._num_taken = 0

    @property
    def has_arguments(self) -> bool:
        return self._arguments is not None

    def feed(self, text: str) -> int:
        """→ characters used: all, up to the end of the object"""
        for place, char in enumerate(text):
            if self.is_closed or self.is_other:
                return place
            self.raw += char
            self._read(char)
        return len(text)

    def take(self) -> str:
        """The arguments that were not taken yet."""
        text = (self._arguments or "")[self._num_taken :]
        self._num_taken += len(text)
        return text

    def _read(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
        elif char.isspace():
            if self._depth < 2:
                return
        elif char in "{[":
            self._depth += 1
            if self._depth == 1:
                self.is_other = char == "["
                return
        elif char in "}]":
            self._depth -= 1
            if not self._depth:
                self._end_of_value()
                self.is_closed = True
                return
        elif not self._depth:
            self.is_other = True
        elif self._depth == 1 and char == ":" and self._key is None:
            self._key, self._value = _loads(self._value), ""
            self.is_other = self._key not in KEYS
            return
        elif self._depth == 1 and char == ",":
            self._end_of_value()
            return
        elif char == '"':
            self._in_string = True
        self._value += char
        if self._key in ARGUMENTS and not self._value.startswith('"'):
            self._arguments = self._value

    def _end_of_value(self) -> None:
        if self._key == "name":
            self.name = _loads(self._value)
        elif self._key in ARGUMENTS and self._value.startswith('"'):  # JSON inside a string
            self._arguments = _loads(self._value)
        self._key, self._value = None, ""


def _loads(text: str) -> str:
    """The JSON string that `text` is; empty if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _say(text: str, pieces: list[Piece]) -> None:
    if text:
        pieces.append(Content(text))


def _num_held(text: str, tag: str) -> int:
    """Length of the white space, and of the beginning of `tag` after it, at the end of `text`."""
    if not tag:
        return 0
    partial = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
    return len(text) - len(text[: len(text) - partial].rstrip())
