"""What an adapter adds to its base, and how that is written: terms as they are, changed tensors as overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaserve.deltas.artifact import Artifact, Override, override_spec, override_tensors
from deltaserve.deltas.base_factors import BaseFactors
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import Progress, make_manifest, write_artifact
from deltaserve.deltas.manifest import BASE_COLS, BASE_ROWS, LayerSpec, OverrideSpec
from deltaserve.deltas.specs import term_spec, term_tensors
from deltaserve.deltas.tensorfile import DTYPE_NAMES, TensorFileWriter
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve_kernels.terms import Term

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of the names in an adapter that PEFT saved
SHOWN = 50


def plain_name(key: str) -> str:
    """The base's name of a tensor that PEFT saved whole: a bias, or one of modules_to_save."""
    name = key.removeprefix(PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    return name.replace(".base_layer.", ".")


@dataclass
class Parts:
    """Terms, factors and overrides by tensor name, and every reason not to take them."""

    codec: str
    config: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    factors: dict[str, BaseFactors] = field(default_factory=dict)
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
        adapted = self.terms.keys() | self.factors.keys()
        both = [f"{name}: both adapted and replaced" for name in sorted(adapted & self.overrides.keys())]
        if problems := self.problems + both:
            listed = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
            raise CheckpointError(f"{weights.directory}: {len(problems)} problems:\n{listed}")
        layers: dict[str, LayerSpec] = {}
        overrides: dict[str, OverrideSpec] = {}
        writer = TensorFileWriter(out.parent)
        total = len(adapted) + len(self.overrides)
        try:
            for done, name in enumerate(sorted(adapted)):
                if progress:
                    progress(name, done, total)
                layers[name] = self._write_layer(name, base, writer)
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

    def _write_layer(self, name: str, base: Checkpoint, writer: TensorFileWriter) -> LayerSpec:
        terms = [self.terms[name]] if name in self.terms else []
        factors = self.factors.get(name, BaseFactors())
        for index, term in enumerate(terms):
            for key, tensor in term_tensors(term, f"{name}#{index}").items():
                writer.add(key, tensor)
        for key, vector in ((BASE_ROWS, factors.rows), (BASE_COLS, factors.cols)):
            if vector is not None:
                writer.add(f"{name}#{key}", vector)
        return LayerSpec(
            shape=list(base.entries[name].shape),
            dtype=DTYPE_NAMES[base.entries[name].dtype],
            terms=[term_spec(term) for term in terms],
            base_rows=factors.rows is not None,
            base_cols=factors.cols is not None,
        )
