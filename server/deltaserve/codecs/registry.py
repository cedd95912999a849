"""Every codec by name, and how the command line's budget reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from deltaserve.codecs.base import Codec
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.dare import MAX_GROUP, Dare
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.errors import CodecError

CodecType = TypeVar("CodecType", bound=Codec)


@dataclass(frozen=True)
class Budget:
    """What the user allows. None = not said."""

    bits: float | None = None  # bits per parameter
    rank: int | None = None
    energy: float | None = None


def _bitdelta(budget: Budget, options: Mapping[str, Any]) -> Codec:
    _refuse("bitdelta", budget, "rank", "energy")
    if budget.bits is not None and budget.bits != 1:
        raise CodecError(f"bitdelta: --bits {budget.bits:g}: this codec has exactly 1 bit per parameter")
    return _construct(BitDelta, options)


def _dare(budget: Budget, options: Mapping[str, Any]) -> Codec:
    _refuse("dare", budget, "rank", "energy")
    if budget.bits is None:
        return _construct(Dare, options)
    if "group" in options:
        raise CodecError("dare: --bits and the option group say the same thing; give one")
    value_bits = _construct(Dare, options).value_bits
    if not value_bits / MAX_GROUP <= budget.bits <= value_bits:
        raise CodecError(f"dare: --bits {budget.bits:g} is not in {value_bits / MAX_GROUP:g} … {value_bits}")
    group = math.ceil(value_bits / budget.bits - 1e-9)  # within the budget, but for the error of the division
    return _construct(Dare, {**options, "group": group})


def _delta_svd(budget: Budget, options: Mapping[str, Any]) -> Codec:
    said = {name: value for name, value in vars(budget).items() if value is not None}
    return _construct(DeltaSvd, {**options, **(said or ({} if options else {"rank": 16}))})


CODECS: dict[str, Callable[[Budget, Mapping[str, Any]], Codec]] = {
    "bitdelta": _bitdelta,
    "dare": _dare,
    "delta-svd": _delta_svd,
}


def make_codec(name: str, budget: Budget | None = None, options: Mapping[str, Any] | None = None) -> Codec:
    """The codec `name` at a budget. Raises CodecError for an unknown name or a budget it cannot meet."""
    if name not in CODECS:
        raise CodecError(f"codec {name!r} does not exist; there are {', '.join(sorted(CODECS))}")
    return CODECS[name](budget or Budget(), options or {})


def _refuse(name: str, budget: Budget, *fields: str) -> None:
    for field in fields:
        if getattr(budget, field) is not None:
            raise CodecError(f"{name}: --{field} does not apply to this codec")


def _construct(codec: Callable[..., CodecType], options: Mapping[str, Any]) -> CodecType:
    try:
        return codec(**options)
    except TypeError as error:
        raise CodecError(f"{getattr(codec, '__name__', codec)}: {error}") from None
