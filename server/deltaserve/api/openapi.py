"""The OpenAPI document and the errors table: what the error tree says, at every route that can answer with it; and an
example of every reply, from replies.json."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from deltaserve import errors
from deltaserve.api.errors import error_body
from deltaserve.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactMismatch,
    ArtifactNotFinite,
    ArtifactTooLarge,
    AuthenticationFailed,
    BadRequest,
    BaseMismatch,
    ContextLengthExceeded,
    DeltaLoadFailed,
    DeltaServeError,
    DigestMismatch,
    Draining,
    EngineFailure,
    GrammarError,
    InvalidJson,
    InvalidName,
    ModelNotFound,
    NotFound,
    NumericalError,
    PermissionDenied,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    RegistryUnavailable,
    RequestTimeout,
    StorageFull,
    StoreUnavailable,
    TemplateError,
    UnsupportedParameter,
)

OWN = "x-errors"
REPLIES = json.loads(Path(__file__).with_name("replies.json").read_text())  # by method and path, one of each
OURS = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "additionalProperties": False,
    "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": "string"},
    },
}}, "additionalProperties": False}  # fmt: skip


ANSWERS = (  # of a request for tokens
    *(ModelNotFound, ContextLengthExceeded, TemplateError, GrammarError, QuotaExceeded, RateLimited, QueueFull),
    *(EngineFailure, DeltaLoadFailed, NumericalError, Draining, StoreUnavailable),
)
EVERYWHERE = (AuthenticationFailed, PermissionDenied, UnsupportedParameter, DeltaServeError, RegistryUnavailable)
REFUSALS = (  # of an artifact
    *(ArtifactError, ArtifactCorrupt, ArtifactMismatch, ArtifactNotFinite, BaseMismatch, TemplateError),
    *(ArtifactTooLarge, QuotaExceeded, DigestMismatch, RateLimited, StorageFull, StoreUnavailable),
    *(NotFound, InvalidName),
)


BY_CODE = {
    kind.code: kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, DeltaServeError)
}


def raises(*kinds: type[DeltaServeError]) -> dict[str, Any]:
    """A route's `openapi_extra`: the errors it has beside those of all routes, which `document` spells out."""
    return {OWN: [kind.code for kind in kinds]}


def document(app: FastAPI, open_paths: Iterable[str]) -> None:
    """Every route but the open ones may refuse a key; every one with parameters a request that does not fit them."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        made = plain()
        made["components"]["schemas"]["Error"] = OURS
        for unused in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(unused, None)
        for path, operations in made["paths"].items():
            for method, operation in operations.items():
                own = operation["responses"]
                for media in [media for reply in own.values() for media in reply.get("content", {}).values()]:
                    media.setdefault("example", REPLIES.get(f"{method.upper()} {path}"))
                if "HTTPValidationError" in str(own.get("422", "")):  # FastAPI's, which this server never sends
                    del own["422"]
                _add(own, _responses(map(BY_CODE.__getitem__, operation.pop(OWN, ()))))
                if path not in open_paths:
                    _add(own, _responses(EVERYWHERE))
                if operation.get("parameters") or "requestBody" in operation:
                    _add(own, _responses((BadRequest,)))
                if "requestBody" in operation:
                    _add(own, _responses((RequestTimeout,)))
                if "application/json" in operation.get("requestBody", {}).get("content", {}):
                    _add(own, _responses((InvalidJson,)))
                operation["responses"] = dict(sorted(own.items()))
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _responses(kinds: Iterable[type[DeltaServeError]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in kinds:
        reply = {
            "description": "refused" if kind.http_status < 500 else "failed",
            "content": {"application/json": {
                "schema": {"$ref": "#/components/schemas/Error"},
                "examples": {kind.code: {"summary": meaning(kind), "value": _example(kind)}},
            }},
        }  # fmt: skip
        if kind.retry_after_s is not None:
            reply["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
        _add(found, {str(kind.http_status): reply})
    return found


def _add(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Fields of `more`, and those below them; what is there stays."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _add(into[key], value)
        else:
            into.setdefault(key, value)


def _example(kind: type[DeltaServeError]) -> dict[str, Any]:
    error = kind.__new__(kind)
    DeltaServeError.__init__(error, meaning(kind))
    return error_body(error)


def meaning(kind: type[DeltaServeError]) -> str:
    if kind is DeltaServeError:
        return "The server failed at this request; its log has the reason."
    return inspect.getdoc(kind) or ""


def errors_table() -> str:
    """The table of server/README.md, in Markdown."""
    rows = ["| status | code | when |", "|---|---|---|"]
    for kind in sorted(BY_CODE.values(), key=lambda kind: kind.http_status):
        retry = ", Retry-After" if kind.retry_after_s is not None else ""
        rows.append(f"| {kind.http_status}{retry} | `{kind.code}` | {meaning(kind)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(errors_table(), end="")  # noqa: T201
