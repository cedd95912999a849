"""Parameter-efficient fine-tunes → artifacts, their parameters kept as they were trained.

lora     PEFT's LoRA: one low-rank term a layer; trained biases and modules_to_save become overrides
bitfit   biases alone (Ben Zaken et al., arXiv 2106.10199): overrides, and no layer at all
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaserve.deltas.adapters.bitfit import is_biases, read_biases
from deltaserve.deltas.adapters.lora import is_peft, read_lora
from deltaserve.deltas.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.compress import Progress


def is_adapter(path: Path) -> bool:
    return is_peft(path) or is_biases(path)


def import_adapter(base: Checkpoint, adapter: Path, out: Path, *, progress: Progress | None = None) -> Artifact:
    """Writes the artifact `out` and opens it. Raises CheckpointError listing everything that does not fit."""
    weights = Checkpoint.open(adapter)
    parts = read_lora(base, weights) if is_peft(adapter) else read_biases(base, weights)
    return parts.write(base, weights, out, progress)
