"""Reading through an import root, directory or bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaserve.deltas.imports import Imports


def read(imports: Imports, asked: str) -> bytes:
    """The whole file, as long as it was said to be."""
    with imports.open(asked) as file:
        data = b"".join(file.pieces)
    assert len(data) == file.num_bytes
    return data
