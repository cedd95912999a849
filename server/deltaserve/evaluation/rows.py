"""What a model is asked: the rows of a task, their tokens, and when an answer is right.

Rows are JSON lines {"prompt": …, "answer": …}.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal, NamedTuple

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
    """A prompt in the tenant's chat template where there is one, raw otherwise; the answer ends with its eos."""
    from jinja2 import TemplateError as JinjaError

    if tokenizer.chat_template:
        messages = [{"role": "user", "content": row.prompt}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (JinjaError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template fails on a user's message: {error}") from None
        prompt: list[int] = tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own
    else:
        prompt = tokenizer(row.prompt).input_ids
    if not prompt:
        raise TemplateError(f"the prompt {row.prompt[:40]!r} becomes no tokens")
    answer: list[int] = tokenizer(row.answer, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return Example(prompt, answer + end, row.answer)
