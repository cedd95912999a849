"""From the command line's words to a codec: what is refused, and that the message says what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deltaserve.codecs.base import Site
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.dare import Dare
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError


@pytest.mark.parametrize(
    ("codec", "options", "says"),
    [
        (BitDelta, {"scale": "block"}, ["scale 'block'", "tensor", "row", "col"]),
        (BitDelta, {"estimator": "best"}, ["estimator 'best'", "unbiased", "paper"]),
        (Dare, {"group": 0}, ["group 0", "1 … 4096"]),
        (Dare, {"group": 4097}, ["group 4097", "1 … 4096"]),
        (Dare, {"group": 2.5}, ["group 2.5", "1 … 4096"]),
        (Dare, {"group": "8"}, ["group '8'", "1 … 4096"]),
        (Dare, {"value_bits": 8}, ["value_bits 8", "4 or 16"]),
        (Dare, {"value_bits": "4"}, ["value_bits '4'", "4 or 16"]),
        (DeltaSvd, {}, ["exactly one of rank, energy, bits"]),
        (DeltaSvd, {"rank": 4, "bits": 1.0}, ["exactly one of rank, energy, bits"]),
        (DeltaSvd, {"rank": 0}, ["rank 0", "≥ 1"]),
        (DeltaSvd, {"rank": 2.5}, ["rank 2.5", "≥ 1"]),
        (DeltaSvd, {"energy": 0.0}, ["energy 0.0", "(0, 1]"]),
        (DeltaSvd, {"energy": 1.1}, ["energy 1.1", "(0, 1]"]),
        (DeltaSvd, {"energy": math.nan}, ["energy nan", "(0, 1]"]),
        (DeltaSvd, {"bits": 0.0}, ["bits 0.0", "> 0"]),
        (DeltaSvd, {"bits": math.inf}, ["bits inf", "finite"]),
        (DeltaSvd, {"bits": math.nan}, ["bits nan", "> 0"]),
    ],
)
def test_a_bad_configuration_names_the_field_and_its_range(
    codec: type[Any], options: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(CodecError) as caught:
        codec(**options)
    assert all(part in caught.value.message for part in says)


@pytest.mark.parametrize(
    ("name", "budget", "options", "says"),
    [
        ("zip", Budget(), {}, ["'zip'", "auto, bitdelta, dare, delta-come"]),
        ("bitdelta", Budget(bits=2), {}, ["--bits 2", "exactly 1 bit"]),
        ("bitdelta", Budget(rank=4), {}, ["--rank"]),
        ("bitdelta", Budget(energy=0.5), {}, ["--energy"]),
        ("bitdelta", Budget(), {"group": 8}, ["group"]),
        ("dare", Budget(rank=4), {}, ["--rank"]),
        ("dare", Budget(energy=0.5), {}, ["--energy"]),
        ("dare", Budget(bits=1), {"group": 4}, ["--bits", "group"]),
        ("dare", Budget(bits=5), {}, ["bits 5", "4"]),
        ("dare", Budget(bits=0), {}, ["bits 0", "4"]),
        ("dare", Budget(bits=0.0001), {}, ["--bits 0.0001", "the least for a layer of 192 × 576"]),
        ("dare", Budget(bits=math.nan), {}, ["bits nan"]),
        ("dare", Budget(bits=17), {"value_bits": 16}, ["bits 17", "16"]),
        ("dare", Budget(bits=1), {"value_bits": "many"}, ["value_bits 'many'", "1, 2, 4 or 16"]),
        ("ultradelta", Budget(bits=0.001), {}, ["--bits 0.001", "the least"]),
        ("deltazip", Budget(bits=1), {}, ["--bits 1", "the least"]),
        ("slim", Budget(bits=0.5), {}, ["--bits 0.5", "the least"]),
        ("delta-come", Budget(bits=0.01), {}, ["--bits 0.01", "the least"]),
        ("delta-come", Budget(rank=4), {}, ["--rank"]),
        ("deltamix", Budget(bits=0.01), {}, ["--bits 0.01", "the least"]),
        ("deltamix", Budget(energy=0.5), {}, ["--energy"]),
        ("seeded-vq", Budget(bits=0.0001), {}, ["bits 0.0001", "0.001 … 4"]),
        ("seeded-vq", Budget(rank=3), {}, ["--rank"]),
        ("auto", Budget(bits=9), {}, ["bits 9", "0.003 … 4"]),
        ("dare", Budget(), {"grup": 8}, ["grup"]),
        ("delta-svd", Budget(rank=4, bits=1), {}, ["exactly one"]),
        ("delta-svd", Budget(rank=4), {"energy": 0.5}, ["exactly one"]),
        ("delta-svd", Budget(bits=-1), {}, ["bits -1", "> 0"]),
        ("delta-svd", Budget(), {"tolerance": 1}, ["tolerance"]),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    name: str, budget: Budget, options: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec(name, budget, options)
    assert all(part in caught.value.message for part in says)


def test_defaults() -> None:
    assert make_codec("bitdelta") == BitDelta("tensor", "unbiased")
    assert make_codec("bitdelta", Budget(bits=1), {"scale": "row"}) == BitDelta("row", "unbiased")
    assert make_codec("dare") == Dare(8, 4)
    assert make_codec("delta-svd") == DeltaSvd(rank=16)
    assert make_codec("delta-svd", None, {"energy": 0.5}) == DeltaSvd(energy=0.5)


@pytest.mark.parametrize("bits", [3.9, 3, 1.5, 0.7, 0.3, 0.05])
@pytest.mark.parametrize("name", ["dare", "deltadq", "ultradelta"])
def test_bits_are_a_ceiling_on_a_layer_of_a_real_size(name: str, bits: float) -> None:
    codec = make_codec(name, Budget(bits=bits))
    terms = codec.encode(torch.zeros(192, 576), Site(0, 0))
    assert 0.5 * bits < 8 * sum(term.nbytes for term in terms) / (192 * 576) <= bits
