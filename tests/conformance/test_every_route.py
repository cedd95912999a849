"""Every route of the OpenAPI document, by curl, by our client and by the official one, sync and async; and every code
of the error tree, by the official client with its retries on. What is in neither table fails a test."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from deltaserve.api.openapi import BY_CODE, REPLIES
from deltaserve_client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Call = Callable[..., Any]

KEY = "every-route"
ROOT = Path(__file__).parents[2]
ASK = {"model": "tiny", "prompt": "Many", "max_tokens": 1}
KIND = {"mime_type": "application/octet-stream", "purpose": "fine-tune"}
LIMIT_BYTES = 200_000


@pytest.fixture(scope="module")
def imports(tenants: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imports")
    (root / "sign.safetensors").write_bytes(tenants["sign"].artifact)
    return root


@pytest.fixture(scope="module")
def site(process: Any, tiny_base: Path, imports: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("site") / "store"
    flags = ["--import-root", str(imports), "--max-upload-bytes", str(LIMIT_BYTES)]
    running = process.ServerProcess(tiny_base, store, *flags, api_key=KEY)
    try:
        yield running.wait_ready()
        assert running.stop() == 0, running.printed
        assert "Traceback" not in running.printed, running.printed
    finally:
        running.close()


@pytest.fixture(scope="module")
def routes(site: Any) -> set[tuple[str, str]]:
    paths = site.http.get("/openapi.json").json()["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}


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


FREE = ("loras", "detail")  # objects whose names are data


def check_shape(reply: Any, example: Any, where: str) -> None:
    """The names and types of a reply are those of its example in the OpenAPI document."""
    if reply is None or example is None:
        return
    number = isinstance(reply, int | float) and isinstance(example, int | float)
    assert number or type(reply) is type(example), (where, reply, example)
    if isinstance(reply, dict) and where not in FREE:
        assert reply.keys() == example.keys(), where
        for name, value in reply.items():
            check_shape(value, example[name], name)
    elif isinstance(reply, list) and example:
        for value in reply:
            check_shape(value, example[0], where)


CLIENTS = {"curl": by_curl, "ours": by_ours, "openai": by_openai, "async-openai": by_async_openai}


@pytest.mark.parametrize("kind", CLIENTS)
def test_every_route_answers(
    kind: str,
    site: Any,
    routes: set[tuple[str, str]],
    tenants: dict[str, Any],
    tiny_base: Path,
    imports: Path,
    tmp_path: Path,
) -> None:
    send = CLIENTS[kind](site.url, tmp_path)
    seen: set[tuple[str, str]] = set()

    def call(method: str, route: str, *args: Any, query: str = "", **more: Any) -> Any:
        """`route` as the document has it, with its values after the names: /v1/models/{model=x}."""
        seen.add((method, re.sub(r"=[^}]*", "", route)))
        reply = send(method, re.sub(r"\{\w+=([^}]*)\}", r"\1", route) + query, *args, **more)
        if route != "/health":
            check_shape(reply, REPLIES[f"{method} {re.sub(r'=[^}]*', '', route)}"], route)
        return reply

    tenant, sign, other = f"by-{kind}", tenants["sign"].artifact, tenants["lowrank"].artifact
    assert call("GET", "/health") == "" and call("GET", "/version")["version"]
    assert "vllm:num_requests_running" in call("GET", "/metrics")
    assert call("POST", "/v1/admin/tenants", {"name": tenant})["id"] == tenant
    assert tenant in [one["id"] for one in call("GET", "/v1/admin/tenants")["data"]]
    assert call("GET", f"/v1/admin/tenants/{{name={tenant}}}")["models"] == 0
    limited = call("PATCH", f"/v1/admin/tenants/{{name={tenant}}}", {"limits": {"max_models": 9}})
    assert limited["limits"]["max_models"] == 9
    key = call("POST", "/v1/admin/keys", {"tenant": tenant})
    assert [one["id"] for one in call("GET", "/v1/admin/keys", query=f"?tenant={tenant}")["data"]] == [key["id"]]
    new = call("POST", f"/v1/admin/keys/{{key_id={key['id']}}}/rotate", {})
    assert call("DELETE", f"/v1/admin/keys/{{key_id={new['id']}}}")["revoked"]
    name = f"{tenant}:m"
    assert [call("PUT", f"/v1/deltas/{{name={name}}}", raw=raw)["version"] for raw in (sign, other)] == [1, 2]
    assert call("GET", f"/v1/deltas/{{name={name}}}")["version"] == 2
    assert call("PATCH", f"/v1/deltas/{{name={name}}}", {"version": 1})["active"] == 1
    assert name in [one["id"] for one in call("GET", "/v1/deltas")["data"]]
    assert len(call("GET", f"/v1/deltas/{{name={name}}}/versions")["data"]) == 2
    assert call("POST", f"/v1/deltas/{{name={name}}}/prewarm")["id"] == name
    assert call("POST", "/v1/completions", {**ASK, "model": name})["usage"]["completion_tokens"] == 1
    chat = {"model": f"{name}@2", "messages": [{"role": "user", "content": "Many"}], "max_tokens": 1}
    assert call("POST", "/v1/chat/completions", chat)["object"] == "chat.completion"
    assert name in [one["id"] for one in call("GET", "/v1/models")["data"]]
    assert call("GET", f"/v1/models/{{model={name}}}")["owned_by"] == tenant
    begun = {"bytes": len(sign), "filename": f"{tenant}:u.safetensors", **KIND}
    one, two = (call("POST", "/v1/uploads", begun)["id"] for _ in range(2))
    part = call("POST", f"/v1/uploads/{{upload_id={one}}}/parts", part=sign)["id"]
    assert call("GET", f"/v1/uploads/{{upload_id={one}}}")["parts"][0]["id"] == part
    done = call("POST", f"/v1/uploads/{{upload_id={one}}}/complete", {"part_ids": [part]})
    assert done["file"]["id"] == f"{tenant}:u@1"
    assert call("POST", f"/v1/uploads/{{upload_id={two}}}/cancel")["status"] == "cancelled"
    config, weights = ((tiny_base / file).read_bytes() for file in ("config.json", "model.safetensors"))
    spare, file = (call("POST", "/v1/files", part=config)["id"] for _ in range(2))
    assert call("DELETE", f"/v1/files/{{file_id={spare}}}")["deleted"]
    assert call("GET", f"/v1/files/{{file_id={file}}}")["filename"] == "config.json"
    begun = {"bytes": len(weights), "filename": "model.safetensors", **KIND, "purpose": "user_data"}
    upload = send("POST", "/v1/uploads", begun)["id"]
    part = send("POST", f"/v1/uploads/{upload}/parts", part=weights)["id"]
    sent = [send("POST", f"/v1/uploads/{upload}/complete", {"part_ids": [part]})["file"]["id"], file]
    assert {one["id"] for one in call("GET", "/v1/files")["data"]} == set(sent)
    job = call("POST", "/v1/compressions", {"name": f"{tenant}:j", "files": sent, "codec": "bitdelta"})["id"]
    assert call("GET", "/v1/compressions")["data"][0]["id"] == job
    assert call("GET", f"/v1/compressions/{{compression_id={job}}}")["name"] == f"{tenant}:j"
    assert call("GET", f"/v1/compressions/{{compression_id={job}}}/events")["data"][0]["message"] == "queued"
    assert call("POST", f"/v1/compressions/{{compression_id={job}}}/cancel")["status"] == "cancelled"
    lora = {"lora_name": f"{tenant}:l", "lora_path": "sign.safetensors"}
    assert call("POST", "/v1/load_lora_adapter", lora).startswith("Success")
    assert call("POST", "/v1/unload_lora_adapter", {"lora_name": f"{tenant}:l"}).startswith("Success")
    source = {"uri": (imports / "sign.safetensors").as_uri()}
    assert call("POST", "/v1/loras", {"lora_name": f"{tenant}:l", "source": source})["status"] == "success"
    assert f"{tenant}:l" in call("GET", "/v1/loras")["loras"]
    assert call("DELETE", f"/v1/loras/{{lora_name={tenant}:l}}")["lora_name"] == f"{tenant}:l"
    assert call("GET", "/v1/usage")["object"] == call("GET", "/v1/admin/usage")["object"] == "list"
    assert call("GET", "/v1/admin/audit")["data"][0]["action"] == "model.delete"
    assert call("DELETE", f"/v1/models/{{model={name}@2}}")["deleted"]
    assert call("DELETE", f"/v1/deltas/{{name={name}}}")["deleted"]
    assert call("DELETE", f"/v1/admin/tenants/{{name={tenant}}}")["deleted"]
    assert seen == routes, "what is documented and not asked, or the other way round"


def edited(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """An artifact with its manifest changed."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    text = header["__metadata__"]["deltaserve"]
    manifest = json.loads(text if text.startswith("{") else zlib.decompress(base64.b64decode(text)))
    change(manifest)
    header["__metadata__"]["deltaserve"] = json.dumps(manifest)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + raw[8 + size :]


def misnamed(manifest: dict[str, Any]) -> None:
    name = next(iter(manifest["layers"]))
    manifest["layers"][name[:-1] + "x"] = manifest["layers"].pop(name)


SCOLDING = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"


class Asker:
    """The official client on one server, for each code the call that is answered with it."""

    def __init__(self, site: Any, sign: bytes) -> None:
        self.site, self.sign = site, sign
        for name, limits in (("small", {"max_models": 0}), ("slow", {"requests_per_minute": 1})):
            if site.http.get(f"/v1/admin/tenants/{name}").status_code == 404:
                site.http.post("/v1/admin/tenants", json={"name": name, "limits": limits}).raise_for_status()

    def key(self, tenant: str) -> str:
        body = {"tenant": tenant, "scopes": ["inference", "manage"]}
        return str(self.site.http.post("/v1/admin/keys", json=body).json()["key"])

    def ask(self, method: str, path: str, body: Any = None, *, key: str = KEY, **more: Any) -> None:
        raw = more.pop("raw", None)
        retries = more.pop("max_retries", openai.DEFAULT_MAX_RETRIES)
        arguments = official(method, self.site.url + path, body, raw, None)
        arguments["headers"] = {**arguments.get("headers", {}), **more}
        with openai.OpenAI(base_url=f"{self.site.url}/v1", api_key=key, max_retries=retries) as client:
            client.request(str, openai._models.FinalRequestOptions(**arguments))

    def put(self, raw: bytes, name: str = "bad", **more: Any) -> None:
        self.ask("PUT", f"/v1/deltas/{name}", raw=raw, **more)

    def complete(self, **more: Any) -> None:
        self.ask("POST", "/v1/completions", {**ASK, **more})

    def invalid_json(self) -> None:
        self.ask("POST", "/v1/completions", raw=b"{", **{"Content-Type": "application/json"})

    def chat_template_error(self) -> None:
        self.put(edited(self.sign, lambda manifest: manifest.update(chat_template=SCOLDING)), "scolding")
        messages = [{"role": "user", "content": "no"}]
        self.ask("POST", "/v1/chat/completions", {"model": "scolding", "messages": messages})

    def upload_closed(self) -> None:
        body = {"bytes": 4, "filename": "u.safetensors", **KIND}
        upload = self.site.http.post("/v1/uploads", json=body).json()["id"]
        self.site.http.post(f"/v1/uploads/{upload}/cancel").raise_for_status()
        self.ask("POST", f"/v1/uploads/{upload}/complete", {"part_ids": ["part_0"]})

    def version_in_use(self) -> None:
        self.put(self.sign, "held")
        self.ask("DELETE", "/v1/deltas/held@1")

    def precondition_failed(self) -> None:
        self.put(self.sign, "new", **{"If-Match": '"0-0"'})

    def artifact_not_finite(self) -> None:
        data = 8 + int.from_bytes(self.sign[:8], "little")
        self.put(self.sign[:data] + b"\xff" * (len(self.sign) - data))

    def rate_limit_exceeded(self) -> None:
        key = self.key("slow")
        for _ in range(2):
            self.ask("POST", "/v1/completions", ASK, key=key, max_retries=0)  # or it waits, as it is told to


BASE = {"fingerprint": "0" * 64, "name": "another"}
CALLS: dict[str, Callable[[Asker], None]] = {
    "invalid_request": lambda asker: asker.complete(n=0),
    "invalid_json": Asker.invalid_json,
    "unsupported_parameter": lambda asker: asker.complete(cache_salt="x"),
    "context_length_exceeded": lambda asker: asker.complete(prompt=[5] * 700),
    "invalid_name": lambda asker: asker.put(asker.sign, "a%20b"),
    "chat_template_error": Asker.chat_template_error,
    "invalid_grammar": lambda asker: asker.complete(structured_outputs={"regex": "("}),
    "upload_closed": Asker.upload_closed,
    "digest_mismatch": lambda asker: asker.put(asker.sign, f"bad?sha256={'0' * 64}"),
    "invalid_api_key": lambda asker: asker.ask("GET", "/v1/models", key="ds-wrong"),
    "insufficient_permissions": lambda asker: asker.ask("GET", "/v1/admin/keys", key=asker.key("small")),
    "quota_exceeded": lambda asker: asker.put(asker.sign, key=asker.key("small")),
    "not_found": lambda asker: asker.ask("GET", "/v1/uploads/upload_0"),
    "model_not_found": lambda asker: asker.complete(model="nobody"),
    "method_not_allowed": lambda asker: asker.ask("DELETE", "/v1/completions"),
    "name_conflict": lambda asker: asker.put(asker.sign, "tiny"),
    "version_in_use": Asker.version_in_use,
    "precondition_failed": Asker.precondition_failed,
    "artifact_too_large": lambda asker: asker.put(b"x" * (LIMIT_BYTES + 1)),
    "invalid_artifact": lambda asker: asker.put(edited(asker.sign, lambda manifest: manifest.update(version=9))),
    "artifact_corrupt": lambda asker: asker.put(asker.sign[:-1]),
    "artifact_mismatch": lambda asker: asker.put(edited(asker.sign, misnamed)),
    "artifact_not_finite": Asker.artifact_not_finite,
    "base_mismatch": lambda asker: asker.put(edited(asker.sign, lambda manifest: manifest.update(base=BASE))),
    "rate_limit_exceeded": Asker.rate_limit_exceeded,
}
ELSEWHERE = {  # what needs a server that is full, failing, ending or slow; and what only the command line meets
    "queue_full": "tests/api/test_guard.py",
    "draining": "tests/api/test_lifecycle.py",
    "insufficient_storage": "tests/api/test_deltas.py",
    "request_timeout": "tests/attacks/test_slow_clients.py",
    "engine_failure": "tests/faults/test_faults.py",
    "delta_load_failed": "tests/faults/test_faults.py",
    "numerical_error": "tests/faults/test_faults.py",
    "internal_error": "tests/conformance/test_every_route.py",  # a bug: none is known
    "registry_unavailable": "tests/accounts/test_postgres.py",
    "store_unavailable": "tests/deltas/test_residency.py",
    "store_in_use": "tests/deltas/test_store.py",
    "incompatible_store": "tests/accounts/test_registry.py",
    "invalid_checkpoint": "tests/conformance/test_compressions.py",
    "invalid_codec_config": "tests/conformance/test_compressions.py",
    "job_closed": "tests/api/test_compressions.py",
    "file_in_use": "tests/api/test_compressions.py",
}
EXCEPTIONS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


@pytest.mark.parametrize("code", CALLS)
def test_every_error_is_the_clients_exception_and_is_not_sent_again(
    code: str, site: Any, tenants: dict[str, Any]
) -> None:
    asker, kind = Asker(site, tenants["sign"].artifact), BY_CODE[code]
    before = site.metric("http_requests_total", status=str(kind.http_status))
    with pytest.raises(EXCEPTIONS.get(kind.http_status, openai.APIStatusError)) as caught:
        CALLS[code](asker)
    error = caught.value
    assert (error.code, error.status_code) == (code, kind.http_status), error
    assert error.request_id and isinstance(error.body, dict)
    assert error.body.keys() == {"message", "type", "param", "code"}
    if error.status_code == 409:
        assert error.response.headers["x-should-retry"] == "false"
    if error.status_code == 429:
        assert 1 <= int(error.response.headers["retry-after"]) <= 120
    sent = site.metric("http_requests_total", status=str(kind.http_status)) - before
    assert sent == 1, "what is refused for good is asked once"


def test_every_code_of_the_tree_is_met_somewhere() -> None:
    assert CALLS.keys() | ELSEWHERE.keys() == BY_CODE.keys() and not CALLS.keys() & ELSEWHERE.keys()
    for code, file in ELSEWHERE.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert code in text or BY_CODE[code].__name__ in text, (code, file)
