"""A comparison on disk: JSON lines, the setup first, then one line for every model that was measured or could not be.

Lines are appended and synced, so that an interruption costs the cell at work and nothing else; of two lines about the
same cell the later one holds.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deltaserve.deltas.tensorfile import atomic_file
from deltaserve.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


SLACK = 1.02  # a file may be this many times its budget


class Cell(NamedTuple):
    """One artifact to be made and measured."""

    codec: str
    budget: float | None  # bits per parameter; None: the codec has one fixed rate
    seed: int

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" at {self.budget:g} bits"
        return f"{self.codec}{budget}{f', seed {self.seed}' if self.seed else ''}"


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Setup(Line):
    """What has to be the same for two results to be compared. Digests are SHA-256 hex."""

    kind: Literal["setup"] = "setup"
    version: str  # of deltaserve: codecs and measures change
    base: str
    base_fingerprint: str
    finetuned: str
    finetuned_fingerprint: str
    finetuned_bytes: int  # of a full copy
    rows: int
    rows_digest: str
    scoring: str
    dtype: str
    general_tokens: int
    general_digest: str | None  # None: no general text
    calibration_digest: str | None  # None: the built-in texts


class Measured(Line):
    """`judge.Judgement`."""

    hits: list[bool]
    exact_match: float
    nats_per_token: float
    kl: float | None
    top1_agreement: float | None
    general_kl: float | None


class Reference(Measured):
    """The fine-tune itself, or the base without a delta."""

    kind: Literal["finetuned", "base"]


class Result(Measured):
    """A delta. Bits per parameter are those of the whole file."""

    kind: Literal["result"] = "result"
    codec: str
    budget: float | None
    seed: int
    asked_bits: float | None  # what the codec was given: less than the budget where the rest of the file needed it
    config: dict[str, Any]
    bits_per_parameter: float
    file_bytes: int
    resident_bytes: int
    compress_s: float
    compress_peak_bytes: int
    judge_s: float
    retained: float | None  # exact match / the fine-tune's; None where that is 0

    @property
    def cell(self) -> Cell:
        return Cell(self.codec, self.budget, self.seed)

    @property
    def is_over(self) -> bool:
        """Larger than its budget: the codec cannot be asked for less."""
        return self.budget is not None and self.bits_per_parameter > SLACK * self.budget


class Missing(Line):
    """unreachable: the codec refuses the budget. failed: compressing died; the next run tries again."""

    kind: Literal["unreachable", "failed"]
    codec: str
    budget: float | None
    seed: int
    message: str

    @property
    def cell(self) -> Cell:
        return Cell(self.codec, self.budget, self.seed)


AnyLine: TypeAlias = Annotated[Setup | Reference | Result | Missing, Field(discriminator="kind")]
LINE: TypeAdapter[Setup | Reference | Result | Missing] = TypeAdapter(AnyLine)


class Results:
    """The lines of one file. What is added is on disk when `add` returns."""

    def __init__(self, path: Path, setup: Setup) -> None:
        self._path = path
        self.setup = setup
        self.references: dict[str, Reference] = {}  # by kind
        self.cells: dict[Cell, Result | Missing] = {}

    @classmethod
    def open(cls, path: Path, setup: Setup, *, again: Collection[Cell] = ()) -> Results:
        """Goes on with what is there, less the cells to be measured `again`, or begins.

        Raises BadRequest where another setup is there; with `again` that is replaced.
        """
        results = cls(path, setup)
        lines = read_lines(path)
        if lines and lines[0] != setup:
            if not again:
                changed = _changed(lines[0], setup)
                raise BadRequest(f"{path} holds another comparison ({changed}); another directory, or --force")
            lines = []
        kept = [line for line in lines[1:] if isinstance(line, Setup | Reference) or line.cell not in again]
        for line in kept:
            results._keep(line)
        if not lines or len(kept) < len(lines) - 1:
            with atomic_file(path) as file:
                file.writelines(line.model_dump_json().encode() + b"\n" for line in [setup, *kept])
        return results

    @property
    def directory(self) -> Path:
        return self._path.parent

    @property
    def measured(self) -> list[Result]:
        return [line for line in self.cells.values() if isinstance(line, Result)]

    @property
    def missing(self) -> list[Missing]:
        return [line for line in self.cells.values() if isinstance(line, Missing)]

    def has(self, cell: Cell) -> bool:
        """Whether there is nothing left to do for a cell."""
        line = self.cells.get(cell)
        return line is not None and line.kind != "failed"

    def add(self, line: Reference | Result | Missing) -> None:
        self._keep(line)  # first: an interruption of the rest reports at least what the file has
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _keep(self, line: Setup | Reference | Result | Missing) -> None:
        if isinstance(line, Reference):
            self.references[line.kind] = line
        elif not isinstance(line, Setup):
            self.cells[line.cell] = line


def read_lines(path: Path) -> list[Setup | Reference | Result | Missing]:
    """Whole lines; a last one that was cut off is removed from the file. Raises BadRequest for another kind of file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [LINE.validate_json(line) for line in whole.splitlines()]
    except ValidationError as error:
        raise BadRequest(f"{path}: not a comparison: {error.errors()[0]['msg']}") from None
    if lines and not isinstance(lines[0], Setup):
        raise BadRequest(f"{path}: not a comparison: its first line is no setup")
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return lines


def _changed(there: Line, here: Setup) -> str:
    ours, theirs = here.model_dump(), there.model_dump()
    return ", ".join(f"{name} {theirs.get(name)}" for name in ours if ours[name] != theirs.get(name))
