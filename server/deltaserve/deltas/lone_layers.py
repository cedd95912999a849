"""How far the predictions move when one layer alone changes: the KL of the fine-tune to itself with another weight.

    KL_t = Σ_v p_t(v) · (log p_t(v) − log q_t(v))        nats, float64 [n], over the predicted tokens t of all texts
    p, q  next-token distributions of the fine-tune, and of the fine-tune with one weight replaced

The layers before the one that is changed are not run again: what each decoder layer reads is kept from the first pass.
The model is to be in float32: one coded layer moves predictions by less than bfloat16 rounds them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from deltaserve.deltas.calibration import decoder_layers, layer_linears, make_batches
from deltaserve.deltas.head import Head
from deltaserve.deltas.reference_model import replaced_forwards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from deltaserve.deltas.calibration import Text

BATCH = 8


class LoneLayers:
    """In memory: the model, its log-probabilities at all predicted tokens, what each decoder layer reads."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, texts: Sequence[Text]) -> None:
        prefix, layers = decoder_layers(model)
        self._model, self._head, self._layers = model, Head(model), list(layers)
        self._linears = {
            name: (index, linear)
            for index, layer in enumerate(layers)
            for name, linear in layer_linears(f"{prefix}.{index}", layer).items()
        }
        self._batches = [batch for batch in make_batches(texts, BATCH, model.device) if len(batch.predicting)]
        self._reads: list[list[Tensor]] = []  # by batch and decoder layer
        self._log_p: list[Tensor] = []
        for batch in self._batches:
            reads: list[Tensor] = []
            handles = [
                layer.register_forward_pre_hook(
                    lambda module, args, kwargs, reads=reads: reads.append(
                        args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                )
                for layer in self._layers
            ]
            try:
                self._log_p.append(self._head.log_p(batch.hidden(model)))
            finally:
                for handle in handles:
                    handle.remove()
            self._reads.append(reads)

    @torch.no_grad()
    def divergence(self, name: str, weight: Tensor) -> Tensor | None:
        """KL_t with the weight `name` replaced; None for what is no linear of a decoder layer."""
        if name not in self._linears:
            return None
        index, linear = self._linears[name]
        before = linear.weight.data
        linear.weight.data = weight.to(before)
        try:
            parts = []
            for batch, reads, log_p in zip(self._batches, self._reads, self._log_p, strict=True):
                given = dict.fromkeys(self._layers[:index], partial(_given, reads[index]))
                with replaced_forwards(given):
                    log_q = self._head.log_p(batch.hidden(self._model))
                parts.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1, dtype=torch.float64))
        finally:
            linear.weight.data = before
        return torch.cat(parts).cpu() if parts else torch.zeros(0, dtype=torch.float64)


def _given(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden
