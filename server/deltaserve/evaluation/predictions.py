"""What a model predicts at many positions, kept small: its final hidden states and its output head.

    log p = log-softmax(hidden · headᵀ + bias)        hidden [T, D] in the model's type, log p float32 [T, V]

Log-probabilities would take V / D times the memory (85 times for a vocabulary of 49 152 at hidden size 576), so they
are made again, some positions at a time, each time they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from deltaserve.deltas.reference_model import exact_products
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096  # read at once, padding included
CHUNK_LOGITS = 2**23  # made at once
HEAD_TOLERANCE = 0.02  # relative, ‖·‖₂: several times what bfloat16 rounds
Advance = Callable[[str], None]  # told the name of the step that begins


class Head(NamedTuple):
    """The last linear layer of a model."""

    weight: Tensor  # float32 [V, D]
    bias: Tensor | None  # float32 [V]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        bias = getattr(layer, "bias", None)
        return cls(layer.weight.detach().float(), None if bias is None else bias.detach().float())

    @property
    def vocab_size(self) -> int:
        return int(self.weight.shape[0])

    def log_p(self, hidden: Tensor) -> Tensor:
        """float32 [T, V]"""
        return F.log_softmax(F.linear(hidden.float(), self.weight, self.bias), dim=-1)


class Predictions(NamedTuple):
    head: Head
    hidden: Tensor  # [T, D]


def predictions_in_chunks(*models: Predictions) -> Iterator[tuple[slice, list[Tensor]]]:
    """Positions, and log p float32 [positions, V] of every model at them. All have the same number of positions."""
    step = max(1, CHUNK_LOGITS // models[0].head.vocab_size)
    with exact_products(models[0].hidden.dtype):
        for start in range(0, len(models[0].hidden), step):
            part = slice(start, start + step)
            yield part, [model.head.log_p(model.hidden[part]) for model in models]


def summed_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p ‖ q), nats, summed over the positions."""
    return float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))


def mean_divergence(p: Predictions, q: Predictions) -> float:
    """KL(p ‖ q), nats, mean over the positions."""
    return sum(summed_divergence(*log_p) for _, log_p in predictions_in_chunks(p, q)) / len(p.hidden)


def final_hidden(
    model: PreTrainedModel, sequences: Sequence[list[int]], keep: Sequence[int], rows: int, advance: Advance
) -> Tensor:
    """The final hidden states of the last `keep[i]` tokens of sequence i, one after the other: [Σ keep, D]."""
    kept: dict[int, Tensor] = {}
    for part in batches(sequences, rows):
        advance("reading")
        ids, mask = padded(model, [sequences[index] for index in part])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        body = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        kept.update({index: body.last_hidden_state[row, -keep[index] :].clone() for row, index in enumerate(part)})
    return torch.cat([kept[index] for index in range(len(sequences))])


def check_head(model: PreTrainedModel, ids: list[int]) -> None:
    """Raises CheckpointError where logits are more than a linear layer of hidden states (soft caps, scales)."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    head = Head.of(model)
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, -1].float()
    ours = F.linear(hidden, head.weight, head.bias)
    if float((logits - ours).norm()) > HEAD_TOLERANCE * float(ours.norm()):
        raise CheckpointError(f"{type(model).__name__}: its logits are not those of a linear head; it is not judged")


def batches(sequences: Sequence[list[int]], rows: int) -> list[list[int]]:
    """Indices, shortest sequences first: up to `rows` and BATCH_TOKENS at once."""
    parts: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index])):
        if not parts or len(parts[-1]) >= min(rows, BATCH_TOKENS // len(sequences[index])):
            parts.append([])
        parts[-1].append(index)
    return parts


def padded(model: PreTrainedModel, sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """ids and attention mask, int64 [B, T] on the model's device, padded on the left."""
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences], device=model.device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=model.device)
    return ids, mask
