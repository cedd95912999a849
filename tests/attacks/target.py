"""A base, sound artifacts on it, and what a server does with an upload. Used by every attack on files."""

from __future__ import annotations

import base64
import json
import struct
import time
import zlib
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.artifact import Artifact, deflated
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.validate import check_against_base, check_numbers

from ..support.kinds import EveryKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPTLY_S = 5.0  # on a busy machine
MATRIX, EMBEDDING, NORM = "layers.0.q_proj.weight", "model.embed_tokens.weight", "norm.weight"
CODECS = {
    "bitdelta": lambda: make_codec("bitdelta"),
    "dare": lambda: make_codec("dare", None, {"group": 8}),
    "delta-svd": lambda: make_codec("delta-svd"),
    "every-kind": EveryKind,
}


class Target:
    """`packed` artifacts have one tensor and a compressed manifest; their norm is a coded difference."""

    def __init__(self, folder: Path, codec: str, *, packed: bool = False, shape: tuple[int, int] = (6, 9)) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in ("base", "tuned"):
            tensors = {
                MATRIX: torch.randn(*shape, generator=generator),
                EMBEDDING: torch.randn(8 if name == "base" else 9, 4, generator=torch.Generator().manual_seed(1)),
                NORM: torch.randn(5, generator=generator).bfloat16(),
            }
            save_file(tensors, folder / f"{name}.safetensors")
        self.base = Checkpoint.open(folder / "base.safetensors")
        tuned, out = Checkpoint.open(folder / "tuned.safetensors"), folder / "sound.safetensors"
        compress(self.base, tuned, CODECS[codec](), out, packed=packed, vector_bits=4 if packed else 16)
        self.path = folder / "upload.safetensors"
        self.sound = out.read_bytes()
        self.header_bytes = struct.unpack("<Q", self.sound[:8])[0]

    def receive(self, raw: bytes) -> Artifact:
        """`read`, promptly."""
        start = time.monotonic()
        try:
            return self.read(raw)
        finally:
            assert time.monotonic() - start < PROMPTLY_S

    def read(self, raw: bytes) -> Artifact:
        """Opens and checks an upload; decodes what passed."""
        self.path.write_bytes(raw)
        artifact = Artifact.open(self.path)
        check_against_base(artifact, self.base)
        check_numbers(artifact, self.base)
        for name in artifact.manifest.layers:
            for term in artifact.terms(name):
                assert term.decode().shape == self.base.entries[name].shape
        for name in artifact.manifest.overrides:
            whole = artifact.override(name).apply(self.base.tensor(name))
            assert whole.shape[1:] == self.base.entries[name].shape[1:]
        return artifact

    def edited(self, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
        """The sound artifact with its header and manifest changed."""
        header, manifest = self.parts()
        change(header, manifest)
        if "__metadata__" in header:
            text = json.dumps(manifest)
            header["__metadata__"]["deltaserve"] = deflated(text) if self.is_packed else text
        return with_header(json.dumps(header).encode(), self.data)

    def parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Header and manifest of the sound artifact."""
        header = json.loads(self.sound[8 : 8 + self.header_bytes])
        text = header["__metadata__"]["deltaserve"]
        return header, json.loads(inflated(text))

    @property
    def data(self) -> bytes:
        return self.sound[8 + self.header_bytes :]

    @property
    def is_packed(self) -> bool:
        return "packed" in self.parts()[0]


def inflated(manifest: str) -> str:
    return manifest if manifest.startswith("{") else zlib.decompress(base64.b64decode(manifest)).decode()


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def term(manifest: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = manifest["layers"][MATRIX]["terms"][index]
    return found
