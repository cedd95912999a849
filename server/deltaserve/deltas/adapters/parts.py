"""What an adapter adds to its base, and how that is written: terms as they are, changed tensors as overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaserve.deltas.artifact import Artifact, Override, override_spec, override_tensors
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import Progress, make_manifest, write_artifact
from deltaserve.deltas.manifest import LayerSpec, OverrideSpec
from deltaserve.deltas.specs import term_spec, term_tensors
from deltaserve.deltas.tensorfile import DTYPE_NAMES, TensorFileWriter
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve_kernels.terms import Term

PREFIX = "base_model.model."  # of the names in an adapter that PEFT saved
SHOWN = 50


@dataclass
class Parts:
    """Terms and overrides by tensor name, and every reason not to take them."""

    codec: str
    config: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    overrides: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def replace(self, base: Checkpoint, key: str, name: str, tensor: Tensor, known: str) -> None:
        """`tensor` in place of the base's `name`; `key` is what the adapter calls it, `known` what else it could be."""
        if name in base.names and base.entries[name].shape == tuple(tensor.shape):
            if not torch.equal(base.tensor(name).to(tensor.dtype), tensor):
                self.overrides[name] = tensor
        elif name.endswith(".bias") and name not in base.names:
            self.problems.append(f"{key}: the base has no {name}, and a delta cannot add a bias to a layer without one")
        else:
            self.problems.append(f"{key}: neither {known} nor a tensor of the base in the same shape")

    def write(self, base: Checkpoint, weights: Checkpoint, out: Path, progress: Progress | None) -> Artifact:
        """Writes the artifact `out`, whole or not at all, and opens it. Raises CheckpointError for any problem."""
        both = [f"{name}: both adapted and replaced" for name in sorted(self.terms.keys() & self.overrides.keys())]
        if problems := self.problems + both:
            listed = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
            raise CheckpointError(f"{weights.directory}: {len(problems)} problems:\n{listed}")
        layers: dict[str, LayerSpec] = {}
        overrides: dict[str, OverrideSpec] = {}
        writer = TensorFileWriter(out.parent)
        total = len(self.terms) + len(self.overrides)
        try:
            for done, (name, term) in enumerate(sorted(self.terms.items())):
                if progress:
                    progress(name, done, total)
                for key, tensor in term_tensors(term, f"{name}#0").items():
                    writer.add(key, tensor)
                entry = base.entries[name]
                spec = LayerSpec(shape=list(entry.shape), dtype=DTYPE_NAMES[entry.dtype], terms=[term_spec(term)])
                layers[name] = spec
            for name, tensor in sorted(self.overrides.items()):
                override = Override(tensor, None, tuple(tensor.shape))
                overrides[name] = override_spec(override, DTYPE_NAMES[tensor.dtype])
                for key, part in override_tensors(name, override).items():
                    writer.add(key, part)
            manifest = make_manifest(base, weights, self.codec, self.config)
            write_artifact(out, manifest.model_copy(update={"layers": layers, "overrides": overrides}), writer)
        finally:
            writer.close()
        if progress:
            progress("", total, total)
        return Artifact.open(out)
