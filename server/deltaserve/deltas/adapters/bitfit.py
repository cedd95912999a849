"""BitFit: only the biases were trained. Ben Zaken, Ravfogel, Goldberg, arXiv 2106.10199 (ACL 2022).

    y = x·W_baseᵀ + b_fine-tune

A directory or file of nothing but bias tensors, under the base's names or PEFT's. Biases that did not change do not
travel. A base without biases (the Llama family) has nothing to train here: its adapters are refused by name. A full
checkpoint in which only biases changed needs no import: compressing it gives the same artifact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaserve.deltas.adapters.parts import Parts, plain_name
from deltaserve.deltas.checkpoint import Checkpoint, non_finite
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def is_biases(path: Path) -> bool:
    """Only the headers are read."""
    if not path.is_dir() and not (path.is_file() and path.suffix == ".safetensors"):
        return False
    try:
        entries = Checkpoint.open(path).entries
    except CheckpointError:
        return False
    return bool(entries) and all(name.endswith(".bias") for name in entries)


def read_biases(base: Checkpoint, weights: Checkpoint) -> Parts:
    parts = Parts("bitfit")
    for key in weights.names:
        tensor = weights.tensor(key)
        if problem := non_finite(tensor):
            parts.problems.append(f"{key}: {problem}")
        else:
            parts.replace(base, key, plain_name(key), tensor, "a bias")
    return parts
