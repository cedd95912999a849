"""lossless: Δ comes back, and hardly any change is hardly any bytes."""

from __future__ import annotations

import pytest
import torch

from deltaserve.codecs.base import Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.lossless import Lossless
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError

SITE = Site(number=5, seed=7)


def test_every_bit_of_delta_comes_back() -> None:
    delta = torch.tensor([[0.0, -0.0, 1e-45, -3e38], [1 / 3, 2.0**-133, 1, -1]])
    decoded = decode(Lossless().encode(delta, SITE))
    assert torch.equal(decoded.view(torch.int32), delta.view(torch.int32))


def test_one_change_in_a_hundred_is_about_a_tenth_of_a_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    changed = torch.rand(512, 512, generator=generator) < 0.01
    signs = 2.0 * torch.randint(2, (512, 512), generator=generator) - 1
    delta = torch.where(changed, 2.0**-12 * signs, 0.0)
    (term,) = Lossless().encode(delta, SITE)
    assert 8 * term.nbytes / delta.numel() < 0.12


@pytest.mark.parametrize("word", ["bits", "rank", "energy"])
def test_it_takes_no_budget(word: str) -> None:
    with pytest.raises(CodecError, match=f"lossless: --{word}"):
        make_codec("lossless", Budget(**{word: 1}))  # type: ignore[arg-type]
