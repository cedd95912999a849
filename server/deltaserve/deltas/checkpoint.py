"""A full checkpoint on disk: names, shapes, tensors one at a time, configuration, fingerprint.

Opened from a directory in Hugging Face layout, a hub id, a .safetensors file or a .gguf file (converted once, cached).
No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve.deltas.tensorfile import DTYPE_NAMES, Entry, TensorFile
from deltaserve.errors import CheckpointError, DeltaServeError

INDEX = "model.safetensors.index.json"
LM_HEAD = "lm_head.weight"
SUMMED_AT_ONCE = 2**20  # entries
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, read lazily. `directory` holds config.json and the tokenizer where there are any."""

    directory: Path
    name: str
    entries: dict[str, Entry] = field(repr=False)

    @classmethod
    def open(cls, reference: str | Path) -> Checkpoint:
        """Raises CheckpointError for what is not there or cannot be read."""
        path = Path(reference).expanduser()
        if path.suffix == ".gguf" and path.is_file():
            from deltaserve.deltas.gguf import converted

            return cls._of_directory(converted(path), path.stem)
        if path.is_file():
            return cls(path.parent, path.stem, _read_headers([path]))
        if path.is_dir():
            return cls._of_directory(path, path.resolve().name)
        if path.suffix in (".gguf", ".safetensors") or str(reference).startswith((".", "/", "~")):
            raise CheckpointError(f"{reference}: there is no such file or directory")
        return cls._of_directory(_download(str(reference)), str(reference).rsplit("/", 1)[-1])

    @classmethod
    def _of_directory(cls, directory: Path, name: str) -> Checkpoint:
        index = directory / INDEX
        if index.is_file():
            weight_map = _json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map is not a map of tensor names to files")
            files = sorted({directory / Path(file).name for file in weight_map.values()})
        else:
            files = [directory / "model.safetensors"]
            if not files[0].is_file():
                files = sorted(directory.glob("*.safetensors"))
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            found = sorted(file.name for file in directory.iterdir())[:12]
            raise CheckpointError(
                f"{directory}: {'missing ' + ', '.join(missing) if missing else 'no safetensors file'} "
                f"(there: {', '.join(found) or 'nothing'}; pickle formats such as .bin are not read)"
            )
        return cls(directory, name, _read_headers(files))

    @classmethod
    def of_files(cls, directory: Path, name: str, files: list[Path]) -> Checkpoint:
        """Of these files alone. Raises CheckpointError."""
        return cls(directory, name, _read_headers(files))

    @property
    def files(self) -> list[Path]:
        return sorted({entry.path for entry in self.entries.values()})

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, {} where there is none."""
        return self.json("config.json") or {}

    def json(self, file: str) -> dict[str, Any] | None:
        path = self.directory / file
        return _json(path) if path.is_file() else None

    @property
    def ties_lm_head(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    @cached_property
    def embedding_name(self) -> str | None:
        """The input embedding a tied head shares, by its usual names."""
        usual = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
        return next((name for name in usual if name in self.entries), None)

    @cached_property
    def names(self) -> list[str]:
        """Sorted; without the copy of the embedding that some writers store as a tied head."""
        tied = self.ties_lm_head and self.embedding_name is not None
        return sorted(name for name in self.entries if not (tied and name == LM_HEAD))

    def tensor(self, name: str) -> Tensor:
        """The tensor over mapped memory; a tied head is its embedding. Raises KeyError."""
        if name == LM_HEAD and self.ties_lm_head and self.embedding_name:
            name = self.embedding_name
        return self.entries[name].read()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 hex over "name, dtype, shape, SHA-256 of the bytes" of every tensor in the order of names."""

        def line(name: str) -> bytes:
            entry = self.entries[name]
            digest = hashlib.sha256(entry.map_bytes().data).hexdigest()
            shape = ",".join(map(str, entry.shape))
            return f"{name}\0{DTYPE_NAMES[entry.dtype]}\0{shape}\0{digest}\n".encode()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return hashlib.sha256(b"".join(pool.map(line, self.names))).hexdigest()

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors: what a full copy costs."""
        return sum(self.entries[name].nbytes for name in self.names)


def non_finite(tensor: Tensor) -> str | None:
    """What is wrong with it, or None: floating tensors may hold neither NaN nor inf."""
    if not tensor.is_floating_point():
        return None
    # In pieces: a whole embedding in float64 is gigabytes.
    parts = tensor.flatten().split(SUMMED_AT_ONCE)  # type: ignore[no-untyped-call]
    if all(bool(torch.isfinite(part.sum(dtype=torch.float64))) for part in parts):
        return None
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} NaN and {inf} infinite entries of {tensor.numel()}" if nan or inf else None


def _read_headers(files: list[Path]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            opened = TensorFile.open(file)
        except DeltaServeError as error:
            raise CheckpointError(error.message) from None
        for name, entry in opened.entries.items():
            if name in entries:
                raise CheckpointError(f"{name} is in both {entries[name].path.name} and {file.name}")
            entries[name] = entry
    return entries


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no JSON object")
    return content


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{hub_id}: neither a local path nor a model that the hub gave: {reason}") from None
