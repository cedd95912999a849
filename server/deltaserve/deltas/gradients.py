"""How much the predictions care about every linear: the diagonal of its Fisher information, in Kronecker form.

    fisher_out = Σ_t w_t · g_t² / Σ_t w_t       float32 [out]
    moment_in  = Σ_t w_t · x_t² / Σ_t w_t       float32 [in]

    x_t, g_t  input of the linear at token t, and gradient of the text's loss with respect to its output there
    loss      −log p of a next token drawn from the model's own prediction, summed over the text's tokens
    w_t       weight of the text

A change Δ of the weight then moves the predictions by about

    KL ≈ ½ · Σ_ij fisher_out_i · moment_in_j · Δ_ij²        nats a token

(K-FAC, arXiv 1503.05671, sections 2.2 and 3, its factors cut to diagonals; what tokens of one text have in common is
left out). Drawn tokens, not the text's own: those give the "empirical" Fisher information, which on a real fine-tune
overstates KL several times and unevenly. Gradients of weights are neither computed nor stored, and of the activations
only those of one decoder layer (deltas.recompute).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from deltaserve.deltas.calibration import Batch, Text, decoder_layers, layer_linears, make_batches
from deltaserve.deltas.head import Head
from deltaserve.deltas.recompute import recomputed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sensitivity:
    fisher_out: Tensor  # float32 [out]
    moment_in: Tensor  # float32 [in]


def sensitivities(
    model: PreTrainedModel, texts: Sequence[Text], *, batch: int = 1, seed: int = 0
) -> dict[str, Sensitivity]:
    """By the name of the weight, of every linear of the decoder layers that sees all tokens; on the CPU.

    `seed` is that of the drawn tokens.
    """
    prefix, layers = decoder_layers(model)
    linears = layer_linears(prefix, layers)
    head = Head(model)
    squares = _Squares()
    handles = [
        linear.register_forward_hook(lambda module, args, out, name=name: squares.watch(name, args[0], out))
        for name, linear in linears.items()
    ]
    # no weight needs a gradient, so the graph begins at the embedded tokens
    handles.append(model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_()))
    generator = torch.Generator(model.device).manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), recomputed(layers):
            for squares.batch in make_batches(texts, batch, model.device):
                squares.are_watching = True
                body = model.base_model(input_ids=squares.batch.ids, use_cache=False)
                hidden = body.last_hidden_state.flatten(0, 1).index_select(0, squares.batch.kept)  # [kept tokens, D]
                leaf = hidden.detach().requires_grad_()
                for piece in head.pieces(leaf):
                    logits = head(piece)
                    F.cross_entropy(logits, draw(logits, generator), reduction="sum").backward()  # type: ignore[no-untyped-call]
                squares.are_watching = False  # the layers that run again
                hidden.backward(leaf.grad)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {name: Sensitivity(total.cpu(), squares.into[name].cpu()) for name, total in squares.out.items()}


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row's distribution, int64 [rows]."""
    return torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)


class _Squares:
    """Σ share · x² and Σ share · g² by linear."""

    def __init__(self) -> None:
        self.batch: Batch
        self.are_watching = True
        self.into: dict[str, Tensor] = {}
        self.out: dict[str, Tensor] = {}

    def watch(self, name: str, x: Tensor, out: Tensor) -> None:
        if not self.are_watching:
            return
        self._add(self.into, name, x.detach())
        out.register_hook(lambda gradient: self._add(self.out, name, gradient))  # type: ignore[no-untyped-call]

    def _add(self, sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if (rows := self.batch.rows(tensor)) is not None:
            sums[name] = sums.get(name, 0) + self.batch.share * rows.float().square().sum(0)
