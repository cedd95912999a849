"""A matrix kept exactly, entropy-coded: nothing reads it in packed form, it is decoded at load.

    stream = zlib(n ‖ gaps ‖ exponents ‖ the rest)

The float32 entries, row by row: n int64 of them, all, or where three quarters are zero bits those that are not, each
with a gap: the zeros before it, 255 at a time. Their exponents, uint8 [n]. Then what is left of them, sign and
mantissa, in the order of their exponents (stable), as three byte planes, the highest first: entries of one size have
the same statistics, and Huffman's codes follow them. Bits an entry: close to the entropy of the entries drawn alone.

The served form is a plain `Coded`: bfloat16 where that is exact (`value_bits` 16), float32 otherwise.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deltaserve_kernels.terms.coded import Coded
from deltaserve_kernels.terms.packed import Packed

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]

SPARSE = 0.25  # share of entries other than zero below which zeros are counted, not written
FAR = 255  # a byte of a gap that another one follows


@dataclass(frozen=True)
class Exact(Packed):
    """[rows, cols]; stream uint8 [bytes]."""

    rows: int
    cols: int
    value_bits: int
    stream: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Exact:
        """float32 [rows, cols] →"""
        rows, cols = matrix.shape
        words = matrix.contiguous().cpu().flatten().numpy().view(np.uint32)
        places = np.flatnonzero(words)
        sparse = len(places) < SPARSE * len(words)
        kept, gaps = (words[places], _gaps(places)) if sparse else (words, b"")
        deflate = zlib.compressobj(9, strategy=zlib.Z_DEFAULT_STRATEGY if sparse else zlib.Z_RLE, memLevel=9)
        parts = [deflate.compress(part) for part in (np.int64(len(kept)).tobytes(), gaps, _split(kept))]
        stream = np.frombuffer(bytearray(b"".join([*parts, deflate.flush()])), np.uint8)
        short = torch.equal(matrix.bfloat16().float(), matrix)
        return cls(rows, cols, 16 if short else 32, torch.from_numpy(stream))

    def decode(self) -> Tensor:
        """float32 [rows, cols]. Raises ValueError for a stream that is broken or of another matrix."""
        size = self.rows * self.cols
        raw = self._inflated(8 + 5 * size + size // FAR)
        count = int(raw[:8].view(np.int64)[0]) if len(raw) >= 8 else -1
        num_gaps = len(raw) - 8 - 4 * count
        most_gaps = 0 if count == size else count + size // FAR
        if not 0 <= count <= size or not 0 <= num_gaps <= most_gaps:
            raise ValueError(f"the stream holds another matrix than one of {self.rows} × {self.cols}")
        words = _joined(raw[8 + num_gaps :], count)
        if count < size:
            gaps = raw[8 : 8 + num_gaps]
            ends = np.flatnonzero(gaps < FAR)
            places = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(len(ends))
            if len(ends) != count or (gaps[-1:] == FAR).any() or (places[-1:] >= size).any():
                raise ValueError(f"the stream holds other places than {count} of {self.rows} × {self.cols}")
            kept, words = words, np.zeros(size, np.uint32)
            words[places] = kept
        return torch.from_numpy(words.view(np.float32)).view(self.rows, self.cols).to(self.stream.device)

    def _inflated(self, limit: int) -> Bytes:
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(self.stream.cpu().numpy().tobytes(), limit + 1)
        except zlib.error as error:
            raise ValueError(f"the stream is damaged: {error}") from None
        if not inflate.eof or inflate.unused_data:
            raise ValueError("the stream is cut off, or too long")
        return np.frombuffer(raw, np.uint8)

    def problems(self) -> list[str]:
        try:
            values = self.decode()
        except ValueError as error:
            return [str(error)]
        if not bool(values.isfinite().all()):
            return ["the stream holds numbers that are not finite"]
        if self.value_bits == 16 and not torch.equal(values.bfloat16().float(), values):
            return ["value_bits 16, but the values are no bfloat16"]
        return []

    def serving(self) -> Coded:
        values = self.decode()
        return Coded(
            self.rows, self.cols, self.value_bits, "float", values.bfloat16() if self.value_bits == 16 else values
        )


def _gaps(places: np.ndarray[Any, np.dtype[np.int64]]) -> bytes:
    gaps = np.diff(places, prepend=-1) - 1
    last = np.cumsum(gaps // FAR + 1) - 1  # of each gap's bytes
    coded = np.full(last[-1] + 1 if len(last) else 0, FAR, np.uint8)
    coded[last] = gaps % FAR
    return coded.tobytes()


def _split(words: Words) -> bytes:
    """Exponents and sorted planes, 4 bytes a word."""
    exponents = (words >> 23).astype(np.uint8)
    rest = (words >> 31 << 23 | words & 0x7FFFFF)[np.argsort(exponents, kind="stable")]
    return b"".join(plane.astype(np.uint8).tobytes() for plane in (exponents, rest >> 16, rest >> 8, rest))


def _joined(raw: Bytes, count: int) -> Words:
    """The inverse of `_split`: 4 · count bytes → words, in little more than 20 bytes a word."""
    exponents, *planes = raw.reshape(4, count)
    rest = planes[0].astype(np.uint32)
    for plane in planes[1:]:
        rest <<= 8
        rest |= plane
    words = rest >> np.uint32(23) << np.uint32(31)
    rest &= 0x7FFFFF
    rest |= words
    words[np.argsort(exponents, kind="stable")] = rest
    words |= exponents.astype(np.uint32) << np.uint32(23)
    return words
