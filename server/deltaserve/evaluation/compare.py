"""Every codec at every budget on one fine-tune: made, judged, written down.

A budget is bits per parameter of the whole file. A codec is asked for as many; where norms, scales and the manifest
push the file more than 2 % over, once more for that much less. Figures are always those of the file that was measured.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deltaserve import __version__
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import CODECS, make_codec
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.compress import check_pair, make_manifest
from deltaserve.errors import BadRequest, CheckpointError, CodecError
from deltaserve.evaluation.judge import Judge
from deltaserve.evaluation.making import compress_apart
from deltaserve.evaluation.results import SLACK, Cell, Missing, Reference, Result, Setup

if TYPE_CHECKING:
    import torch

    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.evaluation.making import Cost
    from deltaserve.evaluation.predictions import Advance
    from deltaserve.evaluation.results import Results
    from deltaserve.evaluation.rows import Row, Scoring

LADDER = [2.0**-power for power in range(-3, 11)]  # bits; a codec that takes fewer than two of these has a fixed rate
Step = Callable[[str, str, int, int], None]  # model at work, what is done with it, models done, models in all


@dataclass(frozen=True)
class Task:
    """What deltas are judged on."""

    rows: Sequence[Row]
    general: Sequence[str]
    general_tokens: int
    scoring: Scoring
    dtype: torch.dtype
    batch: int


def plan(codecs: Sequence[str], budgets: Sequence[float], seeds: int) -> list[Cell]:
    """The cells in the order of work: every codec at every budget, then the same with the next seed."""
    unknown = [name for name in codecs if name not in CODECS]
    if unknown:
        raise BadRequest(f"codec {unknown[0]!r} does not exist; there are {', '.join(sorted(CODECS))}")
    fixed = {name for name in codecs if _has_fixed_rate(name)}
    cells = []
    for seed in range(seeds):
        cells += [Cell(name, None, seed) for name in codecs if name in fixed]
        cells += [Cell(name, budget, seed) for budget in budgets for name in codecs if name not in fixed]
    return cells


def compare(
    base: Checkpoint,
    finetuned: Checkpoint,
    task: Task,
    cells: Sequence[Cell],
    results: Results,
    *,
    calibration: str = "builtin",
    give_up_below: float = 0.0,
    step: Step = lambda *_: None,
) -> None:
    """Measures the cells that `results` does not hold yet. Raises CheckpointError, TemplateError.

    `calibration`: "builtin" or a JSON-lines file, for codecs that are calibrated. `give_up_below`: a codec that
    retained a smaller share at some budget is not measured at smaller ones; nothing is written of those.
    """
    wanted = [cell for cell in cells if not results.has(cell)]
    if not wanted:
        return
    check_pair(base, finetuned)
    judge = Judge(
        base,
        make_manifest(base, finetuned, "none", {}),
        task.rows,
        dtype=task.dtype,
        general=task.general,
        general_tokens=task.general_tokens,
        batch=task.batch,
        scoring=task.scoring,
    )
    total = len(wanted) + 2
    reference = judge.prepare(finetuned, lambda what: step("the fine-tune", what, 0, total))
    results.add(Reference(kind="finetuned", **asdict(reference)))
    if "base" not in results.references and (alone := judge.judge_base(lambda what: step("the base", what, 1, total))):
        results.add(Reference(kind="base", **asdict(alone)))
    bench = _Bench(base, finetuned, judge, reference.exact_match, calibration, results.directory)
    for done, cell in enumerate(wanted, 2):
        if not _is_unseeded(cell, results) and not _has_given_up(cell, results, give_up_below):
            results.add(bench.measure(cell, functools.partial(_advance, step, str(cell), done, total)))
    step("", "", total, total)


def setup_of(base: Checkpoint, finetuned: Checkpoint, task: Task, calibration: str = "builtin") -> Setup:
    """Raises OSError where the calibration file cannot be read."""
    texts = None if calibration == "builtin" else hashlib.sha256(Path(calibration).read_bytes()).hexdigest()
    return Setup(
        version=__version__,
        base=base.name,
        base_fingerprint=base.fingerprint,
        finetuned=finetuned.name,
        finetuned_fingerprint=finetuned.fingerprint,
        finetuned_bytes=finetuned.num_bytes,
        rows=len(task.rows),
        rows_digest=_digest(task.rows),
        scoring=task.scoring,
        dtype=str(task.dtype).removeprefix("torch."),
        general_tokens=task.general_tokens,
        general_digest=_digest(task.general) if task.general else None,
        calibration_digest=texts,
    )


def _digest(content: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _Made(NamedTuple):
    artifact: Artifact
    asked_bits: float | None
    cost: Cost


@dataclass(frozen=True)
class _Bench:
    """Makes and measures one cell at a time; nothing of it stays in `directory`."""

    base: Checkpoint
    finetuned: Checkpoint
    judge: Judge
    finetuned_exact_match: float
    calibration: str
    directory: Path

    def measure(self, cell: Cell, advance: Advance) -> Result | Missing:
        with tempfile.TemporaryDirectory(prefix=".cell-", dir=self.directory) as work:
            try:
                artifact, asked_bits, cost = self._make(cell, Path(work), advance)
            except CodecError as error:
                return Missing(kind="unreachable", **cell._asdict(), message=error.message)
            except ChildProcessError as error:
                return Missing(kind="failed", **cell._asdict(), message=str(error))
            start = time.perf_counter()
            judgement = self.judge.judge(artifact, advance)
            if not all(map(math.isfinite, (judgement.nats_per_token, judgement.kl or 0, judgement.general_kl or 0))):
                return Missing(kind="failed", **cell._asdict(), message="its predictions are not finite")
            whole = self.finetuned_exact_match
            return Result(
                **cell._asdict(),
                **asdict(judgement),
                asked_bits=asked_bits,
                config=artifact.manifest.config,
                bits_per_parameter=artifact.bits_per_parameter,
                file_bytes=artifact.file.num_bytes,
                resident_bytes=artifact.resident_bytes,
                compress_s=cost.seconds,
                compress_peak_bytes=cost.peak_bytes,
                judge_s=time.perf_counter() - start,
                retained=judgement.exact_match / whole if whole else None,
            )

    def _make(self, cell: Cell, work: Path, advance: Advance) -> _Made:
        """The artifact of a cell, within its budget where the codec can be asked for that."""
        first = self._compress(cell, cell.budget, work / "first.safetensors", advance)
        bits = first.artifact.bits_per_parameter
        if not bits:
            raise CheckpointError(
                f"{self.finetuned.name} has the same matrices as {self.base.name}: nothing to compare"
            )
        if cell.budget is None or bits <= SLACK * cell.budget:
            return first
        less = cell.budget - (bits - cell.budget)
        try:
            return self._compress(cell, less, work / "second.safetensors", advance) if less > 0 else first
        except CodecError:  # it cannot go lower: the file stays over its budget, and its own size is what is reported
            return first

    def _compress(self, cell: Cell, bits: float | None, out: Path, advance: Advance) -> _Made:
        advance("compressing")
        codec = make_codec(cell.codec, Budget(bits=bits))
        cost = compress_apart(self.base, self.finetuned, codec, out, cell.seed, self.calibration)
        return _Made(Artifact.open(out), bits, cost)


def _advance(step: Step, name: str, done: int, total: int, what: str) -> None:
    step(name, what, done, total)


def _has_fixed_rate(name: str) -> bool:
    def takes(bits: float) -> bool:
        try:
            make_codec(name, Budget(bits=bits))
        except CodecError:
            return False
        return True

    return sum(map(takes, LADDER)) < 2


def _is_unseeded(cell: Cell, results: Results) -> bool:
    """Have the first two seeds given the very same model? Then a third says nothing."""
    first, second = (results.cells.get(cell._replace(seed=seed)) for seed in (0, 1))
    if cell.seed < 2 or not isinstance(first, Result) or not isinstance(second, Result):
        return False
    return (first.hits, first.nats_per_token) == (second.hits, second.nats_per_token)


def _has_given_up(cell: Cell, results: Results, share: float) -> bool:
    """Has the codec retained less than `share` at a larger budget?"""
    larger = (
        one
        for one in results.cells.values()
        if isinstance(one, Result) and (one.codec, one.seed) == (cell.codec, cell.seed)
        if one.budget is not None and cell.budget is not None and one.budget > cell.budget
    )
    return any(one.retained is not None and one.retained < share for one in larger)
