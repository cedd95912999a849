"""safetensors files, read and written one tensor at a time.

The format: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
Reading maps one tensor into memory and lets it go with the tensor; writing spools tensors to disk as they come and
puts the header before them at the end. Neither ever holds a whole file. Headers are hostile input: every rule of the
format is checked here, with limits, before a tensor is touched.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deltaserve.errors import ArtifactCorrupt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 64 * 2**20
MAX_DIMENSIONS = 8
MAX_NAME_CHARS = 512


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: bytes [start, stop) of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def map_bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 [nbytes], memory-mapped copy-on-write; unmapped with the last reference to it."""
        if self.nbytes == 0:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(self.path, dtype=np.uint8, mode="c", offset=self.start, shape=(self.nbytes,))

    def read(self) -> Tensor:
        """The tensor over mapped memory; changes to it do not reach the file."""
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        raw = torch.from_numpy(self.map_bytes())
        if self.start % self.dtype.itemsize:
            raw = raw.clone()  # a file of another writer may not be aligned
        return raw.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A checked header."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    num_bytes: int
    name: str  # in errors

    @classmethod
    def open(cls, path: Path, *, called: str | None = None, max_header_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
        """`called`: its name in errors, if not that of `path`. Raises ArtifactCorrupt with the rule that is broken."""
        file_name = called or path.name
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if num_bytes >= 8 else -1
            if not 2 <= length <= max_header_bytes or length > num_bytes - 8:
                raise ArtifactCorrupt(
                    f"{file_name}: not a safetensors file, or cut off in its header ({num_bytes} bytes, header length "
                    f"{length}, allowed 2 … {max_header_bytes})"
                )
            header = _parse_header(file_name, file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ArtifactCorrupt(f"{file_name}: __metadata__ is not a map of strings")
        entries = {name: _entry(path, f"{file_name}: {name}", fields, 8 + length) for name, fields in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise ArtifactCorrupt(f"{file_name}: {name} starts at byte {entry.start}, the one before ends at {end}")
            end = entry.stop
        if end != num_bytes:
            raise ArtifactCorrupt(f"{file_name}: {num_bytes} bytes, its header describes {end}: cut off or padded")
        return cls(path, entries, metadata, num_bytes, file_name)


def _parse_header(name: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ArtifactCorrupt(f"{name}: the header names something twice")
        return fields

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorrupt(f"{name}: the header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise ArtifactCorrupt(f"{name}: the header is no JSON object")
    for key in header:
        if len(key) > MAX_NAME_CHARS or not key.isprintable():
            raise ArtifactCorrupt(
                f"{name}: the name {reprlib.repr(key)} is not up to {MAX_NAME_CHARS} printable characters"
            )
    return header


def _entry(path: Path, where: str, fields: object, data_start: int) -> Entry:
    def natural(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**48

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactCorrupt(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactCorrupt(f"{where}: dtype {reprlib.repr(dtype)} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(natural(size) for size in shape):
        raise ArtifactCorrupt(f"{where}: shape {reprlib.repr(shape)} is not up to {MAX_DIMENSIONS} natural numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(natural(offset) for offset in offsets):
        raise ArtifactCorrupt(f"{where}: data_offsets {reprlib.repr(offsets)} are not two natural numbers")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ArtifactCorrupt(f"{where}: {dtype} {shape} does not take {offsets[1] - offsets[0]} bytes")
    return Entry(path, DTYPES[dtype], tuple(shape), data_start + offsets[0], data_start + offsets[1])


class TensorFileWriter:
    """Tensors in, one file out. Larger items come first in the file, so that every tensor is aligned."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._spools: dict[int, IO[bytes]] = {}
        self._header: dict[str, tuple[int, dict[str, Any], int, int]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a copy of `tensor`. Raises ValueError for a name that is there already."""
        if name in self._header:
            raise ValueError(f"{name} is written twice")
        itemsize = tensor.element_size()
        if itemsize not in self._spools:
            self._spools[itemsize] = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 (closed by write)
        spool = self._spools[itemsize]
        start = spool.tell()
        spool.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        fields = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._header[name] = (itemsize, fields, start, spool.tell())

    @property
    def num_bytes(self) -> int:
        """Of the tensors so far."""
        return sum(spool.tell() for spool in self._spools.values())

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: DTYPES[fields["dtype"]] for name, (_, fields, _, _) in self._header.items()}

    def write_as_one(self, file: IO[bytes], name: str, order: Sequence[str], metadata: Mapping[str, str]) -> None:
        """All tensors, in `order`, as the bytes of one tensor `name`."""
        fields = {"dtype": "U8", "shape": [self.num_bytes], "data_offsets": [0, self.num_bytes]}
        _write_header(file, {"__metadata__": dict(metadata), name: fields})
        for key in order:
            size, _, start, stop = self._header[key]
            self._spools[size].seek(start)
            file.write(self._spools[size].read(stop - start))

    def write(self, file: IO[bytes], metadata: Mapping[str, str]) -> None:
        """Header, then the spooled data, to `file`."""
        base, header = 0, dict[str, Any]({"__metadata__": dict(metadata)} if metadata else {})
        sizes = sorted(self._spools, reverse=True)
        for itemsize in sizes:
            for name, (size, fields, start, stop) in self._header.items():
                if size == itemsize:
                    header[name] = {**fields, "data_offsets": [base + start, base + stop]}
            base += self._spools[itemsize].tell()
        _write_header(file, header)
        for itemsize in sizes:
            self._spools[itemsize].seek(0)
            shutil.copyfileobj(self._spools[itemsize], file, 2**20)

    def close(self) -> None:
        for spool in self._spools.values():
            spool.close()


def _write_header(file: IO[bytes], header: dict[str, Any]) -> None:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under `path` whole and synced to disk, or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Makes renames and deletions in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
