"""What the engine sees of a model, whichever code runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.deltas.artifact import Artifact, term_shape
from deltaserve.deltas.resident import ResidentDelta, ServedTerm
from deltaserve.errors import ArtifactMismatch
from deltaserve.model.step import Step
from deltaserve_kernels.terms import Term


@dataclass(frozen=True)
class ServedModel(ABC):
    """A base, its KV cache, and what a delta may change: `linear` and `other` name it."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_positions: int
    num_layers: int
    kv_slots: int  # positions that the KV cache holds
    linear: frozenset[str]  # weights that take terms
    other: frozenset[str]  # tensors that take overrides

    @property
    @abstractmethod
    def runtime(self) -> dict[str, str]:
        """Which decoder and kernels run, for logs and /version."""

    @property
    def scratch_bytes(self) -> int:
        """Memory for weights that are written out for a step."""
        return 0

    @property
    def decode_steps(self) -> Mapping[str, int]:
        """Steps without a prompt so far, "graph": replayed, "kernels": one by one. Empty where none is recorded."""
        return {}

    @property
    @abstractmethod
    def num_paged_layers(self) -> int:
        """Layers that have written to the paged KV cache."""

    @abstractmethod
    def forward(self, step: Step, ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """ids, positions int64 [T] → logits float32 [R, vocabulary] of the rows `logit_rows` int64 [R]."""

    def watch_compiles(self, told: Callable[[str], None]) -> Callable[[], None]:  # noqa: ARG002 (not every model compiles)
        """`told` gets the name of each kernel that a step had to wait for, compiled; → what ends that."""
        return lambda: None

    @abstractmethod
    def serve(self, term: Term) -> ServedTerm:
        """The form in which this model reads a term; made once, at load."""

    def load_delta(self, artifact: Artifact) -> ResidentDelta:
        """A validated artifact as this model serves it, on the host."""
        return ResidentDelta.load(artifact, self.serve)

    def check_servable(self, artifact: Artifact) -> None:
        """Raises ArtifactMismatch listing what this model cannot apply."""
        manifest = artifact.manifest
        problems = [
            f"{name}: no linear layer of this model ({'×'.join(map(str, layer.shape))})"
            for name, layer in manifest.layers.items()
            if name not in self.linear or len(layer.shape) != 2 or 0 in term_shape(layer)
        ]
        problems += [
            f"{name}: no tensor that can be overridden" for name in manifest.overrides if name not in self.other
        ]
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ArtifactMismatch(f"{len(problems)} tensors cannot be served on this base:\n{listed}")
