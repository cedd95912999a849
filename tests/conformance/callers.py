"""Ways to call any route: curl, our client, and the official one, sync and async."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai

from deltaserve_client import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[..., Any]


KEY = "every-route"
ROOT = Path(__file__).parents[2]
ASK = {"model": "tiny", "prompt": "Many", "max_tokens": 1}
KIND = {"mime_type": "application/octet-stream", "purpose": "fine-tune"}
LIMIT_BYTES = 200_000


def form(path: str, part: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Fields and files of the two routes that take a form."""
    if path.endswith("/v1/files"):
        return {"purpose": "user_data"}, {"file": ("config.json", part)}
    return {}, {"data": part}


def by_curl(url: str, tmp_path: Path) -> Call:
    def call(method: str, path: str, body: Any = None, *, raw: bytes | None = None, part: bytes | None = None) -> Any:
        command = [
            "curl",
            "-sS",
            "--fail-with-body",
            "-X",
            method,
            f"{url}{path}",
            "-H",
            f"Authorization: Bearer {KEY}",
        ]
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        if raw is not None or part is not None:
            (tmp_path / "sent").write_bytes(raw if raw is not None else part or b"")
            sent = f"@{tmp_path / 'sent'}"
            data, files = form(path, b"")
            fields = [
                *(f"{key}={value}" for key, value in data.items()),
                *(f"{key}={sent};filename=config.json" for key in files),
            ]
            command += (
                ["--data-binary", sent] if raw is not None else [word for field in fields for word in ("-F", field)]
            )
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return read(done.stdout)

    return call


def by_ours(url: str, tmp_path: Path) -> Call:
    """What deltaserve_client has no method for, and `request` does not send, goes by plain HTTP with its key."""

    def call(method: str, path: str, body: Any = None, *, raw: bytes | None = None, part: bytes | None = None) -> Any:
        with Client(url, KEY) as client:
            if raw is not None and path.startswith("/v1/deltas/"):
                (tmp_path / "sent").write_bytes(raw)
                return client.upload(path.removeprefix("/v1/deltas/"), tmp_path / "sent").raw
            if part is None and path not in ("/health", "/metrics") and "lora" not in path:
                return client.request(method, path, body)
        data, forms = form(path, part or b"")
        files: dict[str, Any] = {"json": body} if body is not None else {}
        if part is not None:
            files = {"data": data, "files": forms}
        headers = {"Authorization": f"Bearer {KEY}"}
        return read(httpx.request(method, url + path, headers=headers, **files).raise_for_status().text)

    return call


def official(method: str, url: str, body: Any, raw: bytes | None, part: bytes | None) -> dict[str, Any]:
    """Arguments of the client's own `request`, the way of all its methods."""
    options: dict[str, Any] = {"method": method.lower(), "url": url}
    if raw is not None:
        return {**options, "content": raw, "headers": {"Content-Type": "application/octet-stream"}}
    if part is not None:
        data, files = form(url, part)
        return {**options, "files": files, "json_data": data, "headers": {"Content-Type": "multipart/form-data"}}
    return {**options, "json_data": body}


def by_openai(url: str, _: Path) -> Call:
    def call(method: str, path: str, body: Any = None, *, raw: bytes | None = None, part: bytes | None = None) -> Any:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            made = openai._models.FinalRequestOptions(**official(method, url + path, body, raw, part))
            return read(client.request(str, made))

    return call


def by_async_openai(url: str, _: Path) -> Call:
    def call(method: str, path: str, body: Any = None, *, raw: bytes | None = None, part: bytes | None = None) -> Any:
        async def run() -> Any:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
                made = openai._models.FinalRequestOptions(**official(method, url + path, body, raw, part))
                return read(await client.request(str, made))

        return asyncio.run(run())

    return call


def read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
