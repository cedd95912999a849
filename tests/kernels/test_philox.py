"""Philox 4x32-10 against its authors' test vectors and against Python integers; the layout of `random_words`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.philox import philox_4x32_10, random_words

MASK = 0xFFFFFFFF
WORD = st.integers(0, MASK)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)

# Random123, examples/kat_vectors: counter, key, output
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 in Python integers, which do not overflow."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right >> 32 ^ c[1] ^ k[0], right & MASK, left >> 32 ^ c[3] ^ k[1], left & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return tuple(c)


def in_torch(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return tuple(int(word) for word in philox_4x32_10((c0, c1, c2, c3), key))


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_authors_known_answers(counter: tuple[int, ...], key: tuple[int, int], output: tuple[int, ...]) -> None:
    assert in_torch(counter, key) == output
    assert by_hand(counter, key) == output


@QUICK
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_every_counter_and_key_agrees_with_python_integers(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> None:
    assert in_torch(counter, key) == by_hand(counter, key)


@QUICK
@given(
    seed=st.integers(0, 2**64 - 1),
    site=WORD,
    stream=st.integers(0, 3),
    rows=st.integers(1, 4),
    words=st.integers(1, 11),
)
def test_word_j_of_row_r_is_output_j_mod_4_of_counter_j_div_4_and_r(
    seed: int, site: int, stream: int, rows: int, words: int
) -> None:
    expected = [
        [by_hand((j // 4, r, site, stream), (seed & MASK, seed >> 32))[j % 4] for j in range(words)]
        for r in range(rows)
    ]
    assert random_words(seed, site, rows, words, stream=stream).tolist() == expected


def test_the_words_of_the_format_are_frozen() -> None:
    """Numbers of format version 1: a change here makes every artifact on disk unreadable."""
    assert random_words(0x0123456789ABCDEF, 2976196783, 2, 6).tolist() == [
        [0x911757A9, 0x72A3525F, 0xDDEB11E7, 0x5D68A8D0, 0x0C13E062, 0xD3A48066],
        [0xC7DE9BB8, 0x9EF47308, 0x9F87FFFC, 0xB6AA2356, 0x42F5933A, 0xD5036A0E],
    ]


def test_a_word_depends_on_its_place_alone_and_not_on_how_many_are_drawn() -> None:
    many = random_words(1, 2, 9, 21)
    assert torch.equal(random_words(1, 2, 4, 7), many[:4, :7])


def test_seed_site_and_stream_each_change_the_words() -> None:
    words = {
        tuple(random_words(seed, site, 1, 4, stream=stream)[0].tolist())
        for seed in (0, 1, 2**32)
        for site in (0, 1)
        for stream in (0, 1)
    }
    assert len(words) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_words_on_cpu_and_gpu() -> None:
    assert torch.equal(random_words(7, 5, 33, 65), random_words(7, 5, 33, 65, device="cuda").cpu())
