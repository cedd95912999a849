"""Where registry and files are: a store that lost its registry is not taken for an empty one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltaserve.deltas.places import open_places
from deltaserve.errors import IncompatibleStore

if TYPE_CHECKING:
    from pathlib import Path


def test_objects_without_a_registry_are_not_removed(tmp_path: Path) -> None:
    kept = tmp_path / "objects" / "ab" / f"{'ab' * 32}.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"somebody's")
    with pytest.raises(IncompatibleStore, match="no registry.sqlite"):
        open_places(str(tmp_path), None, tmp_path, 0)
    assert kept.read_bytes() == b"somebody's"
    assert not (tmp_path / "registry.sqlite").exists()
