"""Finds the gaussian books and writes gaussian.npz. Run once: the file is part of the format, and frozen.

    python -m deltaserve_kernels.books.make            half an hour of one core

Lloyd's algorithm on normals from Philox, started by splitting (Linde, Buzo, Gray 1980): one vector becomes 2, 4, …, and
each book settles before it is split again. Vectors are rounded to bfloat16, so that they are the same in every type.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve_kernels.philox import random_words
from deltaserve_kernels.terms.books import GRIDS

SMALL = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (2, 5), (2, 6), (2, 7), (3, 7), (4, 7), (5, 7), (6, 7)]
BYTES = [(length, 8) for length in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32)]
BOOKS = SMALL + BYTES  # (length, bits)
SAMPLES = 2**17
STEPS, LAST_STEPS = 6, 30  # of Lloyd's algorithm, after each split
SEED = 1


def normals(count: int, length: int, stream: int) -> Tensor:
    """float32 [count, length], by Box and Muller's transform."""
    half = -(-count * length // 2)
    words = random_words(SEED, 0, 1, 2 * half, stream=stream)[0].double()
    radius, angle = (words[:half] + 0.5) / 2**32, (words[half:] + 0.5) / 2**32
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    return torch.cat((radius * angle.cos(), radius * angle.sin()))[: count * length].view(count, length).float()


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """int64 [n]: of x [n, length], the nearest vector of the book [k, length]."""
    half_norm = book.square().sum(1) / 2
    return torch.cat([(part @ book.T - half_norm).argmax(1) for part in torch.split(x, 2**14)])


def distortion(book: Tensor, x: Tensor) -> float:
    """Mean square error of an entry; the source has variance one."""
    return float((x - book[nearest(x, book)]).square().mean())


def find(length: int, bits: int, samples: int = SAMPLES) -> Tensor:
    """float32 [2^bits, length]"""
    x = normals(samples, length, 0)
    book = torch.zeros(1, length)
    for stage in range(bits):
        apart = 0.1 * normals(len(book), length, 1)
        book = torch.cat((book + apart, book - apart))
        for _ in range(LAST_STEPS if stage == bits - 1 else STEPS):
            index = nearest(x, book)
            counts = torch.bincount(index, minlength=len(book))[:, None]
            sums = torch.zeros_like(book).index_add_(0, index, x)
            book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
    return book.bfloat16().float()


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order
    books: dict[str, Any] = {f"{length}-{bits}": find(length, bits).numpy() for length, bits in BOOKS}
    np.savez_compressed(GRIDS, **books)
