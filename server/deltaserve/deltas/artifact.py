"""An artifact: one safetensors file that holds one fine-tune as packed terms and overrides.

Naming of tensors and the manifest: deltas/manifest.py and deltas/README.md. Reading checks the format alone;
`validate` checks an artifact against a base.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import Tensor

from deltaserve.deltas.manifest import (
    METADATA_KEY,
    CodedSpec,
    LayerSpec,
    LowRankSpec,
    Manifest,
    MaskSpec,
    OverrideSpec,
    TermSpec,
)
from deltaserve.deltas.tensorfile import TensorFile
from deltaserve.errors import ArtifactError
from deltaserve_kernels.terms import Coded, LowRank, SeededMask, Term, site_number

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def term_spec(term: Term) -> TermSpec:
    """How a term reads, without its tensors."""
    if isinstance(term, LowRank):
        return LowRankSpec(left=_coded_spec(term.left), right=_coded_spec(term.right))
    return _coded_spec(term)


def _coded_spec(coded: Coded) -> CodedSpec:
    return CodedSpec(
        rows=coded.rows,
        cols=coded.cols,
        bits=coded.bits,  # type: ignore[arg-type]  # checked by pydantic
        grid=coded.grid,
        row=None if coded.row is None else "tensor" if coded.row.dim() == 0 else "row",
        col=coded.col is not None,
        mask=MaskSpec(group=coded.mask.group) if coded.mask else None,
    )


def term_tensors(term: Term, prefix: str) -> dict[str, Tensor]:
    """The tensors of a term under their names in the file."""
    if isinstance(term, LowRank):
        return {
            f"{prefix}.s": term.s,
            **term_tensors(term.left, f"{prefix}.left"),
            **term_tensors(term.right, f"{prefix}.right"),
        }
    return {f"{prefix}.{name}": tensor for name, tensor in term.tensors().items()}


def build_term(spec: TermSpec, prefix: str, read: Callable[[str], Tensor], seed: int, site: int) -> Term:
    """The inverse of `term_spec` and `term_tensors`. Raises KeyError for a tensor that is not there."""
    if isinstance(spec, LowRankSpec):
        left = build_term(spec.left, f"{prefix}.left", read, seed, site)
        right = build_term(spec.right, f"{prefix}.right", read, seed, site)
        assert isinstance(left, Coded) and isinstance(right, Coded)
        return LowRank(left, read(f"{prefix}.s"), right)
    return Coded(
        rows=spec.rows,
        cols=spec.cols,
        bits=spec.bits,
        grid=spec.grid,
        codes=read(f"{prefix}.codes"),
        row=read(f"{prefix}.row") if spec.row else None,
        col=read(f"{prefix}.col") if spec.col else None,
        mask=SeededMask(spec.mask.group, seed, site) if spec.mask else None,
    )


@dataclass(frozen=True)
class Override:
    """A tensor that replaces the base's: all of it, or `rows` of it. `rows` int64 [n] ascending, None = all."""

    values: Tensor
    rows: Tensor | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def to(self, device: torch.device | str, *, copy: bool = False) -> Override:
        rows = None if self.rows is None else self.rows.to(device, copy=copy)
        return Override(self.values.to(device, copy=copy), rows, self.shape)

    def apply(self, base: Tensor | None) -> Tensor:
        """The fine-tune's tensor, in the override's dtype; `base` is not changed."""
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
    def open(cls, path: Path) -> Artifact:
        """Raises ArtifactCorrupt for a broken file, ArtifactError for a file of another kind or format version."""
        file = TensorFile.open(path)
        raw = file.metadata.get(METADATA_KEY)
        if raw is None:
            raise ArtifactError(f"{path.name}: a safetensors file, but no delta: it has no {METADATA_KEY!r} manifest")
        try:
            return cls(file, Manifest.model_validate_json(raw))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise ArtifactError(
                f"{path.name}: manifest: {where}: {first['msg']} ({error.error_count()} errors)"
            ) from None

    def read(self, name: str) -> Tensor:
        """The tensor over mapped memory."""
        return self.file.entries[name].read()

    def terms(self, layer: str) -> list[Term]:
        """The packed terms of a layer, over mapped memory. Raises KeyError."""
        spec = self.manifest.layers[layer]
        site = site_number(layer)
        return [
            build_term(term, f"{layer}#{index}", self.read, self.manifest.seed, site)
            for index, term in enumerate(spec.terms)
        ]

    def override(self, name: str) -> Override:
        spec = self.manifest.overrides[name]
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
        """Bytes the tensors take on the device in serving form, spelled-out masks included."""
        total = sum(entry.nbytes for entry in self.file.entries.values())
        return total + sum(_mask_bytes(term) for layer in self.manifest.layers.values() for term in layer.terms)


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


def _mask_bytes(spec: TermSpec) -> int:
    if isinstance(spec, LowRankSpec):
        return _mask_bytes(spec.left) + _mask_bytes(spec.right)
    if spec.mask is None:
        return 0
    return spec.rows * -(-spec.cols // spec.mask.group) * (2 if spec.cols <= 2**15 else 4)
