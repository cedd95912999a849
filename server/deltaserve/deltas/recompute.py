"""Gradients through a model in the memory of one of its layers: the rest is computed again. arXiv 1604.06174."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

CHUNK_LOGITS = 2**22  # made at once


def tokens_at_once(model: PreTrainedModel) -> int:
    """For so many tokens logits are made at once."""
    return max(1, CHUNK_LOGITS // int(model.get_output_embeddings().weight.shape[0]))  # type: ignore[no-untyped-call]


@contextmanager
def recomputed(layers: nn.ModuleList) -> Iterator[None]:
    """Inside, a layer forgets what it computes, and runs again on the way back; its hooks run both times."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
