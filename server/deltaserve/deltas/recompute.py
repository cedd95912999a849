"""Gradients through a model in the memory of one of its layers: the rest is computed again. arXiv 1604.06174."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.utils.checkpoint import checkpoint

from deltaserve.deltas.reference_model import replaced_forwards

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn


def recomputed(layers: nn.ModuleList) -> AbstractContextManager[None]:
    """Inside, a layer forgets what it computes, and runs again on the way back; its hooks run both times."""
    again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    return replaced_forwards({layer: again(layer.forward) for layer in layers})
