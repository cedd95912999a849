"""How a term reads, without its tensors: the part of the manifest that mirrors the term classes of the kernels package.

Every spec has `of` (term → spec), `layout` (local tensor name → shape and allowed types, the first one canonical),
`build` (spec and tensors → term), `problems` (what makes it impossible) and `derived_bytes` (what serving adds).
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field
from torch import Tensor

from deltaserve.deltas.specs.base import Read, within
from deltaserve.deltas.specs.blocks import CodebookSpec, ExactSpec, PatchesSpec
from deltaserve.deltas.specs.coded import CodedSpec, LowRankSpec
from deltaserve.deltas.specs.wrapped import PlacedSpec, RotatedSpec
from deltaserve_kernels.terms import Codebook, Coded, Exact, LowRank, Patches, Placed, Rotated, Term

AnySpec: TypeAlias = CodedSpec | LowRankSpec | CodebookSpec | PatchesSpec | PlacedSpec | RotatedSpec | ExactSpec
TermSpec: TypeAlias = Annotated[AnySpec, Field(discriminator="kind")]

_SPECS: dict[type, type[AnySpec]] = {
    Coded: CodedSpec,
    LowRank: LowRankSpec,
    Codebook: CodebookSpec,
    Patches: PatchesSpec,
    Placed: PlacedSpec,
    Rotated: RotatedSpec,
    Exact: ExactSpec,
}


def term_spec(term: Term) -> AnySpec:
    return _SPECS[type(term)].of(term)  # type: ignore[arg-type]  # each takes its own


def term_tensors(term: Term, prefix: str) -> dict[str, Tensor]:
    """The tensors of a term under their names in the file."""
    return {f"{prefix}.{name}": tensor for name, tensor in term.tensors().items()}


def build_term(spec: AnySpec, prefix: str, read: Read, seed: int, site: int) -> Term:
    """The inverse of `term_spec` and `term_tensors`. Raises KeyError for a tensor that is not there."""
    return spec.build(within(prefix, read), seed, site)
