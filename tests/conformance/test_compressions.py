"""A fine-tune that the server compresses, with the official client alone: files, a job, its progress, an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType


@pytest.fixture
def client(town: Any) -> Iterator[openai.OpenAI]:
    """Of a tenant of the test's own."""
    name = town.new_tenant()
    with town.openai(name, "inference", "manage") as made:
        yield made
    town.admin("DELETE", f"tenants/{name}")


@pytest.fixture
def finetune(make_finetune: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> Path:
    return make_finetune(tiny_base, tmp_path / "tuned", scale=0.05, seed=1)


def send(client: openai.OpenAI, finetune: Path) -> list[str]:
    """The weights in parts, the rest at once."""
    weights = client.uploads.upload_file_chunked(
        file=finetune / "model.safetensors",
        mime_type="application/octet-stream",
        purpose="user_data",
        part_size=50_000,
    )
    assert weights.status == "completed" and weights.file is not None
    assert weights.file.purpose == "user_data" and weights.file.id.startswith("file-")
    beside = [path for path in sorted(finetune.iterdir()) if path.suffix in (".json", ".jinja")]
    return [weights.file.id, *(client.files.create(file=path, purpose="user_data").id for path in beside)]


def test_a_fine_tune_becomes_a_model_that_answers(client: openai.OpenAI, finetune: Path, process: ModuleType) -> None:
    files = send(client, finetune)
    listed = list(client.files.list())
    assert {file.id for file in listed} == set(files)
    assert {file.status for file in listed} == {"processed"}
    assert client.files.retrieve(files[0]).filename == "model.safetensors"
    job: Any = client.post("/compressions", body={"name": "acme", "files": files, "codec": "bitdelta"}, cast_to=object)

    def ended() -> Any:
        now: Any = client.get(f"/compressions/{job['id']}", cast_to=object)
        return now if now["finished_at"] else None

    done = process.wait_until(ended, "the job has ended", 400)
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert client.models.retrieve("acme").id == "acme"
    answer = client.completions.create(model=done["model"], prompt="Many", max_tokens=8, temperature=0)
    assert answer.choices[0].finish_reason in ("length", "stop")
    base = client.completions.create(model="tiny", prompt="Many", max_tokens=8, temperature=0)
    assert answer.choices[0].text != base.choices[0].text
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[0])


def test_errors_are_the_clients_exceptions(client: openai.OpenAI, finetune: Path) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("model.bin", b"\x80\x04"), purpose="user_data")
    assert (caught.value.code, caught.value.param) == ("invalid_name", "filename")
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("config.json", b"{}"), purpose="fine-tune")
    assert caught.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.create(bytes=1, filename="model.bin", mime_type="", purpose="user_data")
    assert caught.value.code == "invalid_name"
    files = send(client, finetune)
    create: Callable[..., Any] = lambda **body: client.post("/compressions", body=body, cast_to=object)  # noqa: E731
    for body, kind, code in (
        ({"name": "m", "files": []}, openai.BadRequestError, "invalid_request"),
        ({"name": "m", "files": ["file-0"]}, openai.NotFoundError, "not_found"),
        ({"name": "m", "files": files[1:]}, openai.UnprocessableEntityError, "invalid_checkpoint"),
        ({"name": "m", "files": files, "codec": "zip"}, openai.UnprocessableEntityError, "invalid_codec_config"),
        ({"name": "m", "files": files, "more": 1}, openai.BadRequestError, "unsupported_parameter"),
    ):
        with pytest.raises(kind) as raised:
            create(**body)
        assert raised.value.code == code
    for call in (
        lambda: client.get("/compressions/compression-0", cast_to=object),
        lambda: client.post("/compressions/compression-0/cancel", cast_to=object),
        lambda: client.files.delete("file-0"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    for file in files:
        assert client.files.delete(file).deleted
