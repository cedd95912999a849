"""Every error → OpenAI's shape, here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deltaserve.errors import BadRequest, DeltaServeError, InvalidJson, UnsupportedParameter

logger = logging.getLogger(__name__)
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}


def error_body(error: DeltaServeError) -> dict[str, Any]:
    """{"error": {message, type, param, code}}"""
    kind = TYPES.get(error.http_status, "server_error" if error.http_status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: DeltaServeError) -> JSONResponse:
    headers = {"x-should-retry": "false"} if error.http_status in (409, 500) else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(error_body(error), error.http_status, headers)


def install(app: FastAPI) -> None:
    """Handlers for our errors, for bodies that do not fit their schema, and for whatever else is raised."""

    @app.exception_handler(DeltaServeError)
    async def ours(request: Request, error: DeltaServeError) -> JSONResponse:  # noqa: ARG001
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_of_validation(error, request))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        known = {404: "there is no", 405: "this path does not take"}
        what = f"{known.get(error.status_code, str(error.detail))} {request.method} {request.url.path}"
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        fields = {"message": what, "type": "invalid_request_error", "param": None, "code": code}
        return JSONResponse({"error": fields}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(DeltaServeError("the server failed at this request; its log has the reason"))


def _of_validation(error: RequestValidationError, request: Request) -> BadRequest:
    details: list[Mapping[str, Any]] = list(error.errors())
    first = details[0]
    if first["type"] == "json_invalid":
        return InvalidJson(f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["loc"] == ("body",):
        sent = request.headers.get("content-type", "none")
        return InvalidJson(f"the body is no JSON object, or content-type ({sent}) is not application/json")
    for detail in details:
        if detail["type"] == "extra_forbidden":
            field = ".".join(str(part) for part in detail["loc"][1:])
            return UnsupportedParameter(f"`{field}` is not supported by this server", param=field)
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    reasons = dict.fromkeys(f"{'.'.join(str(part) for part in d['loc'][1:])}: {d['msg']}" for d in details)
    return BadRequest("; ".join(list(reasons)[:8]), param=field)
