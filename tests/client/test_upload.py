"""Uploads: the digest, the length, the chunks, the progress."""

from __future__ import annotations

import hashlib

import httpx
import pytest

from deltaserve_client import Conflict, InvalidArgument
from deltaserve_client.artifact import CHUNK_BYTES, Artifact


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5])
def test_the_file_arrives_with_its_length_and_digest(wire, tmp_path, delta_json, size):
    content = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "numwords.delta"
    path.write_bytes(content[:size])
    progress = []
    delta = wire.ask(
        httpx.Response(201, json=delta_json), "upload", "num/words", path, progress=lambda *step: progress.append(step)
    )
    (request,) = wire.requests
    assert delta.version == 3
    assert (request.method, request.url.raw_path.split(b"?")[0]) == ("PUT", b"/v1/deltas/num%2Fwords")
    assert request.url.params["sha256"] == hashlib.sha256(content[:size]).hexdigest()
    assert request.headers["content-length"] == str(size)
    assert "transfer-encoding" not in request.headers
    assert request.content == content[:size]
    sent = [*range(CHUNK_BYTES, size, CHUNK_BYTES), size] if size else []
    assert progress == [(step, size) for step in sent]


def test_a_repeated_upload_sends_the_whole_file_again(wire, tmp_path, delta_json):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    replies = iter([httpx.Response(503), httpx.Response(200, json=delta_json)])
    wire.ask(lambda _: next(replies), "upload", "a", path)
    assert [request.content for request in wire.requests] == [b"0123456789"] * 2


def test_a_refused_upload_is_not_repeated(wire, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    with pytest.raises(Conflict):
        wire.ask(httpx.Response(409, json={"error": {}}), "upload", "a", path)
    assert len(wire.requests) == 1


def test_a_missing_file_is_the_systems_own_error_and_nothing_is_sent(wire, tmp_path):
    with pytest.raises(FileNotFoundError):
        wire.ask(httpx.Response(201), "upload", "a", tmp_path / "missing")
    assert wire.requests == []


def test_only_the_bytes_that_were_hashed_are_sent(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"hashed")
    artifact = Artifact.measure(path)
    path.write_bytes(b"hashed and more")
    assert b"".join(artifact.body(None)) == b"hashed"
    path.write_bytes(b"hash")
    with pytest.raises(InvalidArgument, match="shorter"):
        list(artifact.body(None))
