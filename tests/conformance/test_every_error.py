"""Every code of the error tree, by the official client with its retries on. What is nowhere met fails a test."""

from __future__ import annotations

import base64
import json
import zlib
from typing import TYPE_CHECKING, Any

import openai
import pytest

from deltaserve.api.openapi import BY_CODE

from .callers import ASK, KEY, KIND, LIMIT_BYTES, ROOT, official

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[..., Any]


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
    "internal_error": "tests/conformance/test_every_error.py",  # a bug: none is known
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
