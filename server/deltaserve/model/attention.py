"""Paged attention, as an attention function of transformers' models.

    K, V of a token go to slot b·block_size + offset of its block table; a query sees the slots of its own sequence to
    its own position. Sequences with one query go through one padded batch, the others one by one.

Reference in plain torch; a fused kernel would take its place with the same AttentionBatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from deltaserve_kernels.paged_attention.fused import PagedAttention

NAME = "deltaserve_paged"


class Span(NamedTuple):
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
    decode_rows: Tensor | None  # int64 [B]: rows that are the only query of their sequence; None: all rows
    decode_tables: Tensor  # int32 [B, blocks]: of their sequences, padded with the first block
    decode_lengths: Tensor  # int32 [B]: context length, the row itself included
    longest: int  # of them
    block_size: int
    prefills: Sequence[Prefill] = ()
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)  # of this step, shared by the layers

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int, device: torch.device | str) -> AttentionBatch:
        write: list[int] = []
        decoding: list[Span] = []
        prefills: list[Prefill] = []
        for span in spans:
            first = span.length - (span.stop - span.start)
            write += [span.blocks[at // block_size] * block_size + at % block_size for at in range(first, span.length)]
            if span.stop - span.start == 1:
                decoding.append(span)
            else:
                blocks = torch.tensor(span.blocks[: -(-span.length // block_size)], device=device)
                slots = (blocks[:, None] * block_size + torch.arange(block_size, device=device)).flatten()
                prefills.append(Prefill(span.start, span.stop, slots[: span.length]))
        tables = [span.blocks[: -(-span.length // block_size)] for span in decoding]
        width = max(map(len, tables), default=0)
        # Padded with a block of its own: what is masked must not be another request's, whose NaN would show through.
        padded = [[*table, *[table[0]] * (width - len(table))] for table in tables]
        rows = torch.tensor([span.start for span in decoding], dtype=torch.int64, device=device) if prefills else None
        return cls(
            write_slots=torch.tensor(write, dtype=torch.int64, device=device),
            decode_rows=rows,
            decode_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(padded), width),
            decode_lengths=torch.tensor([span.length for span in decoding], dtype=torch.int32, device=device),
            longest=max((span.length for span in decoding), default=0),
            block_size=block_size,
            prefills=prefills,
        )

    @cached_property
    def decode_kv_slots(self) -> Tensor:
        """int64 [B, longest context], padded with the first of the same row"""
        position = torch.arange(self.longest, device=self.decode_tables.device)
        blocks = self.decode_tables[:, position // self.block_size].long()
        slots = blocks * self.block_size + position % self.block_size
        return torch.where(position < self.decode_lengths[:, None], slots, slots[:, :1])

    def decode_mask(self, window: int | None) -> Tensor:
        """bool [B, 1, 1, longest context]"""
        key = (window, -1)
        if key not in self.masks:
            position = torch.arange(self.longest, device=self.decode_lengths.device)
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

    def fits(self, kernel: PagedAttention | None) -> bool:
        """Are all layers such as the kernel reads?"""
        return kernel is not None and all(kernel.fits(*layer) for layer in self._layers.values())

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
    paged: PagedAttention | None  # Triton's

    @property
    def batch(self) -> AttentionBatch: ...


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
        batch = context.batch
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, size]
        keys, values = context.cache.layer(int(module.layer_idx), k, v)  # type: ignore[arg-type]
        keys.index_copy_(0, batch.write_slots, k)
        values.index_copy_(0, batch.write_slots, v)
        out = torch.empty_like(q[..., : v.shape[-1]], memory_format=torch.contiguous_format)
        if len(batch.decode_lengths):
            own = q if batch.decode_rows is None else q[batch.decode_rows]
            if context.paged is not None and context.paged.fits(keys, values):
                tables, lengths = batch.decode_tables, batch.decode_lengths
                scale = q.shape[-1] ** -0.5 if scaling is None else scaling
                answer = context.paged(
                    own, keys, values, tables, lengths, scale, window=sliding_window, softcap=softcap, sinks=s_aux
                )
            else:
                mask = batch.decode_mask(sliding_window)
                k, v = (x[batch.decode_kv_slots].transpose(1, 2) for x in (keys, values))  # [B, kv heads, L, size]
                grouped = own.reshape(len(own), k.shape[1], -1, q.shape[-1])  # [B, kv heads, group, size]
                if is_plain:
                    answer = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling)
                else:
                    answer = capped_attention(grouped[..., None, :], k, v, mask[..., None, :], scaling, softcap, s_aux)
                answer = answer.reshape(len(answer), -1, v.shape[-1])
            if batch.decode_rows is None:
                return answer[None], None
            out[batch.decode_rows] = answer
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
