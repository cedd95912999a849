"""OpenAI's Uploads API with the official client: what it uploads in parts is a model that answers."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIND: Any = {"mime_type": "application/octet-stream", "purpose": "fine-tune"}


@pytest.fixture
def guest(town: Any) -> Iterator[str]:
    """A tenant of the test's own."""
    name = town.new_tenant()
    yield name
    town.admin("DELETE", f"tenants/{name}")


@pytest.fixture
def client(town: Any, guest: str) -> Iterator[openai.OpenAI]:
    with town.openai(guest, "inference", "manage") as made:
        yield made


@pytest.fixture
def artifact(tenants: dict[str, Any]) -> bytes:
    found: bytes = tenants["sign"].artifact
    return found


def part_size(artifact: bytes) -> int:
    return len(artifact) // 5 + 1


def text(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="Many", max_tokens=12, temperature=0).choices[0].text


def test_a_file_uploaded_in_parts_is_a_model(
    client: openai.OpenAI, artifact: bytes, tenants: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(artifact)
    md5 = hashlib.md5(artifact, usedforsecurity=False).hexdigest()
    upload = client.uploads.upload_file_chunked(file=path, part_size=part_size(artifact), md5=md5, **KIND)
    assert (upload.object, upload.status, upload.bytes, upload.filename) == (
        "upload",
        "completed",
        len(artifact),
        "mine.safetensors",
    )
    assert upload.file is not None
    assert (upload.file.id, upload.file.object, upload.file.bytes) == ("mine@1", "file", len(artifact))
    assert upload.file.status == "processed"
    expected = tenants["sign"].greedy(tenants["sign"].encode("Many"), 12)[0]
    assert text(client, "mine") == text(client, upload.file.id) == expected
    assert client.models.retrieve("mine").id == "mine"


def test_bytes_in_memory_go_up_in_one_part_of_the_default_size(client: openai.OpenAI, artifact: bytes) -> None:
    upload = client.uploads.upload_file_chunked(file=artifact, filename="m.safetensors", bytes=len(artifact), **KIND)
    assert upload.status == "completed" and text(client, "m")


def test_the_async_client_sends_parts_at_the_same_time(town: Any, guest: str, artifact: bytes, tmp_path: Path) -> None:
    key, size = town.new_key(guest, "inference", "manage")["key"], part_size(artifact)
    pieces = [artifact[at : at + size] for at in range(0, len(artifact), size)]
    path = tmp_path / "whole.safetensors"
    path.write_bytes(artifact)

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{town.server.url}/v1", api_key=key, max_retries=0) as client:
            whole = await client.uploads.upload_file_chunked(file=path, part_size=size, **KIND)
            upload = await client.uploads.create(bytes=len(artifact), filename="parallel.safetensors", **KIND)
            parts = await asyncio.gather(*(client.uploads.parts.create(upload.id, data=piece) for piece in pieces))
            done = await client.uploads.complete(upload.id, part_ids=[part.id for part in parts])
            assert whole.file and done.file
            return [whole.file.id, done.file.id]

    assert asyncio.run(run()) == ["whole@1", "parallel@1"]
    listed = {card["id"]: card["sha256"] for card in town["admin"].get("/v1/deltas").json()["data"]}
    assert listed[f"{guest}:whole"] == listed[f"{guest}:parallel"] == hashlib.sha256(artifact).hexdigest()


def test_what_is_sent_twice_is_done_once(client: openai.OpenAI, artifact: bytes) -> None:
    upload = client.uploads.create(bytes=len(artifact), filename="m.safetensors", **KIND)
    parts = [client.uploads.parts.create(upload.id, data=artifact) for _ in range(2)]
    assert parts[0] == parts[1] and parts[0].object == "upload.part" and parts[0].upload_id == upload.id
    done = [client.uploads.complete(upload.id, part_ids=[parts[0].id]) for _ in range(2)]
    assert done[0] == done[1]
    assert done[0].file is not None and done[0].file.id == "m@1"


def test_a_cancelled_upload_takes_nothing_more(client: openai.OpenAI, artifact: bytes) -> None:
    upload = client.uploads.create(bytes=len(artifact), filename="m.safetensors", **KIND)
    part = client.uploads.parts.create(upload.id, data=artifact)
    assert [client.uploads.cancel(upload.id).status for _ in range(2)] == ["cancelled", "cancelled"]
    for call in (
        lambda: client.uploads.parts.create(upload.id, data=artifact),
        lambda: client.uploads.complete(upload.id, part_ids=[part.id]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.code == "upload_closed"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("m")


def test_errors_are_the_clients_exceptions(client: openai.OpenAI, artifact: bytes) -> None:
    def create(**changed: Any) -> Any:
        return client.uploads.create(**{"bytes": len(artifact), "filename": "m.safetensors", **KIND, **changed})

    for changed, param in (
        ({"filename": "m.bin"}, "filename"),
        ({"filename": "../m.safetensors"}, "name"),
        ({"bytes": 0}, "bytes"),
        ({"purpose": "batch"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3600}}, "expires_after"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(**changed)
        assert caught.value.param == param, caught.value
    upload = create()
    part = client.uploads.parts.create(upload.id, data=artifact)
    wrong = "0" * 32
    for options, code in (
        ({"part_ids": [part.id], "md5": wrong}, "digest_mismatch"),
        ({"part_ids": [part.id], "extra_body": {"sha256": wrong * 2}}, "digest_mismatch"),
        ({"part_ids": ["part_0"]}, "invalid_request"),
        ({"part_ids": [part.id, part.id]}, "invalid_request"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.complete(upload.id, **options)  # type: ignore[arg-type]
        assert caught.value.code == code
    with pytest.raises(openai.BadRequestError, match="declared"):
        client.uploads.parts.create(upload.id, data=b"more")
    with pytest.raises(openai.NotFoundError):
        client.uploads.complete("upload_0", part_ids=[part.id])
    assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed", "none of that harmed it"


def test_an_upload_that_is_no_artifact_says_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        client.uploads.upload_file_chunked(file=b"x" * 99, filename="m.safetensors", bytes=99, part_size=50, **KIND)
