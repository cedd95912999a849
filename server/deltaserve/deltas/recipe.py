"""What a fine-tune is made into: a codec, how small or how near it has to be, and what else decides about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.allocate import check_allocatable
from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from deltaserve.codecs.base import Codec
    from deltaserve.deltas.prepare import BaseShift

DEFAULT_CODEC = "auto"
BUDGETS = ("bits", "rank", "energy", "keep", "max_kl")


@dataclass(frozen=True)
class Recipe:
    """None = not said. At most one of `BUDGETS`; `keep` (a share of the fine-tune's exact match on rows) and `max_kl`
    (nats a token) are `auto`'s alone. `calibration`: "builtin", or a JSON-lines file."""

    codec: str | None = None
    bits: float | None = None
    rank: int | None = None
    energy: float | None = None
    keep: float | None = None
    max_kl: float | None = None
    scoring: Literal["exact", "last-number"] = "exact"
    seed: int = 0
    calibration: str = "builtin"
    base_shift: BaseShift | None = None
    allocate: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_probed(self) -> bool:
        """Is it for `auto` to find the size? With neither a budget nor the noise that stands for one."""
        told = "noise" in self.options or any(getattr(self, name) is not None for name in BUDGETS)
        return self.codec in (None, DEFAULT_CODEC) and not told

    def make_codec(self) -> Codec:
        """Raises CodecError for what cannot be."""
        said = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(said) > 1:
            raise CodecError(f"{' and '.join(said)}: give one of them")
        implied = "delta-svd" if said in (["rank"], ["energy"]) else DEFAULT_CODEC
        budget = Budget(bits=self.bits, rank=self.rank, energy=self.energy)
        codec = make_codec(self.codec or implied, budget, self.options)
        if said in (["keep"], ["max_kl"]) and codec.name != "auto":
            raise CodecError(f"keep and max_kl choose the bits of auto, not of {codec.name}")
        if self.allocate is not None:
            check_allocatable(codec, self.allocate)
        return codec
