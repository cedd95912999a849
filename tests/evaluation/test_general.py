"""General text: the built-in set is small, its own, and cut into windows of a known number of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import deltaserve
from deltaserve.errors import CheckpointError
from deltaserve.evaluation.general import builtin_texts, load_texts, windows

if TYPE_CHECKING:
    from types import ModuleType

DATA = Path(deltaserve.__file__).parent / "data"


def eight_words_in_a_row(texts: list[str]) -> set[str]:
    words = [text.split() for text in texts]
    return {" ".join(text[start : start + 8]) for text in words for start in range(len(text) - 7)}


def test_the_built_in_text_is_small_and_shares_nothing_with_the_calibration_set() -> None:
    texts = builtin_texts()
    assert (DATA / "general.jsonl").stat().st_size <= 150_000
    assert len(texts) > 80 and len(set(texts)) == len(texts)
    lines = (DATA / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    calibration = [value for line in lines for value in json.loads(line).values()]
    assert not eight_words_in_a_row(texts) & eight_words_in_a_row(calibration)


def test_windows_take_the_first_of_every_text_before_the_second_of_any(tiny: ModuleType) -> None:
    tokenizer = tiny.make_tokenizer()
    long, short = "delta base " * 300, "one model"
    first, second = tokenizer(long).input_ids, tokenizer(short).input_ids
    pieces = windows(tokenizer, [long, short], 256 + len(second) + 20)
    assert pieces == [first[:256], second, first[256:276]]
    assert windows(tokenizer, [short, short], 3) == [second[:3]]
    assert windows(tokenizer, [], 100) == []


def test_a_text_is_a_string_that_is_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(CheckpointError, match="texts.jsonl: line 2: 'text' has to be a string that is not empty"):
        load_texts(path)
