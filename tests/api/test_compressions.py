"""Checkpoints and adapters that the server compresses, over plain HTTP: what becomes of good ones and of bad ones."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.prepare import make_delta

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]

QUICK = {"codec": "bitdelta"}


@pytest.fixture(scope="module")
def finetune(make_finetune: Callable[..., Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finetune(tiny_base, tmp_path_factory.mktemp("job") / "tuned", scale=0.05, seed=4)


@pytest.fixture(scope="module")
def expected(finetune: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `QUICK` makes of it."""
    out = tmp_path_factory.mktemp("job") / "delta.safetensors"
    make_delta(Checkpoint.open(tiny_base), Checkpoint.open(finetune), make_codec("bitdelta"), out)
    return out.read_bytes()


@pytest.fixture
def guest(town: Any) -> httpx.Client:
    client: httpx.Client = town.client(town.new_tenant(), "inference", "manage")
    return client


def sharded(finetune: Path, folder: Path) -> Path:
    folder.mkdir()
    tensors = sorted(load_file(finetune / "model.safetensors").items())
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        weight_map |= {key: name for key, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in finetune.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_sharded_checkpoint_becomes_the_artifact_that_the_command_line_makes(
    guest: httpx.Client, jobs: ModuleType, process: ModuleType, finetune: Path, expected: bytes, tmp_path: Path,
    town: Any,
) -> None:  # fmt: skip
    files = jobs.send(guest, sharded(finetune, tmp_path / "sharded"))
    assert {file["id"] for file in guest.get("/v1/files").json()["data"]} == set(files)
    job = jobs.create(guest, "m", files, **QUICK)
    assert (job["object"], job["status"], job["name"], job["model"]) == ("compression", "queued", "m", None)
    done = jobs.ended(guest, job, process.wait_until)
    assert (done["status"], done["model"], done["attempts"], done["error"]) == ("succeeded", "m@1", 1, None)
    result = done["result"]
    assert result["sha256"] == hashlib.sha256(expected).hexdigest()
    assert (result["codec"], result["bytes"], result["version"]) == ("bitdelta", len(expected), 1)
    assert result["seconds"] > 0 and result["peak_memory_bytes"] > 2**27 and 0 < result["mean_relative_error"] < 1
    card = guest.get("/v1/deltas/m").json()
    assert card["sha256"] == result["sha256"] and card["bits_per_parameter"] == result["bits_per_parameter"]
    events = guest.get(f"/v1/compressions/{job['id']}/events").json()["data"]
    assert [events[0]["message"], events[1]["message"], events[-1]["message"]] == ["queued", "started", "succeeded"]
    assert {event["level"] for event in events} == {"info"}
    assert guest.get("/v1/files").json()["data"] == []
    process.wait_until(lambda: jobs.left(town.server.store) == [], "nothing is left")
    body = {"model": "m@1", "prompt": "Many", "max_tokens": 2}
    assert guest.post("/v1/completions", json=body).status_code == 200
    # Who asks for it again because the reply was lost gets this job, although the files are gone.
    assert jobs.create(guest, "m", files, **QUICK) == done
    assert [found["id"] for found in guest.get("/v1/compressions").json()["data"]] == [job["id"]]


def test_without_a_budget_the_report_says_how_near_the_fine_tune_it_is(
    guest: httpx.Client, jobs: ModuleType, process: ModuleType, finetune: Path
) -> None:
    done = jobs.ended(guest, jobs.create(guest, "m", jobs.send(guest, finetune)), process.wait_until)
    tried = done["result"]["tried"]
    assert done["status"] == "succeeded" and done["result"]["codec"] == "auto"
    assert tried[-1]["bits"] == done["result"]["bits_per_parameter"] and tried[-1]["measured"] > 0


def test_an_adapter_is_kept_as_it_is(
    guest: httpx.Client, jobs: ModuleType, process: ModuleType, tiny_base: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    rows, cols = load_file(tiny_base / "model.safetensors")[f"{name}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    factors = {"A": torch.randn(2, cols, generator=generator), "B": torch.randn(rows, 2, generator=generator)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}.lora_{side}.weight": factor for side, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    done = jobs.ended(guest, jobs.create(guest, "m", jobs.send(guest, folder)), process.wait_until)
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert (done["result"]["codec"], done["result"]["layers"]) == ("lora", 1)


def test_what_cannot_be_compressed_is_refused_before_there_is_a_job(
    guest: httpx.Client, jobs: ModuleType, error_of: ErrorOf, finetune: Path, tmp_path: Path
) -> None:
    def refused(status: int, code: str, files: list[str], **recipe: Any) -> dict[str, Any]:
        body = {"name": "m", "files": files, **recipe}
        return error_of(guest.post("/v1/compressions", json=body), status, code)

    files = jobs.send(guest, finetune)
    weights = load_file(finetune / "model.safetensors")
    norm = weights["model.norm.weight"]
    beside = [file["id"] for file in guest.get("/v1/files").json()["data"] if file["filename"] != "model.safetensors"]
    for what, tensors, words in (
        ("another shape", {**weights, "model.norm.weight": torch.zeros(3)}, "model.norm.weight: shape (3,)"),
        ("another type", {**weights, "model.norm.weight": norm.int()}, "model.norm.weight: type I32"),
        ("one too many", {**weights, "more": torch.zeros(2)}, "more: only in m"),
        ("none of them", {"a": torch.zeros(2)}, "differ"),
    ):
        path = tmp_path / "model.safetensors"
        save_file(tensors, path)
        error = refused(422, "invalid_checkpoint", [jobs.send_file(guest, path), *beside])
        assert words in error["message"] and "/" not in error["message"], what
    assert "no safetensors" in refused(422, "invalid_checkpoint", beside)["message"]
    refused(404, "not_found", ["file-0"])
    refused(400, "invalid_request", [*files, files[0]])
    refused(400, "invalid_request", [*files, jobs.send_file(guest, finetune / "config.json")])
    refused(422, "invalid_codec_config", files, codec="zip")
    refused(422, "invalid_codec_config", files, bits=1, rank=2)
    refused(422, "invalid_codec_config", files, codec="dare", max_kl=0.1)
    refused(400, "invalid_request", files, keep=0.9)
    refused(400, "invalid_request", files, bits=-1)
    refused(400, "unsupported_parameter", files, options={"rank": 2})
    refused(409, "name_conflict", files, name="tiny")
    refused(400, "invalid_name", files, name="no name")
    hostile = jobs.send_file(guest, finetune / "chat_template.jinja", b"{{ ''.__class__.__mro__ }}")
    rest = [file["id"] for file in guest.get("/v1/files").json()["data"] if file["id"] in files]
    without = [file for file in rest if guest.get(f"/v1/files/{file}").json()["filename"] != "chat_template.jinja"]
    refused(400, "chat_template_error", [*without, hostile])
    for name, data in (
        ("chat_template.jinja", b"\xff"),
        ("tokenizer_config.json", b'{"chat_template": [1]}'),
        ("tokenizer_config.json", b"[" * 9999),
        ("config.json", b"{"),
        ("adapter_config.json", b"\xff"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": ".."}}'),
    ):
        names = {file: guest.get(f"/v1/files/{file}").json()["filename"] for file in rest}
        some = [file for file in rest if names[file] not in (name, "chat_template.jinja")]
        message = refused(422, "invalid_checkpoint", [*some, jobs.send_file(guest, finetune / name, data)])["message"]
        assert "/" not in message, (name, message)
    assert guest.get("/v1/compressions").json()["data"] == []
    for file in guest.get("/v1/files").json()["data"]:
        assert guest.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}


@pytest.mark.parametrize(
    ("filename", "data", "status", "code"),
    [
        ("pytorch_model.bin", b"\x80\x04", 400, "invalid_name"),
        ("../model.safetensors", b"x", 400, "invalid_name"),
        ("modeling_evil.py", b"x", 400, "invalid_name"),
        (".json", b"x", 400, "invalid_name"),
        ("model.safetensors", b"PK\x03\x04" + bytes(64), 422, "invalid_checkpoint"),
        ("template.jinja", bytes(2**20 + 1), 413, "artifact_too_large"),
    ],
)  # fmt: skip
def test_files_of_other_kinds_are_not_kept(
    guest: httpx.Client, error_of: ErrorOf, filename: str, data: bytes, status: int, code: str
) -> None:
    form: dict[str, Any] = {"data": {"purpose": "user_data"}, "files": {"file": (filename, data)}}
    error_of(guest.post("/v1/files", **form), status, code)
    assert guest.get("/v1/files").json()["data"] == []


def test_forms_that_are_none_are_refused(guest: httpx.Client, error_of: ErrorOf) -> None:
    def field(name: str, value: bytes, filename: str = "") -> bytes:
        named = f'; filename="{filename}"' if filename else ""
        return f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + value + b"\r\n"

    file, end = field("file", b"{}", "config.json"), b"--b--\r\n"
    purpose = field("purpose", b"user_data")
    for what, body in {
        "no purpose": file + end,
        "another purpose": field("purpose", b"fine-tune") + file + end,
        "a long purpose": field("purpose", b"x" * 5000) + file + end,
        "two purposes": purpose + purpose + file + end,
        "two files": purpose + file + file + end,
        "no file": purpose + end,
        "another field": purpose + field("more", b"x") + file + end,
        "cut": purpose + file[:-10],
    }.items():
        reply = guest.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert reply.status_code == 400, (what, reply.text)
        error_of(reply, 400, "invalid_request")
    assert guest.get("/v1/files").json()["data"] == []


def test_numbers_that_are_none_and_files_that_are_no_json_fail_the_job_with_the_reason(
    guest: httpx.Client, jobs: ModuleType, process: ModuleType, finetune: Path, tmp_path: Path
) -> None:
    weights = load_file(finetune / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    files = [jobs.send_file(guest, finetune / "config.json"), jobs.send_file(guest, tmp_path / "model.safetensors")]
    bad = jobs.send_file(guest, finetune / "tokenizer.json", b"[" * 50_000)
    first, second = (jobs.create(guest, "m", some, **QUICK) for some in (files, [*files, bad]))
    failed = jobs.ended(guest, first, process.wait_until)
    assert failed["status"] == "failed" and failed["error"]["code"] == "invalid_checkpoint"
    assert failed["error"]["message"].startswith("model.norm.weight: 1 NaN and 0 infinite entries of")
    failed = jobs.ended(guest, second, process.wait_until)
    assert failed["error"]["code"] == "invalid_checkpoint" and "/" not in failed["error"]["message"], failed["error"]
    # The files stay for another attempt, and the request is a new one.
    assert len(guest.get("/v1/files").json()["data"]) == 3
    again = jobs.create(guest, "m", files, **QUICK)
    assert again["id"] != first["id"]
    assert guest.post(f"/v1/compressions/{again['id']}/cancel").json()["status"] == "cancelled"
    assert guest.delete(f"/v1/files/{bad}").status_code == 200


def test_code_beside_a_checkpoint_is_ignored(
    guest: httpx.Client, jobs: ModuleType, process: ModuleType, finetune: Path, expected: bytes
) -> None:
    config = json.loads((finetune / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    files = [
        jobs.send_file(guest, path, json.dumps(config).encode() if path.name == "config.json" else None)
        for path in finetune.iterdir()
    ]
    done = jobs.ended(guest, jobs.create(guest, "m", files, **QUICK), process.wait_until)
    assert (done["error"], done["status"]) == (None, "succeeded")
    assert done["result"]["sha256"] == hashlib.sha256(expected).hexdigest()


def test_an_idempotency_key_is_one_request(
    guest: httpx.Client, jobs: ModuleType, error_of: ErrorOf, finetune: Path
) -> None:
    files = jobs.send(guest, finetune)
    body = {"name": "m", "files": files, **QUICK}
    replies = [guest.post("/v1/compressions", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert len({reply.json()["id"] for reply in replies}) == 1
    other = guest.post("/v1/compressions", json={**body, "seed": 1}, headers={"Idempotency-Key": "k"})
    assert error_of(other, 400, "invalid_request")["param"] == "Idempotency-Key"
    job = replies[0].json()
    error_of(guest.delete(f"/v1/files/{files[0]}"), 409, "file_in_use")
    assert [guest.post(f"/v1/compressions/{job['id']}/cancel").json()["status"] for _ in range(2)] == ["cancelled"] * 2
    key = {"Idempotency-Key": "k"}
    assert guest.post("/v1/compressions", json=body, headers=key).json()["status"] == "cancelled", "it is that job"


def test_files_count_against_the_quota_until_the_job_has_read_them(
    town: Any, jobs: ModuleType, process: ModuleType, error_of: ErrorOf, finetune: Path
) -> None:
    sizes = sum(path.stat().st_size for path in finetune.iterdir())
    name = town.new_tenant(max_bytes=sizes + 100)
    http = town.client(name, "inference", "manage")
    files = jobs.send(http, finetune)
    assert http.get("/v1/usage").json()["bytes"] == sizes
    form: dict[str, Any] = {"data": {"purpose": "user_data"}, "files": {"file": ("config.json", b"{}" + b" " * 200)}}
    error_of(http.post("/v1/files", **form), 403, "quota_exceeded")
    assert len(http.get("/v1/files").json()["data"]) == len(files)
    done = jobs.ended(http, jobs.create(http, "m", files, **QUICK), process.wait_until)
    assert done["status"] == "succeeded"
    assert http.get("/v1/usage").json()["bytes"] == done["result"]["bytes"]
    assert town.admin("DELETE", f"tenants/{name}")["deleted"]


def test_a_tenants_end_is_the_end_of_its_jobs_and_files(town: Any, jobs: ModuleType, finetune: Path) -> None:
    name = town.new_tenant()
    http = town.client(name, "manage")
    job = jobs.create(http, "m", jobs.send(http, finetune), **QUICK)
    assert town.admin("DELETE", f"tenants/{name}")["deleted"]
    assert town["admin"].get(f"/v1/compressions/{job['id']}").json()["status"] == "cancelled"


def test_a_cancelled_job_ends_at_once_and_leaves_nothing(
    start_server: Callable[..., Any], jobs: ModuleType, process: ModuleType, error_of: ErrorOf, finetune: Path
) -> None:
    server = start_server()
    files = jobs.send(server.http, finetune)
    job = jobs.create(server.http, "m", files, **QUICK)
    process.wait_until(lambda: jobs.workers(server), "a worker runs")
    cancelled = server.http.post(f"/v1/compressions/{job['id']}/cancel").json()
    assert (cancelled["status"], cancelled["model"]) == ("cancelled", None)
    process.wait_until(lambda: not jobs.workers(server), "the worker has ended")
    process.wait_until(lambda: jobs.left(server.store) == [], "nothing is left")
    error_of(server.http.get("/v1/deltas/m"), 404, "model_not_found")
    done = jobs.ended(
        server.http, jobs.create(server.http, "m", jobs.send(server.http, finetune), **QUICK), process.wait_until
    )
    assert done["status"] == "succeeded", "and the next one runs"
    error_of(server.http.post(f"/v1/compressions/{done['id']}/cancel"), 400, "job_closed")
    assert server.stop() == 0 and "Traceback" not in server.printed


def test_a_worker_that_is_killed_fails_its_job_and_the_server_lives(
    start_server: Callable[..., Any], jobs: ModuleType, process: ModuleType, finetune: Path
) -> None:
    server = start_server()
    job = jobs.create(server.http, "m", jobs.send(server.http, finetune), **QUICK)
    (worker,) = process.wait_until(lambda: jobs.workers(server), "a worker runs")
    os.kill(worker, signal.SIGKILL)
    failed = jobs.ended(server.http, job, process.wait_until)
    assert (failed["status"], failed["error"]["code"], failed["attempts"]) == ("failed", "worker_died", 1)
    assert "memory" in failed["error"]["message"]
    assert server.http.get("/health").status_code == 200
    assert server.stop() == 0


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_job_outlives_its_server(
    start_server: Callable[..., Any], jobs: ModuleType, process: ModuleType, finetune: Path, expected: bytes, way: str
) -> None:
    server = start_server()
    job = jobs.create(server.http, "m", jobs.send(server.http, finetune), **QUICK)
    (worker,) = process.wait_until(lambda: jobs.workers(server), "a worker runs")
    getattr(server, way)()
    process.wait_until(lambda: not os.path.exists(f"/proc/{worker}"), "the worker ends with its server")

    server = start_server()
    done = jobs.ended(server.http, job, process.wait_until)
    assert (done["status"], done["attempts"]) == ("succeeded", 2 if way == "kill" else 1)
    assert done["result"]["sha256"] == hashlib.sha256(expected).hexdigest()
    process.wait_until(lambda: jobs.left(server.store) == [], "nothing is left")
    server.stop()


def test_a_server_that_takes_no_jobs_says_so(
    start_server: Callable[..., Any], jobs: ModuleType, error_of: ErrorOf, finetune: Path
) -> None:
    server = start_server("--jobs", "0")
    files = jobs.send(server.http, finetune)
    reply = server.http.post("/v1/compressions", json={"name": "m", "files": files})
    assert "--jobs" in error_of(reply, 403, "insufficient_permissions")["message"]
    server.stop()


def test_a_job_that_needs_more_memory_than_it_may_have_says_so(
    start_server: Callable[..., Any], jobs: ModuleType, process: ModuleType, finetune: Path
) -> None:
    server = start_server("--job-memory-bytes", str(2**30))
    done = jobs.ended(server.http, jobs.create(server.http, "m", jobs.send(server.http, finetune)), process.wait_until)
    assert (done["status"], done["error"]["code"]) == ("failed", "out_of_memory")
    server.stop()
