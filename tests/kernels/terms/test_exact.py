"""Exact: every bit comes back, and a broken stream is an error, never a matrix."""

from __future__ import annotations

import re
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.terms import Exact

from ..test_apply import check
from ..tolerances import RELATIVE_RMS

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.5e-39, 3.4e38, -3.4e38, 1 / 3, 1.0, -2.0]


def bits(matrix: Tensor) -> list[int]:
    return matrix.contiguous().view(torch.int32).flatten().tolist()


def normal(rows: int, cols: int, share: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    keep = torch.rand(rows, cols, generator=generator) < share
    return torch.where(keep, torch.randn(rows, cols, generator=generator), 0.0)


def raw_stream(term: Exact) -> bytes:
    return zlib.decompress(term.stream.numpy().tobytes())


def with_raw(term: Exact, raw: bytes) -> Exact:
    return replace(term, stream=torch.from_numpy(np.frombuffer(bytearray(zlib.compress(raw)), np.uint8)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_every_bit_comes_back(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    number = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False))
    zero = st.sampled_from([0.0, 0.0, 0.0, -0.0])
    chosen = st.one_of(zero, number) if data.draw(st.booleans()) else zero
    matrix = torch.tensor(data.draw(st.lists(chosen, min_size=rows * cols, max_size=rows * cols))).view(rows, cols)
    term = Exact.of(matrix)
    assert bits(term.decode()) == bits(matrix)
    assert term.problems() == []
    assert term.value_bits == (16 if torch.equal(matrix.bfloat16().float(), matrix) else 32)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.24, 0.26, 1.0])
def test_every_bit_of_sparse_and_dense_matrices_comes_back(share: float) -> None:
    matrix = normal(130, 70, share)
    assert bits(Exact.of(matrix).decode()) == bits(matrix)
    assert bits(Exact.of(matrix.T).decode()) == bits(matrix.T)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 1019])
def test_zeros_are_counted_at_any_distance(gap: int) -> None:
    matrix = torch.zeros(1, 2500)
    matrix[0, gap], matrix[0, 2 * gap + 1], matrix[0, -1] = 1, -1, 0.5
    assert bits(Exact.of(matrix).decode()) == bits(matrix)


def test_the_stream_of_the_format_is_frozen() -> None:
    """Count, exponents 127 128 127 0, then − 1.5, 1, − 0 …: sorted by exponent: −0, −1.5, 1, 2."""
    dense = Exact.of(torch.tensor([[-1.5, 2.0], [1.0, -0.0]]))
    assert raw_stream(dense) == bytes([4, *[0] * 7, 127, 128, 127, 0, 0x80, 0xC0, 0, 0, *[0] * 8])
    sparse = torch.zeros(1, 600)
    sparse[0, 2], sparse[0, 300] = 1.0, -1.0
    gaps = [2, 255, 42]
    assert raw_stream(Exact.of(sparse)) == bytes([2, *[0] * 7, *gaps, 127, 127, 0, 0x80, *[0] * 4])


def test_the_size_is_near_the_entropy() -> None:
    """Integers of a normal of deviation 3 have 3.7 bits; one in a hundred of them 0.08 for the places, and 0.04;
    the streams take a fifth more, or the few bytes of their heads and tables."""
    values = (3 * normal(300, 400)).round()
    assert Exact.of(values).nbytes * 8 / values.numel() < 4.5
    few = torch.where(torch.rand(300, 400, generator=torch.Generator().manual_seed(5)) < 0.01, values, 0.0)
    assert Exact.of(few).nbytes * 8 / few.numel() < 0.16


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize("short", [False, True])
def test_it_is_served_as_plain_values(short: bool, dtype: torch.dtype) -> None:
    matrix = normal(33, 65).bfloat16().float() if short else normal(33, 65)
    term = Exact.of(matrix)
    served = term.serving()
    assert (served.grid, served.bits, served.nbytes) == ("float", 16 if short else 32, 33 * 65 * (2 if short else 4))
    assert torch.equal(served.decode(), matrix)
    check(served, dtype)
    with pytest.raises(TypeError, match="decoded at load"):
        apply_term(torch.zeros(1, 65), term)


def test_a_broken_stream_is_named() -> None:
    term = Exact.of(normal(5, 7))
    noise = replace(term, stream=torch.arange(50, dtype=torch.uint8))
    cut = replace(term, stream=term.stream[:-3])
    longer = replace(term, stream=torch.cat((term.stream, term.stream[:1])))
    bomb = with_raw(term, bytes(10**6))
    assert noise.problems()[0].startswith("the stream is damaged")
    for broken in (cut, longer, bomb):
        assert broken.problems() == ["the stream is cut off, or too long"]
        with pytest.raises(ValueError, match="cut off"):
            broken.decode()


def test_a_stream_takes_no_more_memory_than_its_matrix_allows() -> None:
    """A bomb of 100 MB, gaps of nothing, entries without gaps, and the honest stream: within 64 bytes an entry."""
    honest, size = Exact.of(normal(100, 300)), 100 * 300
    bombs = [bytes(10**8), bytes(8 + 5 * size), (size - 1).to_bytes(8, "little") + bytes(5 * (size - 1) - 1)]
    for term in (honest, *(with_raw(honest, bomb) for bomb in bombs)):
        tracemalloc.start()
        try:
            assert len(term.problems()) == (term is not honest)
            assert tracemalloc.get_traced_memory()[1] < 64 * size
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_stream_of_another_matrix_is_named(share: float) -> None:
    term = Exact.of(normal(10, 70, share))
    raw = raw_stream(term)
    count = int.from_bytes(raw[:8], "little")
    others = [
        b"",
        raw[:-1],
        raw + b"\0",
        raw[:8],
        (count + 1).to_bytes(8, "little") + raw[8:],
        (count - 1).to_bytes(8, "little") + raw[8:],
        (2**62).to_bytes(8, "little") + raw[8:],
        (-1).to_bytes(8, "little", signed=True) + raw[8:],
        (0).to_bytes(8, "little") + b"\0",
        (1).to_bytes(8, "little") + bytes([255, 255, 254]) + bytes(4),  # past the last entry
        (1).to_bytes(8, "little") + bytes([1, 255]) + bytes(4),  # a gap without an end
    ]
    for other in others:
        (problem,) = with_raw(term, other).problems()
        assert re.fullmatch(r"the stream holds (another matrix|other places) than \w+ of 10 × 70", problem)
    assert replace(term, rows=9).problems()
    assert bool(replace(term, cols=71).problems()) is (share == 1)  # zeros behind the last entry are not told


def test_numbers_that_may_not_be_served_are_named() -> None:
    for value in (torch.inf, -torch.inf, torch.nan):
        matrix = normal(5, 7)
        matrix[2, 3] = value
        assert Exact.of(matrix).problems() == ["the stream holds numbers that are not finite"]
    assert replace(Exact.of(normal(5, 7)), value_bits=16).problems() == [
        "value_bits 16, but the values are no bfloat16"
    ]


def test_the_input_is_not_modified_and_not_kept() -> None:
    matrix = normal(5, 7)
    before = matrix.clone()
    term = Exact.of(matrix)
    assert torch.equal(matrix, before)
    matrix.zero_()
    assert torch.equal(term.decode(), before)
    copy = term.to("cpu", copy=True)
    assert copy.stream.data_ptr() != term.stream.data_ptr()
    assert torch.equal(copy.decode(), before)
