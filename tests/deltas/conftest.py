"""Short ways to compress, restore and edit checkpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.restore import restore
from deltaserve.deltas.validate import check_against_base
from deltaserve.errors import ArtifactMismatch
from deltaserve.ids import DeltaDigest

from .shelf import NUM, Shelf
from .storehouse import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor


@dataclass
class Workshop:
    """A folder of its own, and what every test does in it."""

    folder: Path

    def compress(
        self, base: Path, finetuned: Path, codec: str = "bitdelta", name: str = "delta.safetensors", **budget: Any
    ) -> Artifact:
        """Every tensor under its name in the file, so that tests can change one."""
        options = budget.pop("options", None)
        made = make_codec(codec, Budget(**budget), options)
        base_, tuned = Checkpoint.open(base), Checkpoint.open(finetuned)
        return compress(base_, tuned, made, self.folder / name, seed=7, packed=False)

    def restore(self, base: Path, artifact: Artifact, dtype: torch.dtype | None = None) -> Path:
        out = self.folder / "restored"
        restore(Checkpoint.open(base), artifact, out, dtype=dtype)
        return out

    def edited(self, artifact: Artifact, change: Callable[[dict[str, Tensor], Any], Any]) -> Artifact:
        """The artifact, which is not packed, with its tensors and manifest changed in its place."""
        path = artifact.file.path
        tensors, manifest = load_file(path), json.loads(artifact.file.metadata["deltaserve"])
        change(tensors, manifest)
        path.unlink()
        save_file(tensors, path, {"deltaserve": json.dumps(manifest)})
        return Artifact.open(path)

    def mismatch(self, artifact: Artifact, base: Path) -> str:
        """What `check_against_base` says."""
        with pytest.raises(ArtifactMismatch) as caught:
            check_against_base(artifact, Checkpoint.open(base))
        return caught.value.message

    def copy_of(self, source: Path, name: str, **config: Any) -> Path:
        """A copy of a checkpoint directory with fields of config.json changed; None removes a field."""
        out = self.folder / name
        out.mkdir()
        for file in source.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        if config:
            edit_json(out / "config.json", lambda fields: fields.update(config))
        return out

    def save(self, name: str, tensors: dict[str, Tensor]) -> Path:
        path = self.folder / name
        save_file(tensors, path)
        return path


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrites model.safetensors of a checkpoint directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def split_file(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def manifest_text(header: dict[str, Any]) -> str:
    """The manifest of a file's header, inflated where it is packed."""
    text: str = header["__metadata__"]["deltaserve"]
    return text if text.startswith("{") else zlib.decompress(base64.b64decode(text)).decode()


def join_file(header: dict[str, Any], data: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def files() -> Any:
    """The functions above; a conftest cannot be imported under --import-mode=importlib."""

    class Files:
        json = staticmethod(edit_json)
        tensors = staticmethod(edit_tensors)
        split = staticmethod(split_file)
        join = staticmethod(join_file)
        manifest_text = staticmethod(manifest_text)

    return Files


@pytest.fixture(scope="module")
def shelf(
    tiny_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[DeltaDigest, Path]:
    """A few artifacts by digest."""
    folder = tmp_path_factory.mktemp("shelf")
    tuned = make_finetune(tiny_base, folder / "tuned", scale=0.02, seed=1, embedding_rows=(3,))
    found: dict[DeltaDigest, Path] = {}
    for seed in range(NUM):
        path = folder / f"{seed}.safetensors"
        compress(Checkpoint.open(tiny_base), Checkpoint.open(tuned), make_codec("bitdelta"), path, seed=seed)
        found[DeltaDigest(hashlib.sha256(path.read_bytes()).hexdigest())] = path
    assert len(found) == NUM
    return found


@pytest.fixture
def make_shelf(shelf: dict[DeltaDigest, Path]) -> Iterator[Callable[..., Shelf]]:
    """make_shelf(**limits): closed after the test."""
    made: list[Shelf] = []

    def build(**options: Any) -> Shelf:
        made.append(Shelf(shelf, **options))
        return made[-1]

    yield build
    for one in made:
        one.residency.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture(params=["local", "shared"])
def shared(request: pytest.FixtureRequest) -> tuple[str, str] | None:
    if request.param == "local":
        return None
    return request.getfixturevalue("postgres_url"), request.getfixturevalue("s3_url")


@pytest.fixture
def store(tmp_path: Path, shared: tuple[str, str] | None) -> Iterator[Store]:
    opened = Store(tmp_path, shared)
    yield opened
    opened.close()
