"""Every codec by name, and how the command line's budget reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from deltaserve.codecs.auto import Auto
from deltaserve.codecs.base import Codec
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.budget import SMALL_COLS, SMALL_ROWS, Budget, construct, finest, refuse, within
from deltaserve.codecs.dare import Dare
from deltaserve.codecs.delta_come import DeltaCome
from deltaserve.codecs.delta_dct import DeltaDct
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.codecs.deltadq import DeltaDQ
from deltaserve.codecs.deltamix import DeltaMix
from deltaserve.codecs.deltazip import DeltaZip
from deltaserve.codecs.dqrelo import DQReLO
from deltaserve.codecs.higgs import Higgs
from deltaserve.codecs.impart import ImPart
from deltaserve.codecs.lora_svd import LoraSvd
from deltaserve.codecs.loraquant import LoRAQuant
from deltaserve.codecs.lossless import Lossless
from deltaserve.codecs.seeded_vq import SeededVq
from deltaserve.codecs.slim import Slim
from deltaserve.codecs.ultradelta import UltraDelta
from deltaserve.errors import CodecError


def _as_it_is(codec: Callable[..., Codec], name: str, budget: Budget, options: Mapping[str, Any]) -> Codec:
    """A codec whose field `bits` is the budget's; it says itself which it can meet."""
    refuse(name, budget, "rank", "energy")
    return construct(codec, {**options, **({} if budget.bits is None else {"bits": budget.bits})})


def _bitdelta(budget: Budget, options: Mapping[str, Any]) -> Codec:
    refuse("bitdelta", budget, "rank", "energy")
    if budget.bits is not None and budget.bits != 1:
        raise CodecError(f"bitdelta: --bits {budget.bits:g}: this codec has exactly 1 bit per parameter")
    return construct(BitDelta, options)


def _delta_svd(budget: Budget, options: Mapping[str, Any]) -> Codec:
    said = {name: value for name, value in vars(budget).items() if value is not None}
    return construct(DeltaSvd, {**options, **(said or ({} if options else {"rank": 16}))})


def _dare(budget: Budget, options: Mapping[str, Any]) -> Codec:
    if budget.bits is None and not {"group", "bits"} & options.keys():
        options = {**options, "group": 8}
    return within(Dare, "dare", budget, options)


def _deltazip(budget: Budget, options: Mapping[str, Any]) -> Codec:
    refuse("deltazip", budget, "rank", "energy")
    if budget.bits is None:
        return construct(DeltaZip, options)
    sizes = {bits: bits / 2 + 1 + 16 / SMALL_COLS for bits in (2, 4)}
    return finest(DeltaZip, "deltazip", budget.bits, "value_bits", sizes, options)


def _lora_svd(budget: Budget, options: Mapping[str, Any]) -> Codec:
    if budget.rank is not None:
        options = {**options, "rank": budget.rank}
    elif budget.bits is None and not {"rank", "bits"} & options.keys():
        options = {**options, "rank": 16}
    return within(LoraSvd, "lora-svd", Budget(bits=budget.bits, energy=budget.energy), options)


def _lossless(budget: Budget, options: Mapping[str, Any]) -> Codec:
    refuse("lossless", budget, "bits", "rank", "energy")
    return construct(Lossless, options)


def _slim(budget: Budget, options: Mapping[str, Any]) -> Codec:
    refuse("slim", budget, "rank", "energy")
    if budget.bits is None:
        return construct(Slim, options)
    blocks = -(-SMALL_COLS // construct(Slim, options).block)
    steps = (16 * blocks + 3 * 8 * -(-blocks // 8) / SMALL_ROWS) / SMALL_COLS
    return finest(Slim, "slim", budget.bits, "bits", {bits: bits + steps for bits in (1, 2, 3, 4)}, options)


CODECS: dict[str, Callable[[Budget, Mapping[str, Any]], Codec]] = {
    "auto": partial(_as_it_is, Auto, "auto"),
    "bitdelta": _bitdelta,
    "dare": _dare,
    "delta-come": partial(within, DeltaCome, "delta-come"),
    "delta-dct": partial(within, DeltaDct, "delta-dct"),
    "delta-svd": _delta_svd,
    "deltadq": partial(within, DeltaDQ, "deltadq"),
    "deltamix": partial(within, DeltaMix, "deltamix"),
    "deltazip": _deltazip,
    "dqrelo": partial(within, DQReLO, "dqrelo"),
    "higgs": partial(_as_it_is, Higgs, "higgs"),
    "impart": partial(within, ImPart, "impart"),
    "lora-svd": _lora_svd,
    "loraquant": partial(within, LoRAQuant, "loraquant"),
    "lossless": _lossless,
    "seeded-vq": partial(_as_it_is, SeededVq, "seeded-vq"),
    "slim": _slim,
    "ultradelta": partial(within, UltraDelta, "ultradelta", share=2 / 3),  # what its plan leaves a layer
}


def make_codec(name: str, budget: Budget | None = None, options: Mapping[str, Any] | None = None) -> Codec:
    """The codec `name` at a budget. Raises CodecError for an unknown name or a budget it cannot meet."""
    if name not in CODECS:
        raise CodecError(f"codec {name!r} does not exist; there are {', '.join(sorted(CODECS))}")
    return CODECS[name](budget or Budget(), options or {})
