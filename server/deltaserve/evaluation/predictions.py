"""What a model predicts at many positions, kept small: its final hidden states and its output head.

    log p = log-softmax(head(hidden))        hidden [T, D] in the model's type, log p float32 [T, V]

Log-probabilities are made again, some positions at a time, each time they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from deltaserve.deltas.head import divergence
from deltaserve.deltas.reference_model import exact_products

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from deltaserve.deltas.head import Head

BATCH_TOKENS = 4096  # read at once, padding included
Advance = Callable[[str], None]  # told the name of the step that begins


class Predictions(NamedTuple):
    head: Head
    hidden: Tensor  # [T, D]


def predictions_in_chunks(*models: Predictions) -> Iterator[tuple[slice, list[Tensor]]]:
    """Positions, and log p float32 [positions, V] of every model at them. All have the same number of positions."""
    first, start = models[0], 0
    with exact_products(first.hidden.dtype):
        for piece in first.head.pieces(first.hidden):
            part = slice(start, start := start + len(piece))
            yield part, [model.head.log_p(model.hidden[part]) for model in models]


def mean_divergence(p: Predictions, q: Predictions) -> float:
    """KL(p ‖ q), nats, mean over the positions."""
    return sum(float(divergence(*log_p)) for _, log_p in predictions_in_chunks(p, q)) / len(p.hidden)


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
