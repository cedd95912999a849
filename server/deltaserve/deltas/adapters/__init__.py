"""Parameter-efficient fine-tunes → artifacts, their parameters kept as they were trained.

lora     PEFT's LoRA: one low-rank term a layer; trained biases and modules_to_save become overrides
ia3      PEFT's (IA)³: factors on the base's rows or columns, no term; modules_to_save become overrides
bitfit   biases alone (Ben Zaken et al., arXiv 2106.10199): overrides, and no layer at all
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaserve.deltas.adapters.bitfit import is_biases, read_biases
from deltaserve.deltas.adapters.ia3 import read_ia3
from deltaserve.deltas.adapters.lora import read_lora
from deltaserve.deltas.adapters.parts import ADAPTER_CONFIG
from deltaserve.deltas.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.compress import Progress


def is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() or is_biases(path)


def import_adapter(base: Checkpoint, adapter: Path, out: Path, *, progress: Progress | None = None) -> Artifact:
    """Writes the artifact `out` and opens it. Raises CheckpointError listing everything that does not fit."""
    weights = Checkpoint.open(adapter)
    config = weights.json(ADAPTER_CONFIG)
    read = read_biases if config is None else read_ia3 if config.get("peft_type") == "IA3" else read_lora
    return read(base, weights).write(base, weights, out, progress)
