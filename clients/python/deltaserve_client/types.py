"""What the server's JSON becomes: small frozen values.

Fields that a newer server adds are ignored here and stay readable in `raw`, the reply's own dict.
A promised field that is missing, or of another type, raises `UnexpectedReply`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from deltaserve_client.errors import UnexpectedReply

T = TypeVar("T")
Json = dict[str, Any]


@dataclass(frozen=True)
class Delta:
    """One stored fine-tune. `state` is where its weights are now: "device", "host" or "disk"."""

    id: str
    version: int
    sha256: str
    created: int  # unix seconds
    codec: str
    disk_bytes: int
    resident_bytes: int
    bits_per_parameter: float
    base: str  # fingerprint of the base model, 64 hex digits
    state: str
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Json) -> Delta:
        return cls(
            id=take(raw, "id", str),
            version=take(raw, "version", int),
            sha256=take(raw, "sha256", str),
            created=take(raw, "created", int),
            codec=take(raw, "codec", str),
            disk_bytes=take(raw, "disk_bytes", int),
            resident_bytes=take(raw, "resident_bytes", int),
            bits_per_parameter=take(raw, "bits_per_parameter", float),
            base=take(raw, "base", str),
            state=take(raw, "state", str),
            raw=raw,
        )


@dataclass(frozen=True)
class Model:
    """A name that completions accept. `parent` is the base's id for a delta, None for the base itself."""

    id: str
    created: int  # unix seconds
    root: str
    parent: str | None
    max_model_len: int
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Json) -> Model:
        return cls(
            id=take(raw, "id", str),
            created=take(raw, "created", int),
            root=take(raw, "root", str),
            parent=take_or_none(raw, "parent", str),
            max_model_len=take(raw, "max_model_len", int),
            raw=raw,
        )


@dataclass(frozen=True)
class Choice:
    text: str
    finish_reason: str | None

    @classmethod
    def from_json(cls, raw: Json) -> Choice:
        """Accepts the choice of a completion, of a chat, and of a chunk of either one's stream."""
        if "text" in raw:
            text = take(raw, "text", str)
        else:
            message = take(raw, "message" if "message" in raw else "delta", dict)
            text = take_or_none(message, "content", str) or ""
        return cls(text=text, finish_reason=take_or_none(raw, "finish_reason", str))


@dataclass(frozen=True)
class Completion:
    """The answer of `complete` and of `chat`. `text` and `finish_reason` are those of the first choice."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int
    raw: Json = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @classmethod
    def from_json(cls, raw: Json) -> Completion:
        usage = take(raw, "usage", dict)
        choices = tuple(Choice.from_json(choice) for choice in take_dicts(raw, "choices"))
        if not choices:
            raise UnexpectedReply("choices: empty")
        return cls(
            id=take(raw, "id", str),
            model=take(raw, "model", str),
            choices=choices,
            prompt_tokens=take(usage, "prompt_tokens", int),
            completion_tokens=take(usage, "completion_tokens", int),
            raw=raw,
        )


@dataclass(frozen=True)
class Compression:
    """A job that makes a model of a fine-tune. `model` is what to ask once it has succeeded; `progress` is 0 … 1."""

    id: str
    status: str  # queued, running, succeeded, failed, cancelled
    name: str
    model: str | None
    progress: float
    step: str  # what is at work
    seconds_left: int | None  # of that
    error: str | None
    raw: Json = field(repr=False, compare=False)

    @property
    def is_open(self) -> bool:
        return self.status in ("queued", "running")

    @classmethod
    def from_json(cls, raw: Json) -> Compression:
        status, progress = take(raw, "status", str), take_or_none(raw, "progress", dict) or {}
        error = take_or_none(raw, "error", dict)
        return cls(
            id=take(raw, "id", str),
            status=status,
            name=take(raw, "name", str),
            model=take_or_none(raw, "model", str),
            progress=take(progress, "fraction", float) if progress else float(status == "succeeded"),
            step=take(progress, "step", str) if progress else "",
            seconds_left=take_or_none(progress, "seconds_left", int),
            error=take(error, "message", str) if error else None,
            raw=raw,
        )


@dataclass(frozen=True)
class Version:
    version: str
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Json) -> Version:
        return cls(version=take(raw, "version", str), raw=raw)


def take(raw: Json, name: str, kind: type[T]) -> T:
    """`raw[name]`, which must be a `kind`; a JSON integer will do for a float."""
    value = raw.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        found = type(value).__name__ if name in raw else "missing"
        raise UnexpectedReply(f"{name}: expected {kind.__name__}, found {found}")
    return value


def take_or_none(raw: Json, name: str, kind: type[T]) -> T | None:
    return None if raw.get(name) is None else take(raw, name, kind)


def take_dicts(raw: Json, name: str) -> list[Json]:
    items: list[Any] = take(raw, name, list)
    if not all(isinstance(item, dict) for item in items):
        raise UnexpectedReply(f"{name}: expected a list of objects")
    return items
