"""The rows of `evaluate --data`: read, checked line by line, and scored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from deltaserve.errors import CheckpointError
from deltaserve.evaluation.rows import Row, is_match, load_rows

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("got", "want", "exact", "last_number"),
    [
        (" Zwölf\n", "zwölf", True, False),
        ("3+4=7; 7-2=5", "3+4=7; 7-2=5", True, True),
        ("wrong=9; x = 5 ", "3+4=7; 7-2=5", False, True),
        ("3+4=7", "3+4=7; 7-2=5", False, False),
        ("5", "2+3=5", False, True),
        ("", "5", False, False),
    ],
)
def test_scoring(got: str, want: str, exact: bool, last_number: bool) -> None:
    assert is_match(got, want, "exact") is exact
    assert is_match(got, want, "last-number") is last_number


def test_rows_are_read_up_to_the_limit_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": str(n), "answer": "ä", "more": 1}, ensure_ascii=False) for n in range(3)]
    path.write_text("\n\n".join(lines) + "\nno json", encoding="utf-8")
    assert load_rows(path, 3) == [Row("0", "ä"), Row("1", "ä"), Row("2", "ä")]
    with pytest.raises(CheckpointError, match="line 6: no JSON"):
        load_rows(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]", "'prompt' has to be a string"),
        (b'{"prompt": "x"}', "'answer' has to be a string"),
        (b'{"prompt": 3, "answer": "x"}', "'prompt' has to be a string"),
        (b'{"prompt": "x", "answer": " "}', "'answer' has to be a string that is not empty"),
        (b'{"prompt": "\xff", "answer": "x"}', "no JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "x", "answer": "y"}\n' + line + b"\n")
    with pytest.raises(CheckpointError, match=f"rows.jsonl: line 2: {reason}"):
        load_rows(path)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(CheckpointError, match="holds no rows"):
        load_rows(tmp_path / "rows.jsonl")
