"""Masks that 64 rows share, of every codec that draws one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaserve.codecs.base import Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError

CODECS = ("dare", "deltadq", "ultradelta")
SITE = Site(number=3, seed=11)


def make(name: str, **options: Any) -> Any:
    return make_codec(name, Budget(bits=0.5), options)


@pytest.mark.parametrize("name", CODECS)
def test_64_rows_have_the_same_columns_and_the_next_64_others(name: str) -> None:
    delta = torch.randn(150, 96, generator=torch.Generator().manual_seed(0)).sign()
    kept = decode(make(name, tile=64).encode(delta, SITE)) != 0
    blocks = kept.split(64)
    assert [len(block.unique(dim=0)) for block in blocks] == [1, 1, 1]
    assert not torch.equal(blocks[0][0], blocks[1][0])
    alone = decode(make(name).encode(delta, SITE)) != 0
    assert len(alone.unique(dim=0)) == 150
    assert kept.sum() == alone.sum()


@pytest.mark.parametrize("name", CODECS)
def test_other_numbers_of_rows_are_refused(name: str) -> None:
    with pytest.raises(CodecError, match=f"{name}: tile 32 is not 1 or 64"):
        make(name, tile=32)
