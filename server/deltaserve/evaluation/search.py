"""The smallest delta that is good enough: candidates are made and measured, from a guess outwards.

Sizes are on a ladder, 2^(k/2) bits per parameter: two steps at a time while they pass, or until one passes; then the
step between. What is called good grows with size but for the noise of the measure; the file that is kept has passed.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.codecs.auto import LEAST_FILE, MOST_FILE
from deltaserve.deltas.artifact import Artifact
from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST, MOST = math.ceil(2 * math.log2(LEAST_FILE)), math.floor(2 * math.log2(MOST_FILE))  # rungs


@dataclass(frozen=True)
class Tried:
    bits: float  # per parameter, of the whole file
    measured: float
    passed: bool


@dataclass(frozen=True)
class Search:
    """`make(bits, file)` writes a candidate, `measure` looks at it, `passes` judges the figure."""

    make: Callable[[float, Path], Artifact]
    measure: Callable[[Artifact], float]
    passes: Callable[[float], bool]
    tell: Callable[[Tried], None] = lambda _: None
    _tried: dict[int, Tried] = field(default_factory=dict)

    def run(self, start: float, out: Path) -> Artifact:
        """The file `out`, whole or not at all. Raises CodecError where not even the largest passes."""
        with tempfile.TemporaryDirectory(prefix=".search-", dir=out.parent) as work:
            folder = Path(work)
            rung = min(max(round(2 * math.log2(start)), LEAST), MOST)
            passed = self._passes(rung, folder)
            while not passed and rung < MOST:
                rung = min(rung + 2, MOST)
                passed = self._passes(rung, folder)
            if not passed:
                best = self._tried[MOST]
                raise CodecError(
                    f"no file of up to {MOST_FILE:g} bits passes: {best.measured:.4g} at {best.bits:.3g} bits"
                )
            while rung - 2 >= LEAST and self._passes(rung - 2, folder):
                rung -= 2
            if rung - 1 >= LEAST and self._passes(rung - 1, folder):
                rung -= 1
            (folder / str(rung)).replace(out)
        return Artifact.open(out)

    def _passes(self, rung: int, folder: Path) -> bool:
        if rung not in self._tried:
            try:
                artifact = self.make(2 ** (rung / 2), folder / str(rung))
            except CodecError:  # too small a file for what every file holds
                if rung == MOST:
                    raise
                return False
            measured = self.measure(artifact)
            self._tried[rung] = Tried(artifact.bits_per_parameter, measured, self.passes(measured))
            self.tell(self._tried[rung])
        return self._tried[rung].passed
