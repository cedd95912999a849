"""What a decoder of the Llama family does beside its linear layers: src/decoder.c. Buffers belong to the caller."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_long, c_void_p

from torch import Tensor

from deltaserve_kernels.native.library import Library

PAGE = 16  # positions of one page of the KV cache


class CNormRun(ctypes.Structure):
    """Rows [start, start + rows) and the addresses of all their norm weights, bfloat16."""

    _fields_ = [("start", c_int32), ("rows", c_int32), ("weights", c_void_p)]


class CRotary(ctypes.Structure):
    """Queries, keys and values of float32 y [T, (heads + 2 kv heads) · size], rotated, bfloat16: q [T, heads · size],
    the others into the cache at `slots`. q_norm, k_norm: numbers of norms, −1 for none."""

    _fields_ = [
        ("y", c_void_p), ("cos_sin", c_void_p), ("positions", c_void_p), ("slots", c_void_p),
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("ldy", c_long),
        ("rows", c_int32), ("heads", c_int32), ("kv_heads", c_int32), ("size", c_int32), ("runs", c_int32),
        ("q_norm", c_int32), ("k_norm", c_int32), ("eps", c_float), ("run", c_void_p),
    ]  # fmt: skip


class CAttention(ctypes.Structure):
    """softmax(q·Kᵀ · scale)·V of each row over the `lengths` first positions of its sequence, the last `window` of them
    where that is not 0."""

    _fields_ = [
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("pages", c_void_p), ("sequences", c_void_p),
        ("lengths", c_void_p), ("out", c_void_p), ("ldout", c_long), ("rows", c_int32), ("heads", c_int32),
        ("kv_heads", c_int32), ("size", c_int32), ("most_pages", c_int32), ("window", c_int32), ("scale", c_float),
    ]  # fmt: skip


class CGated(ctypes.Structure):
    """out = silu(gate) ⊙ up, y = [gate, up] float32 [T, 2 · size], out bfloat16."""

    _fields_ = [
        ("y", c_void_p), ("out", c_void_p), ("ldy", c_long), ("ldout", c_long), ("rows", c_int32), ("size", c_int32),
    ]  # fmt: skip


def add_norm(
    library: Library, h: Tensor, y: Tensor | None, out: Tensor, eps: float, runs: ctypes.Array[CNormRun], index: int
) -> None:
    """h += y; out = h / rms(h) · weight `index` of the row's run. h float32 [T, size], out bfloat16."""
    library.functions.ds_add_norm(
        h.data_ptr(),
        None if y is None else y.data_ptr(),
        0 if y is None else y.stride(0),
        out.data_ptr(),
        out.stride(0),
        h.shape[1],
        eps,
        runs,
        len(runs),
        index,
    )


def embed(library: Library, ids: Tensor, tiles: Tensor, h: Tensor) -> None:
    """h [T, size] = rows `ids` int64 of the matrix that `tiles` holds."""
    library.functions.ds_embed(ids.data_ptr(), tiles.data_ptr(), len(ids), h.shape[1], h.data_ptr())


__all__ = ["PAGE", "CAttention", "CGated", "CNormRun", "CRotary", "add_norm", "embed"]
