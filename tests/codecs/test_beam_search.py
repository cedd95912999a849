"""Codes in stages: the best of all where nothing is dropped, better with more kept, sound where nothing is to code."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.beam_search import _Search, beam_search
from deltaserve_kernels.terms import Book


def blocks_of(count: int, entries: int) -> Tensor:
    return torch.randn(count, entries, generator=torch.Generator().manual_seed(count))


def tables_of(turns: int, index_bits: int, entries: int) -> tuple[Tensor, ...]:
    return Book("seeded").table(index_bits + turns.bit_length() - 1, entries).view(turns, -1, entries).unbind()


def decoded(tables: tuple[Tensor, ...], codes: Tensor, gains: Tensor) -> Tensor:
    total, size = torch.zeros(()), len(tables[0])
    for stage, (code, gain) in enumerate(zip(codes, gains, strict=True)):
        sign = torch.where(code < size, 1.0, -1.0)[:, None]
        total = total + gain * sign * tables[stage % len(tables)][code % size]
    return total


def left(blocks: Tensor, tables: tuple[Tensor, ...], stages: int, beam: int) -> float:
    """‖y − ŷ‖² / ‖y‖²"""
    rest = blocks - decoded(tables, *beam_search(blocks, tables, stages, beam))
    return float(rest.square().sum() / blocks.square().sum())


def test_with_every_choice_kept_the_codes_are_the_best_of_all() -> None:
    blocks, tables = blocks_of(20, 16), tables_of(2, 2, 16)
    gains = [0.9, 0.6]
    codes = _Search(tables).codes(blocks, gains, beam=64)
    every = torch.tensor(list(itertools.product(range(8), repeat=2))).T  # [2, 64]
    distances = torch.cdist(blocks, decoded(tables, every, torch.tensor(gains)))
    found = (blocks - decoded(tables, codes, torch.tensor(gains))).norm(dim=1)
    assert bool((found <= 1.01 * distances.amin(1)).all())  # compared in bfloat16
    assert torch.equal(codes[:, :7], _Search(tables).codes(blocks[:7], gains, 64))


def test_one_stage_takes_the_vector_of_the_largest_product() -> None:
    blocks, (table,) = blocks_of(50, 24), tables_of(1, 5, 24)
    codes, gains = beam_search(blocks, (table,), 1)
    products = blocks @ table.T
    chosen = products.gather(1, codes[0, :, None] % 32)[:, 0]
    assert bool((chosen.abs() >= 0.98 * products.abs().amax(1)).all())
    assert torch.equal(codes[0] >= 32, chosen < 0)
    vectors = decoded((table,), codes, torch.ones(1))
    assert float(gains[0]) == pytest.approx(float((blocks * vectors).sum() / vectors.square().sum()), rel=1e-4)


def test_a_stage_finds_more_in_a_table_of_its_own_and_more_with_more_kept() -> None:
    """Decision 0028: what a stage leaves has no large product with any vector of the table it chose from."""
    blocks = blocks_of(512, 192)
    shared, own = tables_of(1, 9, 192), tables_of(4, 9, 192)
    errors = [left(blocks, shared, 8, 1), left(blocks, own, 8, 1), left(blocks, own, 8, 2), left(blocks, own, 8, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.95 * errors[0] and errors[3] < 0.99 * errors[1]


def test_gains_are_the_least_squares_of_all_blocks() -> None:
    blocks, tables = blocks_of(300, 48), tables_of(2, 6, 48)
    codes, gains = beam_search(blocks, tables, 3, 2)
    vectors = [decoded(tables, codes, one) for one in torch.eye(3)]
    rest = blocks - sum(gain * each for gain, each in zip(gains, vectors, strict=True))
    for each in vectors:
        assert abs(float((rest * each).sum())) < 1e-3 * float(each.square().sum())


@pytest.mark.parametrize("count", [1, 3])
def test_few_blocks_and_blocks_of_zeros_are_coded(count: int) -> None:
    tables = tables_of(1, 1, 4)
    for blocks in (torch.zeros(count, 4), blocks_of(count, 4)):
        codes, gains = beam_search(blocks, tables, 5, 4)
        assert codes.shape == (5, count) and bool(gains.isfinite().all())
        assert float((blocks - decoded(tables, codes, gains)).square().sum()) <= float(blocks.square().sum()) + 1e-6
