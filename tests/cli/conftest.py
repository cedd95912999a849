"""Running a command line in this process, and an artifact made by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from deltaserve.cli import main

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Shell:
    """`status = shell("compress", base, …)`; then `shell.out` and `shell.err`."""

    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def __call__(self, *words: str | Path) -> int:
        self.capsys.readouterr()
        status = main([str(word) for word in words])
        self.out, self.err = self.capsys.readouterr()
        return status


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def artifact(shell: Shell, tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> Path:
    path = tmp_path / "delta.safetensors"
    assert shell("compress", tiny_base, tiny_finetune, "-o", path, "--codec", "bitdelta") == 0
    return path
