"""PEFT's (IA)³: learned factors l on the inputs or outputs of layers. Liu et al., arXiv 2205.05638, section 3.3.

    feedforward_modules     y = W·(l ⊙ x) + b         W ← W·diag(l)
    other modules           y = l ⊙ (W·x + b)         W ← diag(l)·W, b ← l ⊙ b

The vectors travel as they were trained, as factors on the base's weight, and such a layer has no term; a scaled bias
becomes an override. PEFT stores l as [1, in] or [out, 1]: that shape says which of the two it is. modules_to_save
become overrides. Convolutions, embeddings and transposed weights (fan_in_fan_out, GPT-2's Conv1D) are refused by name.
"""

from __future__ import annotations

import re

from torch import Tensor

from deltaserve.deltas.adapters.parts import ADAPTER_CONFIG, PREFIX, Parts, plain_name
from deltaserve.deltas.base_factors import BaseFactors
from deltaserve.deltas.checkpoint import Checkpoint, non_finite
from deltaserve.deltas.specs.base import VECTOR_FLOATS
from deltaserve.errors import CheckpointError

VECTOR = re.compile(r"^(?P<module>.+)\.ia3_l(\.default)?$")


def read_ia3(base: Checkpoint, weights: Checkpoint) -> Parts:
    if (weights.json(ADAPTER_CONFIG) or {}).get("fan_in_fan_out"):
        raise CheckpointError(
            f"{weights.directory}: fan_in_fan_out in {ADAPTER_CONFIG}: the base's weights are transposed"
        )
    parts = Parts("ia3")
    vectors: dict[str, Tensor] = {}
    for key in weights.names:
        tensor = weights.tensor(key)
        if problem := non_finite(tensor):
            parts.problems.append(f"{key}: {problem}")
        elif match := VECTOR.match(key.removeprefix(PREFIX)):
            vectors[match["module"]] = tensor
        else:
            parts.replace(base, key, plain_name(key), tensor, "an (IA)³ vector")
    for module, vector in vectors.items():
        if problem := _misfit(base, module, vector):
            parts.problems.append(f"{module}: {problem}")
        else:
            _scale(parts, base, module, vector)
    return parts


def _misfit(base: Checkpoint, module: str, vector: Tensor) -> str | None:
    """Why this vector scales nothing of `module`, or None."""
    name = f"{module}.weight"
    if name not in base.names:
        return f"the base has no {name}"
    shape = base.entries[name].shape
    if name == base.embedding_name:
        return "(IA)³ on an embedding"
    if len(shape) != 2:
        return f"(IA)³ on a weight of shape {shape}; only a linear layer's is taken"
    if vector.shape not in ((shape[0], 1), (1, shape[1])):
        return f"a vector of shape {tuple(vector.shape)}, base has {shape}: {(shape[0], 1)} or {(1, shape[1])} fit"
    if vector.dtype not in VECTOR_FLOATS:
        return f"a vector of type {vector.dtype}"
    return None


def _scale(parts: Parts, base: Checkpoint, module: str, vector: Tensor) -> None:
    name, bias, flat = f"{module}.weight", f"{module}.bias", vector.flatten().contiguous()
    if len(vector) != base.entries[name].shape[0]:
        parts.factors[name] = BaseFactors(cols=flat)
        return
    parts.factors[name] = BaseFactors(rows=flat)
    if bias in parts.overrides:
        parts.problems.append(f"{bias}: both scaled and replaced")
    elif bias in base.names:
        scaled = base.tensor(bias).float() * flat.float()
        if problem := non_finite(scaled):
            parts.problems.append(f"{bias}: scaled, it has {problem}")
        parts.overrides[bias] = scaled
