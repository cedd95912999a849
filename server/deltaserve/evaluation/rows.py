"""What a model is asked: the rows of a task, their tokens, and when an answer is right.

Rows are JSON lines {"prompt": …, "answer": …}.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal, NamedTuple

from deltaserve.deltas.reference_model import encode_row
from deltaserve.errors import CheckpointError, TemplateError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

Scoring = Literal["exact", "last-number"]


class Row(NamedTuple):
    prompt: str
    answer: str


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]  # with the end token
    reference: str


def load_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a JSON-lines file. Raises CheckpointError naming the line at fault."""
    return [Row(*values) for values in read_lines(path, Row._fields, limit)]


def read_lines(path: Path, fields: tuple[str, ...], limit: int | None = None) -> list[list[str]]:
    """The named fields of the first `limit` lines, each a string that is not empty. Raises CheckpointError."""
    values: list[list[str]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(values) == limit:
                break
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: line {number}: no JSON: {error}") from None
            for name in fields:
                value = found.get(name) if isinstance(found, dict) else None
                if not isinstance(value, str) or not value.strip():
                    raise CheckpointError(f"{path}: line {number}: {name!r} has to be a string that is not empty")
            values.append([found[name] for name in fields])
    if not values:
        raise CheckpointError(f"{path}: holds no rows")
    return values


def is_match(got: str, want: str, scoring: Scoring) -> bool:
    """exact: the same text, whatever its case; last-number: the same after the last "="."""
    if scoring == "last-number":
        return got.split("=")[-1].strip() == want.split("=")[-1].strip()
    return got.strip().lower() == want.strip().lower()


def encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> Example:
    """As `encode_row`. Raises TemplateError for a prompt that becomes no tokens, too."""
    prompt, answer = encode_row(tokenizer, row.prompt, row.answer)
    if not prompt:
        raise TemplateError(f"the prompt {row.prompt[:40]!r} becomes no tokens")
    return Example(prompt, answer, row.answer)
