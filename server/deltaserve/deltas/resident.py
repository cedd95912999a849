"""A delta in serving form: packed terms and overrides, on one device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch

from deltaserve.deltas.artifact import Artifact, Override
from deltaserve.deltas.base_factors import BaseFactors
from deltaserve.errors import DeltaLoadFailed
from deltaserve.ids import DeltaDigest
from deltaserve_kernels.fused.bundle import Bundle
from deltaserve_kernels.fused.parts import FusedTerm
from deltaserve_kernels.native.parts import Part
from deltaserve_kernels.terms import Term

ServedTerm: TypeAlias = Term | Part | FusedTerm  # for torch, for the native kernels, for Triton's
Serve: TypeAlias = Callable[[Term], ServedTerm]
Load: TypeAlias = Callable[[Artifact], "ResidentDelta"]


def for_torch(term: Term) -> ServedTerm:
    return term.serving()


@dataclass(frozen=True)
class ResidentLayer:
    """y = (1 + base_shift) · ((x ⊙ cols)·W_baseᵀ) ⊙ rows + gamma · Σ_j x·Term_jᵀ"""

    terms: tuple[ServedTerm, ...]
    gamma: float = 1.0
    base_shift: float = 0.0
    factors: BaseFactors = BaseFactors()

    def to(self, device: torch.device | str) -> ResidentLayer:
        """Parts stay: they are read on the host alone, or lie in the delta's bundle."""
        terms = tuple(term if isinstance(term, Part | FusedTerm) else term.to(device) for term in self.terms)
        return replace(self, terms=terms, factors=self.factors.to(device))

    @property
    def nbytes(self) -> int:
        return self.factors.nbytes + sum(term.nbytes for term in self.terms)


@dataclass(frozen=True, eq=False)
class ResidentDelta:
    """Layers by the name of the weight they add to, overrides by the name of the tensor they replace; in `bundle` what
    the fused kernels read, which is then in neither. Immutable, and equal to itself alone."""

    layers: Mapping[str, ResidentLayer]
    overrides: Mapping[str, Override]
    unties_head: bool = False  # the fine-tune has a head of its own where the base shares the embedding
    bundle: Bundle | None = None
    fits_bundle: bool = False  # all that it does between embedding and head

    @classmethod
    def load(cls, artifact: Artifact, serve: Serve = for_torch) -> ResidentDelta:
        """On the host, in memory of its own: the file may go. `artifact` is validated; `serve` forms its terms."""
        manifest = artifact.manifest
        layers = {
            name: ResidentLayer(
                tuple(serve(term.to("cpu", copy=True)) for term in artifact.terms(name)),
                spec.gamma,
                spec.base_shift,
                artifact.base_factors(name).to("cpu", copy=True),
            )
            for name, spec in manifest.layers.items()
        }
        overrides = {name: artifact.override(name).to("cpu", copy=True) for name in manifest.overrides}
        return cls(layers, overrides, manifest.model_config_changes.get("tie_word_embeddings") is False)

    def to(self, device: torch.device | str) -> ResidentDelta:
        """On `device`; itself where it is there already."""
        if torch.device(device).type == "cpu":
            return self
        return replace(
            self,
            layers={name: layer.to(device) for name, layer in self.layers.items()},
            overrides={name: override.to(device) for name, override in self.overrides.items()},
            bundle=None if self.bundle is None else self.bundle.to(device),
        )

    @cached_property
    def nbytes(self) -> int:
        """Summed from the real tensors."""
        layers = sum(layer.nbytes for layer in self.layers.values()) + (self.bundle.nbytes if self.bundle else 0)
        return layers + sum(override.nbytes for override in self.overrides.values())


def read_delta(path: Path, digest: DeltaDigest, load: Load = ResidentDelta.load) -> ResidentDelta:
    """`load` of a file whose bytes have `digest`. Raises DeltaLoadFailed for others, OSError, ArtifactError."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise DeltaLoadFailed(f"the stored delta {digest[:12]} is damaged: its bytes have the digest {found[:12]}")
    return load(Artifact.open(path))
