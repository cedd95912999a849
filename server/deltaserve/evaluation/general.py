"""Text that has nothing to do with the task: what a delta must not change more than its fine-tune did.

JSON lines {"text": …}. The built-in set is `data/general.jsonl` (data/general.md: what it holds, and its licences).
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from deltaserve.evaluation.rows import read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

WINDOW_TOKENS = 256
GENERAL_TOKENS = 8192


def builtin_texts() -> list[str]:
    with as_file(files("deltaserve") / "data" / "general.jsonl") as path:
        return load_texts(path)


def load_texts(path: Path) -> list[str]:
    """Raises CheckpointError naming the line at fault."""
    return [text for (text,) in read_lines(path, ("text",))]


def windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], num_tokens: int) -> list[list[int]]:
    """Sequences of up to 256 tokens, at most `num_tokens` in all: the first of every text, then the second, …"""
    encoded = [tokenizer(text, verbose=False).input_ids for text in texts]
    pieces: list[list[int]] = []
    left = num_tokens
    for start in range(0, max(map(len, encoded), default=0), WINDOW_TOKENS):
        for ids in encoded:
            piece = ids[start : start + min(WINDOW_TOKENS, left)]
            left -= len(piece)
            pieces += [piece] if piece else []
    return pieces
