"""Every error the client raises on purpose.

    DeltaServeClientError
    ├── InvalidArgument             refused before anything was sent (also a ValueError)
    ├── ConnectionFailed            no complete reply: refused, reset, timed out
    │   └── StreamTruncated         a stream stopped without its `[DONE]`: the text is not complete
    ├── UnexpectedReply             a reply that is not what the HTTP contract promises
    └── ApiError                    the server said no: status, code, message, param, request_id
        ├── BadRequest              400
        ├── Unauthorized            401
        ├── Forbidden               403     the key may not, or a quota is reached
        ├── NotFound                404
        ├── Conflict                409
        ├── PreconditionFailed      412     somebody else was faster
        ├── TooLarge                413
        ├── Unprocessable           422
        ├── RateLimited             429, retry_after_s
        └── ServerError             every 5xx
            ├── Unavailable         503, retry_after_s
            ├── StorageFull         507
            └── StreamFailed        an error inside a stream that had begun (its HTTP status was 200)

A status without a class of its own is a plain `ApiError`. `code` is the server's stable name for the case.
"""

from __future__ import annotations


class DeltaServeClientError(Exception):
    """Base of the tree."""


class InvalidArgument(DeltaServeClientError, ValueError):
    """An argument that cannot be sent; the message names it."""


class ConnectionFailed(DeltaServeClientError):
    """`maybe_ran` is False when the request surely never reached the server."""

    def __init__(self, message: str, *, maybe_ran: bool = True) -> None:
        super().__init__(message)
        self.maybe_ran = maybe_ran


class StreamTruncated(ConnectionFailed):
    pass


class UnexpectedReply(DeltaServeClientError):
    pass


class ApiError(DeltaServeClientError):
    """`retry_after_s` is what the server asked for, None where it asked for nothing."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        details = [f"{self.status} {self.code}"]
        if self.param is not None:
            details.append(f"param {self.param}")
        if self.request_id is not None:
            details.append(f"request {self.request_id}")
        return f"{self.message} ({', '.join(details)})"


class BadRequest(ApiError):
    pass


class Unauthorized(ApiError):
    pass


class Forbidden(ApiError):
    pass


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    pass


class PreconditionFailed(ApiError):
    pass


class TooLarge(ApiError):
    pass


class Unprocessable(ApiError):
    pass


class RateLimited(ApiError):
    pass


class ServerError(ApiError):
    pass


class Unavailable(ServerError):
    pass


class StorageFull(ServerError):
    pass


class StreamFailed(ServerError):
    pass


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: PreconditionFailed,
    413: TooLarge,
    422: Unprocessable,
    429: RateLimited,
    503: Unavailable,
    507: StorageFull,
}


def class_for_status(status: int) -> type[ApiError]:
    """The error class of an HTTP status that is not a success."""
    return _BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
