"""What the user allows a codec, and the codec's setting that is within it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from deltaserve.codecs.base import Codec, Site
from deltaserve.errors import CodecError

CodecType = TypeVar("CodecType", bound=Codec)
SMALL_ROWS, SMALL_COLS = 192, 576  # the smallest layer that --bits has to fit; smaller ones may take more


@dataclass(frozen=True)
class Budget:
    """What the user allows. None = not said."""

    bits: float | None = None  # bits per parameter
    rank: int | None = None
    energy: float | None = None


def refuse(name: str, budget: Budget, *fields: str) -> None:
    for field in fields:
        if getattr(budget, field) is not None:
            raise CodecError(f"{name}: --{field} does not apply to this codec")


def construct(codec: Callable[..., CodecType], options: Mapping[str, Any]) -> CodecType:
    try:
        return codec(**options)
    except TypeError as error:
        raise CodecError(f"{getattr(codec, '__name__', codec)}: {error}") from None


def within(
    codec: Callable[..., CodecType], name: str, budget: Budget, options: Mapping[str, Any], *, share: float = 1.0
) -> CodecType:
    """A codec whose field `bits` is a ceiling, at the budget's; `share` of it is what a layer has at least."""
    refuse(name, budget, "rank", "energy")
    if budget.bits is None:
        return construct(codec, options)
    for option in {"bits", "group"} & options.keys():
        raise CodecError(f"{name}: --bits and the option {option} say the same thing; give one")
    made = construct(codec, {**options, "bits": budget.bits})
    least = stored_bits(construct(codec, {**options, "bits": 1e-9})) / share
    if budget.bits < least:
        raise CodecError(too_low(name, budget.bits, least))
    return made


def finest(
    codec: Callable[..., CodecType],
    name: str,
    bits: float,
    option: str,
    sizes: Mapping[int, float],
    options: Mapping[str, Any],
) -> CodecType:
    """The codec with the highest value of `option` whose size, in bits per parameter, is within `bits`."""
    if option in options:
        raise CodecError(f"{name}: --bits and the option {option} say the same thing; give one")
    fitting = [value for value, size in sizes.items() if size <= bits]
    if not fitting:
        raise CodecError(too_low(name, bits, min(sizes.values())))
    return construct(codec, {**options, option: max(fitting)})


def stored_bits(codec: Codec) -> float:
    """Bits per parameter of a small layer, from its tensors."""
    terms = codec.encode(torch.zeros(SMALL_ROWS, SMALL_COLS), Site(number=0, seed=0))
    return 8 * sum(term.nbytes for term in terms) / (SMALL_ROWS * SMALL_COLS)


def too_low(name: str, bits: float, least: float) -> str:
    return f"{name}: --bits {bits:g} is under {least:.4g}, the least for a layer of {SMALL_ROWS} × {SMALL_COLS}"
