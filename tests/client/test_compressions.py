"""A fine-tune's directory on its way to a server that compresses it: what is sent, and until when is asked."""

from __future__ import annotations

import functools
import hashlib
import json
from email import message_from_bytes

import httpx
import pytest

from deltaserve.cli import connection, main
from deltaserve_client import ApiError, Client, Conflict, InvalidArgument, Unprocessable
from deltaserve_client.checkpoint import PART_BYTES, files_of


class Server:
    """Keeps what it is sent. `states`: what a job says each time that it is asked."""

    def __init__(self, *states):
        self.files, self.parts, self.jobs, self.keys, self.deleted = {}, {}, [], [], []
        self.states = list(states)

    def __call__(self, request):
        path = request.url.path
        if path == "/v1/uploads":
            body = json.loads(request.content)
            assert body["purpose"] == "user_data"
            self.parts[body["filename"]] = {}
            return httpx.Response(200, json={"id": body["filename"], "bytes": body["bytes"]})
        if path.endswith("/parts"):
            kind = request.headers["content-type"]
            form = message_from_bytes(f"content-type: {kind}\n\n".encode() + request.content)
            (field,) = form.get_payload()
            assert 'name="data"' in field["content-disposition"]
            data = request.content.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
            part = f"part_{hashlib.sha256(data).hexdigest()}"
            self.parts[path.split("/")[3]][part] = data
            return httpx.Response(200, json={"id": part})
        if path.endswith("/complete"):
            name, body = path.split("/")[3], json.loads(request.content)
            assert body["part_ids"] == list(self.parts[name])
            data = b"".join(self.parts[name].values())
            assert body["sha256"] == hashlib.sha256(data).hexdigest()
            self.files[name] = data
            return httpx.Response(200, json={"file": {"id": f"file-{name}"}})
        if request.method == "DELETE":
            self.deleted.append(path)
            return httpx.Response(200, json={"deleted": True})
        if request.method == "POST":
            self.jobs.append(json.loads(request.content) if request.content else {})
            self.keys.append(request.headers.get("idempotency-key"))
            return httpx.Response(202, json=job("cancelled" if path.endswith("/cancel") else "queued"))
        return httpx.Response(200, json=self.states.pop(0))


def job(status, **more):
    fields = {"id": "compression-1", "name": "acme", "model": None, "progress": None, "error": None}
    return {**fields, "status": status, **more}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "tuned"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"w" * (PART_BYTES + 5))
    (made / "config.json").write_text("{}")
    for other in ("README.md", "optimizer.pt", "training_args.bin"):
        (made / other).write_bytes(b"x")
    return made


def test_compress_sends_what_the_server_reads_and_asks_for_a_job(wire, folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n')
    server, seen = Server(), []
    made = wire.ask(
        server, "compress", "acme", folder, keep=0.9, data=rows, bits=None, progress=lambda *now: seen.append(now)
    )
    assert (made.id, made.status, made.is_open) == ("compression-1", "queued", True)
    assert server.files.keys() == {"model.safetensors", "config.json", "rows.jsonl"}
    assert [len(part) for part in server.parts["model.safetensors"].values()] == [PART_BYTES, 5]
    (body,) = server.jobs
    assert body == {
        "name": "acme", "files": ["file-model.safetensors", "file-config.json"], "keep": 0.9, "data": "file-rows.jsonl",
    }  # fmt: skip
    assert server.keys[0]
    total = PART_BYTES + 5 + 2 + len(rows.read_bytes())
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_what_is_lost_is_sent_again_with_the_same_key(wire, folder):
    server, lost = Server(), []

    def unreliable(request):
        reply = server(request)
        if request.url.path not in lost:
            lost.append(request.url.path)
            raise httpx.ReadError("lost", request=request)
        return reply

    assert wire.ask(unreliable, "compress", "acme", folder).id == "compression-1"
    assert len(server.jobs) == 2 and len(set(server.keys)) == 1


def test_wait_asks_until_the_job_has_ended(wire):
    half = {"fraction": 0.5, "step": "model.layers.3", "seconds_left": 7}
    server = Server(job("queued"), job("running", progress=half), job("succeeded", model="acme@1"))
    seen = []
    done = wire.ask(server, "wait", "compression-1", progress=seen.append)
    assert (done.status, done.model, done.is_open) == ("succeeded", "acme@1", False)
    assert [(now.status, now.progress, now.step, now.seconds_left) for now in seen] == [
        ("queued", 0.0, "", None),
        ("running", 0.5, "model.layers.3", 7),
        ("succeeded", 1.0, "", None),
    ]


def test_a_failed_job_says_why(wire):
    error = {"code": "worker_died", "message": "it was killed", "param": None}
    assert wire.ask(Server(job("failed", error=error)), "wait", "compression-1").error == "it was killed"


def test_the_servers_refusals_are_errors(wire, folder):
    def refuse(status):
        def answer(request):
            if request.url.path == "/v1/compressions" or request.url.path.endswith("/cancel"):
                return httpx.Response(status, json={"error": {"message": "no", "code": "c", "param": None}})
            return Server.__call__(server, request)

        server = Server()
        return answer

    with pytest.raises(Unprocessable):
        wire.ask(refuse(422), "compress", "acme", folder)
    with pytest.raises(Conflict):
        wire.ask(refuse(409), "cancel_compression", "compression-1")


@pytest.mark.parametrize(("status", "stays"), [(422, False), (429, False), (500, True)])
def test_files_of_a_job_that_is_refused_do_not_stay(wire, folder, tmp_path, status, stays):
    """After a 500 nobody knows whether there is a job. One that cannot be deleted hides the refusal from nobody."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    server = Server()

    def refuse(request):
        error = {"error": {"message": "no", "code": "c", "param": None}}
        if request.url.path == "/v1/compressions":
            return httpx.Response(status, json=error)
        reply = server(request)
        return httpx.Response(409, json=error) if request.url.path == "/v1/files/file-config.json" else reply

    with pytest.raises(ApiError) as refusal:
        wire.ask(refuse, "compress", "acme", folder, data=rows)
    assert refusal.value.status == status
    names = [] if stays else ["model.safetensors", "config.json", "rows.jsonl"]
    assert server.deleted == [f"/v1/files/file-{name}" for name in names]


@pytest.fixture
def shell(monkeypatch, capsys):
    """shell(server, *words): (exit status, stdout, stderr) of a command against a scripted server."""

    def run(server, *words):
        transport = httpx.MockTransport(server)
        client = functools.partial(Client, transport=transport, sleep=lambda _: None)
        monkeypatch.setattr(connection, "Client", client)
        status = main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def test_push_of_a_directory_waits_for_the_model_and_says_what_it_cost(shell, folder):
    result = {
        "codec": "auto",
        "bits_per_parameter": 0.25,
        "bytes": 5_000_000,
        "full_bytes": 270_000_000,
        "seconds": 61.2,
    }
    server = Server(job("running"), job("succeeded", model="acme@1", result=result))
    status, out, _ = shell(server, "push", folder, "--name", "acme", "--max-kl", "0.05", "--url", "http://far:1")
    assert status == 0 and server.jobs[0]["max_kl"] == 0.05
    assert out.splitlines() == [
        "compression-1",
        "acme@1: auto, 0.250 bits per parameter, 5.0 MB, 54 times smaller than a full copy, in 61 s",
        "next: deltaserve complete acme 'Hello' --chat --url http://far:1",
    ]


def test_push_of_a_directory_fails_as_its_job_does(shell, folder):
    error = {"code": "invalid_checkpoint", "message": "a NaN", "param": None}
    status, out, err = shell(Server(job("failed", error=error)), "push", folder)
    assert (status, out) == (1, "compression-1\n") and "job compression-1 has failed: a NaN" in err


def test_push_without_waiting_names_the_job(shell, folder):
    status, out, _ = shell(Server(), "push", folder, "--no-wait")
    assert (status, out) == (0, "compression-1\nnext: deltaserve jobs compression-1 --wait\n")


def test_jobs_are_listed_looked_at_and_cancelled(shell):
    half = {"fraction": 0.5, "step": "model.layers.3", "seconds_left": 7}
    listed = {"data": [job("running", progress=half), job("failed", error={"message": "a NaN"})]}
    _, out, _ = shell(Server(listed), "jobs")
    assert out.splitlines()[1].split() == ["compression-1", "acme", "running", "50%", "model.layers.3"]
    assert out.splitlines()[2].split() == ["compression-1", "acme", "failed", "a", "NaN"]
    events = {"data": [{"level": "info", "message": "queued"}]}
    assert shell(Server(events), "jobs", "compression-1", "--log")[1] == "info     queued\n"
    assert "cancelled" in shell(Server(), "jobs", "compression-1", "--cancel")[1]
    assert json.loads(shell(Server(job("queued")), "jobs", "compression-1", "--json")[1]) == [job("queued")]
    assert shell(Server(), "jobs", "--wait")[0] == 1


def test_files_of_a_sharded_checkpoint_and_of_an_adapter(tmp_path):
    for name in ("a-1.safetensors", "a-2.safetensors", "other.safetensors", "tokenizer.json", "vocab.txt"):
        (tmp_path / name).write_bytes(b"x")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {"w": "a-2.safetensors", "v": "a-1.safetensors", "u": "a-2.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert [path.name for path in files_of(tmp_path)] == [
        index.name, "a-1.safetensors", "a-2.safetensors", "tokenizer.json",
    ]  # fmt: skip
    for text in ("[]", "{", '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(InvalidArgument):
            files_of(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"):
        (adapter / name).write_bytes(b"x")
    assert [path.name for path in files_of(adapter)] == ["adapter_model.safetensors", "adapter_config.json"]


def test_a_directory_of_pickles_or_empty_files_is_refused_before_anything_is_sent(wire, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InvalidArgument, match="pickles"):
        wire.ask(Server(), "compress", "acme", tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InvalidArgument, match="empty"):
        wire.ask(Server(), "compress", "acme", tmp_path)
    assert wire.requests == []
