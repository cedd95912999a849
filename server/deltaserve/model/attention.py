"""Paged attention, as an attention function of transformers' models.

    K, V of a token go to slot b·block_size + offset of its block table; a query sees the slots of its own sequence to
    its own position. Sequences with one query go through one padded batch, the others one by one.

Reference in plain torch; a fused kernel would take its place with the same AttentionBatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "deltaserve_paged"


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) are the last positions of a sequence of `length` tokens, whose KV lies in `blocks`."""

    start: int
    stop: int
    length: int
    blocks: Sequence[int]


@dataclass(frozen=True)
class Prefill:
    """Queries [start, stop) of the step: the last stop − start positions of a sequence."""

    start: int
    stop: int
    kv_slots: Tensor  # int64 [context length]


@dataclass
class AttentionBatch:
    """Where the step's tokens write, and what they read."""

    write_slots: Tensor  # int64 [T]
    decode_rows: Tensor  # int64 [B]: rows that are the only query of their sequence
    decode_kv_slots: Tensor  # int64 [B, longest context], padded with slots of the same row
    decode_lengths: Tensor  # int64 [B]: context length, the row itself included
    prefills: list[Prefill]
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)  # of this step, shared by the layers

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int, device: torch.device) -> AttentionBatch:
        write: list[int] = []
        decode_rows: list[int] = []
        contexts: list[list[int]] = []
        prefills: list[Prefill] = []
        for span in spans:
            blocks = span.blocks[: -(-span.length // block_size)]
            slots = [block * block_size + i for block in blocks for i in range(block_size)][: span.length]
            write += slots[span.length - (span.stop - span.start) :]
            if span.stop - span.start == 1:
                decode_rows.append(span.start)
                contexts.append(slots)
            else:
                prefills.append(Prefill(span.start, span.stop, torch.tensor(slots, device=device)))
        longest = max(map(len, contexts), default=0)
        # Padded with a slot of its own: what is masked must not be another request's, whose NaN would show through.
        padded = [context + context[:1] * (longest - len(context)) for context in contexts]
        return cls(
            write_slots=torch.tensor(write, device=device),
            decode_rows=torch.tensor(decode_rows, dtype=torch.int64, device=device),
            decode_kv_slots=torch.tensor(padded, dtype=torch.int64, device=device),
            decode_lengths=torch.tensor([len(context) for context in contexts], dtype=torch.int64, device=device),
            prefills=prefills,
        )

    def decode_mask(self, window: int | None) -> Tensor:
        """bool [B, 1, 1, longest context]"""
        key = (window, -1)
        if key not in self.masks:
            position = torch.arange(self.decode_kv_slots.shape[1], device=self.decode_lengths.device)
            lengths = self.decode_lengths[:, None]
            visible = position < lengths
            if window is not None:
                visible &= position >= lengths - window
            self.masks[key] = visible[:, None, None]
        return self.masks[key]

    def prefill_mask(self, index: int, window: int | None) -> Tensor:
        """bool [queries, context]: causal, the queries being the last positions."""
        key = (window, index)
        if key not in self.masks:
            prefill = self.prefills[index]
            length = len(prefill.kv_slots)
            key_at = torch.arange(length, device=prefill.kv_slots.device)
            query_at = key_at[length - (prefill.stop - prefill.start) :, None]
            visible = key_at <= query_at
            if window is not None:
                visible &= key_at > query_at - window
            self.masks[key] = visible
        return self.masks[key]


class KvCache:
    """K and V of every layer, [slots, kv heads, head size] each, made when a layer first writes."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [T, kv heads, head size] say shape, type and device."""
        if index not in self._layers:
            self._layers[index] = (
                key.new_zeros(self.num_slots, *key.shape[1:]),
                value.new_zeros(self.num_slots, *value.shape[1:]),
            )
        return self._layers[index]

    @property
    def num_layers(self) -> int:
        """Layers that have written."""
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._layers.values())


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """softmax(c·tanh(q·kᵀ·scaling / c) ‖ sinks)·v: scores under a cap c, and a score for each head that takes its share
    of the attention to nowhere. Either may be None.

    q [..., kv heads, group, queries, size], k and v [..., kv heads, L, size], mask bool [..., queries, L],
    sinks [heads] → [..., kv heads, group, queries, size of v]
    """
    k, v = k.unsqueeze(-3), v.unsqueeze(-3)
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        own = sinks.float().view(*q.shape[-4:-2], 1, 1)
        scores = torch.cat([scores, own.expand(*scores.shape[:-1], 1)], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : k.shape[-2]]
    return shares.to(v.dtype) @ v


class _Context(Protocol):
    cache: KvCache

    @property
    def current(self) -> Any: ...


def make_attention(context: _Context) -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers calls: query [1, heads, T, size], key and value [1, kv heads, T, size]."""

    def paged_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG001 (the masks are ours)
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,  # sinks
        **_options: Any,
    ) -> tuple[Tensor, None]:
        is_plain = softcap is None and s_aux is None
        batch: AttentionBatch = context.current.attention
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, size]
        keys, values = context.cache.layer(int(module.layer_idx), k, v)  # type: ignore[arg-type]
        keys.index_copy_(0, batch.write_slots, k)
        values.index_copy_(0, batch.write_slots, v)
        out = torch.empty_like(q[..., : v.shape[-1]])
        if len(batch.decode_rows):
            mask = batch.decode_mask(sliding_window)
            k, v = (x[batch.decode_kv_slots].transpose(1, 2) for x in (keys, values))  # [B, kv heads, L, size]
            grouped = q[batch.decode_rows].view(
                len(batch.decode_rows), k.shape[1], -1, q.shape[-1]
            )  # [B, kv heads, group, size]
            if is_plain:
                answer = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling)
            else:
                answer = capped_attention(grouped[..., None, :], k, v, mask[..., None, :], scaling, softcap, s_aux)
            out[batch.decode_rows] = answer.reshape(len(answer), -1, v.shape[-1])
        for index, prefill in enumerate(batch.prefills):
            mask = batch.prefill_mask(index, sliding_window)
            k, v = (x[prefill.kv_slots].transpose(0, 1) for x in (keys, values))  # [kv heads, L, size]
            own = q[prefill.start : prefill.stop].transpose(0, 1)  # [heads, queries, size]
            if is_plain:
                answer = F.scaled_dot_product_attention(
                    own[None], k[None], v[None], attn_mask=mask, scale=scaling, enable_gqa=True
                )[0]
            else:
                grouped = own.view(len(k), -1, *own.shape[1:])
                answer = capped_attention(grouped, k, v, mask, scaling, softcap, s_aux).flatten(0, 1)
            out[prefill.start : prefill.stop] = answer.transpose(0, 1)
        return out[None], None

    return paged_attention
