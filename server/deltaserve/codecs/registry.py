"""Every codec by name, and how the command line's budget reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from deltaserve.codecs.auto import Auto
from deltaserve.codecs.base import Codec, Site
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.dare import Dare
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.codecs.deltadq import DeltaDQ
from deltaserve.codecs.deltazip import DeltaZip
from deltaserve.codecs.seeded_vq import SeededVq
from deltaserve.codecs.slim import Slim
from deltaserve.codecs.ultradelta import UltraDelta
from deltaserve.errors import CodecError

CodecType = TypeVar("CodecType", bound=Codec)
SMALL_ROWS, SMALL_COLS = 192, 576  # the smallest layer that --bits has to fit; smaller ones may take more


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


def _delta_svd(budget: Budget, options: Mapping[str, Any]) -> Codec:
    said = {name: value for name, value in vars(budget).items() if value is not None}
    return _construct(DeltaSvd, {**options, **(said or ({} if options else {"rank": 16}))})


def _seeded_vq(budget: Budget, options: Mapping[str, Any]) -> Codec:
    _refuse("seeded-vq", budget, "rank", "energy")
    return _construct(SeededVq, {**options, **({} if budget.bits is None else {"bits": budget.bits})})


def _auto(budget: Budget, options: Mapping[str, Any]) -> Codec:
    _refuse("auto", budget, "rank", "energy")
    return _construct(Auto, {**options, **({} if budget.bits is None else {"bits": budget.bits})})


def _dare(budget: Budget, options: Mapping[str, Any]) -> Codec:
    if budget.bits is None and not {"group", "bits"} & options.keys():
        options = {**options, "group": 8}
    return _within(Dare, "dare", budget, options)


def _deltadq(budget: Budget, options: Mapping[str, Any]) -> Codec:
    return _within(DeltaDQ, "deltadq", budget, options)


def _ultradelta(budget: Budget, options: Mapping[str, Any]) -> Codec:
    return _within(UltraDelta, "ultradelta", budget, options, share=2 / 3)  # what its plan leaves a layer


def _deltazip(budget: Budget, options: Mapping[str, Any]) -> Codec:
    _refuse("deltazip", budget, "rank", "energy")
    if budget.bits is None:
        return _construct(DeltaZip, options)
    sizes = {bits: bits / 2 + 1 + 16 / SMALL_COLS for bits in (2, 4)}
    return _finest(DeltaZip, "deltazip", budget.bits, "value_bits", sizes, options)


def _slim(budget: Budget, options: Mapping[str, Any]) -> Codec:
    _refuse("slim", budget, "rank", "energy")
    if budget.bits is None:
        return _construct(Slim, options)
    blocks = -(-SMALL_COLS // _construct(Slim, options).block)
    steps = (16 * blocks + 3 * 8 * -(-blocks // 8) / SMALL_ROWS) / SMALL_COLS
    return _finest(Slim, "slim", budget.bits, "bits", {bits: bits + steps for bits in (1, 2, 3, 4)}, options)


CODECS: dict[str, Callable[[Budget, Mapping[str, Any]], Codec]] = {
    "auto": _auto,
    "bitdelta": _bitdelta,
    "dare": _dare,
    "delta-svd": _delta_svd,
    "deltadq": _deltadq,
    "deltazip": _deltazip,
    "seeded-vq": _seeded_vq,
    "slim": _slim,
    "ultradelta": _ultradelta,
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


def _within(
    codec: Callable[..., CodecType], name: str, budget: Budget, options: Mapping[str, Any], *, share: float = 1.0
) -> CodecType:
    """A codec whose field `bits` is a ceiling, at the budget's; `share` of it is what a layer has at least."""
    _refuse(name, budget, "rank", "energy")
    if budget.bits is None:
        return _construct(codec, options)
    for option in {"bits", "group"} & options.keys():
        raise CodecError(f"{name}: --bits and the option {option} say the same thing; give one")
    made = _construct(codec, {**options, "bits": budget.bits})
    least = _stored_bits(_construct(codec, {**options, "bits": 1e-9})) / share
    if budget.bits < least:
        raise CodecError(_too_low(name, budget.bits, least))
    return made


def _finest(
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
        raise CodecError(_too_low(name, bits, min(sizes.values())))
    return _construct(codec, {**options, option: max(fitting)})


def _stored_bits(codec: Codec) -> float:
    """Bits per parameter of a small layer, from its tensors."""
    terms = codec.encode(torch.zeros(SMALL_ROWS, SMALL_COLS), Site(number=0, seed=0))
    return 8 * sum(term.nbytes for term in terms) / (SMALL_ROWS * SMALL_COLS)


def _too_low(name: str, bits: float, least: float) -> str:
    return f"{name}: --bits {bits:g} is under {least:.4g}, the least for a layer of {SMALL_ROWS} × {SMALL_COLS}"
