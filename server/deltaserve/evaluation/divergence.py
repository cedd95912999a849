"""KL(fine-tune ‖ restored) on texts without right answers: what a delta changes, in nats per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deltaserve.deltas.head import Head
from deltaserve.deltas.reference_model import load_reference
from deltaserve.evaluation.predictions import Predictions, final_hidden, mean_divergence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.checkpoint import Checkpoint

ROWS = 16  # texts at once


class Divergence:
    """The fine-tune runs once, each delta after it. Texts by kind, as token ids. Raises CheckpointError."""

    def __init__(
        self,
        base: Checkpoint,
        finetuned: Checkpoint,
        texts: Mapping[str, Sequence[list[int]]],
        dtype: torch.dtype,
    ) -> None:
        self._base, self._texts, self._dtype = base, texts, dtype
        self._wanted = self._predictions(load_reference(base, None, finetuned, dtype))

    def measure(self, artifact: Artifact) -> dict[str, float]:
        """Mean over the tokens of each kind of text."""
        found = self._predictions(load_reference(self._base, artifact, None, self._dtype))
        return {kind: mean_divergence(wanted, found[kind]) for kind, wanted in self._wanted.items()}

    @torch.inference_mode()
    def _predictions(self, model: PreTrainedModel) -> dict[str, Predictions]:
        head = Head(model, exact=True)
        return {
            kind: Predictions(head, final_hidden(model, texts, list(map(len, texts)), ROWS, lambda _: None))
            for kind, texts in self._texts.items()
        }
