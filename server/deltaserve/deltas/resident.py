"""A delta in serving form: packed terms and overrides, on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltaserve.deltas.artifact import Artifact, Override
from deltaserve_kernels.terms import Term


@dataclass(frozen=True)
class ResidentDelta:
    """Terms by the name of the weight they add to, overrides by the name of the tensor they replace. Immutable."""

    layers: Mapping[str, tuple[Term, ...]]
    overrides: Mapping[str, Override]
    unties_head: bool = False  # the fine-tune has a head of its own where the base shares the embedding

    @classmethod
    def load(cls, artifact: Artifact) -> ResidentDelta:
        """On the host, in memory of its own: the file may go. `artifact` is validated."""
        manifest = artifact.manifest
        layers = {name: tuple(term.to("cpu", copy=True) for term in artifact.terms(name)) for name in manifest.layers}
        overrides = {name: artifact.override(name).to("cpu", copy=True) for name in manifest.overrides}
        return cls(
            {name: tuple(term.with_columns() for term in terms) for name, terms in layers.items()},
            overrides,
            manifest.model_config_changes.get("tie_word_embeddings") is False,
        )

    def to(self, device: torch.device | str) -> ResidentDelta:
        """On `device`; itself where it is there already."""
        if torch.device(device).type == "cpu":
            return self
        return ResidentDelta(
            {name: tuple(term.to(device) for term in terms) for name, terms in self.layers.items()},
            {name: override.to(device) for name, override in self.overrides.items()},
            self.unties_head,
        )

    @property
    def nbytes(self) -> int:
        """Summed from the real tensors."""
        terms = sum(term.nbytes for terms in self.layers.values() for term in terms)
        return terms + sum(override.nbytes for override in self.overrides.values())
