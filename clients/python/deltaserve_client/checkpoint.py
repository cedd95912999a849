"""A fine-tune on disk, on its way to a server that compresses it: which files go, and every request it takes.

The requests come from generators that are given the replies, so `Client` and `AsyncClient` share them: a `Call` is to
be sent, a float is seconds to wait.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deltaserve_client import calls
from deltaserve_client.errors import ApiError, InvalidArgument

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Iterable

    from deltaserve_client.artifact import Progress
    from deltaserve_client.types import Compression, Json

Steps: TypeAlias = "Generator[calls.Call[Any] | float, Any, Compression]"

INDEX = "model.safetensors.index.json"
BESIDE = (  # what a server reads beside the weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "adapter_config.json",
)
PART_BYTES, MOST_PARTS = 8 * 2**20, 1000  # parts become larger before they become more
TEXTS = ("data", "calibration")  # options that name a file
POLL_S = 1.0


def files_of(directory: Path) -> list[Path]:
    """Weights, and what belongs to them. Raises InvalidArgument where there are no safetensors, OSError."""
    index = directory / INDEX
    if index.is_file():
        try:
            shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"{index}: no index of safetensors files") from error
        weights = [index, *(directory / name for name in sorted(shards))]
    else:
        one = [directory / "model.safetensors"]
        weights = one if one[0].is_file() else sorted(directory.glob("*.safetensors"))
    if not weights:
        there = ", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "nothing"
        raise InvalidArgument(f"{directory}: no safetensors file (there: {there}); pickles such as .bin are not sent")
    return [*weights, *(path for name in BESIDE if (path := directory / name).is_file())]


def compress(name: str, directory: str | os.PathLike[str], options: Json, progress: Progress | None) -> Steps:
    """Uploads the files and asks for the job. `options`: fields of the request; `data`, `calibration` are paths. The
    files of a job that is refused do not stay."""
    told = {key: value for key, value in options.items() if value is not None}
    paths = files_of(Path(directory))
    texts = {key: Path(told.pop(key)) for key in TEXTS if key in told}
    total = sum(path.stat().st_size for path in (*paths, *texts.values()))
    sent = 0

    def count(num_bytes: int) -> None:
        nonlocal sent
        sent += num_bytes
        if progress is not None:
            progress(sent, total)

    files = []
    for path in paths:
        files.append((yield from _upload(path, count)))
    for key, path in texts.items():
        told[key] = yield from _upload(path, count)
    try:
        job: Compression = yield calls.create_compression({**told, "name": name, "files": files}, uuid.uuid4().hex)
    except ApiError as refusal:
        if refusal.status < 500:  # or there may be a job that reads them
            yield from _take_back([*files, *(told[key] for key in texts)])
        raise
    return job


def _take_back(files: Iterable[str]) -> Generator[calls.Call[Any], Any, None]:
    for file_id in files:
        with suppress(ApiError):
            yield calls.delete_file(file_id)


def wait(job_id: str, progress: Callable[[Compression], None] | None) -> Steps:
    """Asks until the job has ended."""
    while True:
        job: Compression = yield calls.compression(job_id)
        if progress is not None:
            progress(job)
        if not job.is_open:
            return job
        yield POLL_S


def _upload(path: Path, count: Callable[[int], None]) -> Generator[calls.Call[Any], Any, str]:
    """The id of the file. A part is called by its digest, so that one which is sent twice is one."""
    size = path.stat().st_size
    if not size:
        raise InvalidArgument(f"{path}: is empty")
    upload: Json = yield calls.begin_upload(path.name, size)
    digest, parts = hashlib.sha256(), []
    with path.open("rb") as file:
        while chunk := file.read(max(PART_BYTES, size // MOST_PARTS)):
            digest.update(chunk)
            part: Json = yield calls.add_part(upload["id"], chunk)
            parts.append(part["id"])
            count(len(chunk))
    done: Json = yield calls.complete_upload(upload["id"], parts, digest.hexdigest())
    file_id: str = done["file"]["id"]
    return file_id
