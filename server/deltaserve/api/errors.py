"""Every error → OpenAI's shape, here and nowhere else."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from deltaserve.errors import (
    BadRequest,
    DeltaServeError,
    InvalidJson,
    MethodNotAllowed,
    NotFound,
    UnsupportedParameter,
)

logger = logging.getLogger(__name__)
TRIED = re.compile(r"str$|constrained-|function-|list\[")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
CLIENT_GONE = 499  # as nginx logs it
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}


def error_body(error: DeltaServeError) -> dict[str, Any]:
    """{"error": {message, type, param, code}}"""
    kind = TYPES.get(error.http_status, "server_error" if error.http_status >= 500 else "invalid_request_error")
    param = None if error.param is None else _encodable(error.param)
    return {"error": {"message": _encodable(error.message), "type": kind, "param": param, "code": error.code}}


def error_response(error: DeltaServeError) -> JSONResponse:
    headers = {"x-should-retry": "false"} if error.http_status in (409, 500) else {}
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.http_status == 408:
        headers["Connection"] = "close"  # the rest of the body is not waited for
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(error_body(error), error.http_status, headers)


def install(app: FastAPI) -> None:
    """Handlers for our errors, for bodies that do not fit their schema, and for paths that do not exist."""

    @app.exception_handler(DeltaServeError)
    async def ours(request: Request, error: DeltaServeError) -> JSONResponse:  # noqa: ARG001
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_of_validation(error, request))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:  # noqa: ARG001
        return Response(status_code=CLIENT_GONE)  # nobody reads it; the metrics count it

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, DeltaServeError):  # raised while the body was read
            return error_response(error.__cause__)
        if error.status_code == 400:  # FastAPI's only one: json.loads gave up on nesting, number length or encoding
            return error_response(InvalidJson("the body cannot be read as JSON: its nesting, a number or its encoding"))
        asked = f"{request.method} {request.url.path}"
        refusal = (
            MethodNotAllowed(f"this path does not take {asked}")
            if error.status_code == 405
            else NotFound(f"there is no {asked}")
        )
        reply = error_response(refusal)
        if error.status_code == 405:  # of every router with this path, not of the first alone
            reply.headers["Allow"] = ", ".join(method for method in METHODS if _takes(app, request, method))
        return reply


def _takes(app: FastAPI, request: Request, method: str) -> bool:
    return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in app.routes)


def _where(detail: Mapping[str, Any]) -> str:
    """`messages.0.content.1.text`: the way to a value, without pydantic's names of what it tried there."""
    parts = [str(part) for part in detail["loc"][1:]]
    return ".".join(part for place, part in enumerate(parts) if not place or not TRIED.match(part))


def unexpected(method: str, path: str, error: Exception) -> JSONResponse:
    """For whatever no handler knows; the log has the reason."""
    logger.error("%s %s failed", method, path, exc_info=error)
    return error_response(DeltaServeError("the server failed at this request; its log has the reason"))


def _encodable(text: str) -> str:
    """JSON can spell lone surrogates, UTF-8 cannot."""
    return text.encode(errors="backslashreplace").decode()


def _of_validation(error: RequestValidationError, request: Request) -> BadRequest:
    details: list[Mapping[str, Any]] = list(error.errors())
    first = details[0]
    if first["type"] == "json_invalid":
        return InvalidJson(f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["loc"] == ("body",) and first["type"] == "value_error":
        return BadRequest(f"the body: {first['msg']}")
    if first["loc"] == ("body",):
        sent = request.headers.get("content-type", "none")
        return InvalidJson(f"the body is no JSON object, or content-type ({sent}) is not application/json")
    for detail in details:
        if detail["type"] == "extra_forbidden":
            field = _where(detail)
            return UnsupportedParameter(f"`{field}` is not supported by this server", param=field)
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    reasons = dict.fromkeys(f"{_where(d)}: {d['msg']}" for d in details)
    return BadRequest("; ".join(list(reasons)[:8]), param=param)
