"""An artifact: one safetensors file that holds one fine-tune as packed terms and overrides.

Naming of tensors and the manifest: deltas/manifest.py and deltas/README.md. Reading checks the format alone;
`validate` checks an artifact against a base.

Where names and shapes would be a noticeable part of a small file, it is packed: all tensors lie in one, uint8 [bytes],
the largest items first and by name among equals, in their canonical types, so that the manifest says where each is; and
the manifest is compressed (zlib, base64).
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import Tensor

from deltaserve.codecs.base import decode
from deltaserve.deltas.base_factors import BaseFactors
from deltaserve.deltas.manifest import BASE_COLS, BASE_ROWS, METADATA_KEY, PACKED, LayerSpec, Manifest, OverrideSpec
from deltaserve.deltas.specs import build_term
from deltaserve.deltas.tensorfile import Entry, TensorFile
from deltaserve.errors import ArtifactError
from deltaserve_kernels.terms import Term, site_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MAX_MANIFEST_BYTES = 16 * 2**20  # inflated; as objects it takes some 25 times this


@dataclass(frozen=True)
class Override:
    """A tensor that replaces the base's, all of it or `rows` of it (int64 [n] ascending, None = all), or adds to it."""

    values: Tensor
    rows: Tensor | None
    shape: tuple[int, ...]
    adds: bool = False  # float32 values to be added to the base's tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def to(self, device: torch.device | str, *, copy: bool = False) -> Override:
        rows = None if self.rows is None else self.rows.to(device, copy=copy)
        return replace(self, values=self.values.to(device, copy=copy), rows=rows)

    def apply(self, base: Tensor | None) -> Tensor:
        """The fine-tune's tensor, in the override's dtype (float32 where it adds); `base` is not changed."""
        if self.adds:
            assert base is not None, "a difference needs the base's tensor"
            return base.float() + self.values
        if self.rows is None:
            return self.values
        assert base is not None, "an override of rows needs the base's other rows"
        whole = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        whole[: base.shape[0]] = base.to(whole)
        whole[self.rows] = self.values
        return whole


@dataclass(frozen=True)
class Artifact:
    """An opened file: manifest read, tensors read when asked for."""

    file: TensorFile
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, called: str | None = None) -> Artifact:
        """`called`: its name in errors, if not that of `path`. Raises ArtifactCorrupt for a broken file, ArtifactError
        for a file of another kind or format version."""
        file = TensorFile.open(path, called=called)
        raw = file.metadata.get(METADATA_KEY)
        if raw is None:
            raise ArtifactError(f"{file.name}: a safetensors file, but no delta: it has no {METADATA_KEY!r} manifest")
        try:
            return cls(file, Manifest.model_validate_json(_inflated(file.name, raw)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) if str(part).isprintable() else ascii(part) for part in first["loc"])[:200]
            raise ArtifactError(
                f"{file.name}: manifest: {where or 'the whole'}: {first['msg']} ({error.error_count()} errors)"
            ) from None

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor by name. Raises ArtifactError where a packed file's tensors do not add up."""
        if not self.manifest.packed:
            return self.file.entries
        whole = self.file.entries.get(PACKED)
        layout = self.manifest.layout()
        if whole is None or len(self.file.entries) > 1 or whole.dtype != torch.uint8 or len(whole.shape) != 1:
            raise ArtifactError(f"{self.file.name}: a packed artifact is one tensor, {PACKED}, of bytes")
        named, start = {}, whole.start
        for name in packed_order({name: types[0] for name, (_, types) in layout.items()}):
            shape, types = layout[name]
            stop = start + math.prod(shape) * types[0].itemsize
            named[name] = Entry(whole.path, types[0], shape, start, stop)
            start = stop
        if start != whole.stop:
            raise ArtifactError(
                f"{self.file.name}: {whole.nbytes} packed bytes, its manifest describes {start - whole.start}"
            )
        return named

    def read(self, name: str) -> Tensor:
        """The tensor over mapped memory."""
        return self.entries[name].read()

    def terms(self, layer: str) -> list[Term]:
        """The packed terms of a layer, none where it has base factors alone; over mapped memory. Raises KeyError."""
        spec = self.manifest.layers[layer]
        site = site_number(layer)
        return [
            build_term(term, f"{layer}#{index}", self.read, self.manifest.seed, site)
            for index, term in enumerate(spec.terms)
        ]

    def base_factors(self, layer: str) -> BaseFactors:
        """Over mapped memory. Raises KeyError."""
        spec = self.manifest.layers[layer]
        rows = self.read(f"{layer}#{BASE_ROWS}") if spec.base_rows else None
        return BaseFactors(rows, self.read(f"{layer}#{BASE_COLS}") if spec.base_cols else None)

    def override(self, name: str) -> Override:
        spec = self.manifest.overrides[name]
        if spec.coded is not None:
            coded = build_term(spec.coded, f"{name}#difference", self.read, self.manifest.seed, site_number(name))
            return Override(coded.decode().view(spec.shape), None, tuple(spec.shape), adds=True)
        if spec.kind == "replace":
            return Override(self.read(name), None, tuple(spec.shape))
        return Override(self.read(f"{name}#values"), self.read(f"{name}#rows"), tuple(spec.shape))

    @cached_property
    def covered_parameters(self) -> int:
        """Parameters of the layers that are compressed."""
        return sum(term_shape(layer)[0] * term_shape(layer)[1] for layer in self.manifest.layers.values())

    @property
    def bits_per_parameter(self) -> float:
        """Every byte of the file × 8 / parameters of the layers it compresses; 0 where it compresses none."""
        return self.file.num_bytes * 8 / self.covered_parameters if self.covered_parameters else 0.0

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes the tensors take on the device in serving form: spelled-out masks and decoded differences included."""
        layers, overrides = self.manifest.layers.values(), self.manifest.overrides.items()
        total = sum(entry.nbytes for name, entry in self.entries.items() if "#difference." not in name)
        total += sum(term.derived_bytes() for layer in layers for term in layer.terms)
        return total + sum(4 * math.prod(spec.shape) for _, spec in overrides if spec.kind == "add")


def restored_weight(
    base: Tensor,
    terms: Sequence[Term],
    gamma: float,
    base_shift: float,
    dtype: torch.dtype,
    factors: BaseFactors | None = None,
) -> Tensor:
    """W = (1 + base_shift) · factors(W_base) + gamma · Σ terms in float32, in the shape of the base's and in `dtype`.

    With terms and a base_shift of −1 nothing of the base is left, not even the sign of a zero.
    """
    delta = (gamma * decode(terms)).view(base.shape) if terms else None
    if delta is not None and base_shift == -1:
        return delta.to(dtype)
    scaled = factors.apply(base.float()) if factors else base.float()
    whole = (1 + base_shift) * scaled
    return (whole if delta is None else whole + delta).to(dtype)


def term_shape(layer: LayerSpec) -> tuple[int, int]:
    """[rows, cols] of a layer's terms: the first dimension × all others (convolutions)."""
    rows = layer.shape[0] if layer.shape else 0
    cols = 1
    for size in layer.shape[1:]:
        cols *= size
    return rows, cols


def override_tensors(name: str, override: Override) -> dict[str, Tensor]:
    """The tensors of an override under their names in the file."""
    if override.rows is None:
        return {name: override.values}
    return {f"{name}#rows": override.rows, f"{name}#values": override.values}


def override_spec(override: Override, dtype: str) -> OverrideSpec:
    if override.rows is None:
        return OverrideSpec(kind="replace", shape=list(override.shape), dtype=dtype)
    return OverrideSpec(kind="rows", shape=list(override.shape), dtype=dtype, num_rows=len(override.rows))


def packed_order(types: Mapping[str, torch.dtype]) -> list[str]:
    """Names in the order of a packed file: the largest items first, so that every tensor is aligned to its own."""
    return sorted(types, key=lambda name: (-types[name].itemsize, name))


def deflated(manifest: str) -> str:
    """A manifest as a packed file has it."""
    return base64.b64encode(zlib.compress(manifest.encode(), 9)).decode()


def _inflated(name: str, raw: str) -> str:
    """The manifest's JSON. Raises ArtifactError."""
    if raw.startswith("{"):
        return raw
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(base64.b64decode(raw, validate=True), MAX_MANIFEST_BYTES)
        if not inflate.eof or inflate.unused_data:
            raise ArtifactError(f"{name}: its manifest is cut off, padded, or over {MAX_MANIFEST_BYTES} bytes")
        return text.decode()
    except (ValueError, zlib.error) as error:
        raise ArtifactError(f"{name}: its manifest is neither JSON nor compressed JSON: {error}") from None
