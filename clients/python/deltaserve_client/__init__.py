"""Python client of deltaserve. Needs httpx and nothing else: no torch, no server.

from deltaserve_client import Client

with Client("http://127.0.0.1:8000") as client:
    client.upload("numwords", "numwords.delta")
    print(client.complete("numwords", "12 =", max_tokens=16).text)
"""

from deltaserve_client.aio import AsyncClient
from deltaserve_client.calls import DEFAULT_URL
from deltaserve_client.client import Client
from deltaserve_client.errors import (
    ApiError,
    BadRequest,
    Conflict,
    ConnectionFailed,
    DeltaServeClientError,
    Forbidden,
    InvalidArgument,
    NotFound,
    PreconditionFailed,
    RateLimited,
    ServerError,
    StorageFull,
    StreamFailed,
    StreamTruncated,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnexpectedReply,
    Unprocessable,
)
from deltaserve_client.types import Choice, Completion, Compression, Delta, Model, Version

__all__ = [
    "DEFAULT_URL",
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "Choice",
    "Client",
    "Completion",
    "Compression",
    "Conflict",
    "ConnectionFailed",
    "Delta",
    "DeltaServeClientError",
    "Forbidden",
    "InvalidArgument",
    "Model",
    "NotFound",
    "PreconditionFailed",
    "RateLimited",
    "ServerError",
    "StorageFull",
    "StreamFailed",
    "StreamTruncated",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnexpectedReply",
    "Unprocessable",
    "Version",
]
