"""kill −9 of the real server on either side of what makes a change true: what was before, or what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

OPERATIONS = ["upload", "first part", "complete", "cancel", "stage a file", "compress", "move", "delete"]
OPERATIONS += ["delete a tenant", "rotate a key"]


@pytest.mark.parametrize("what", OPERATIONS)
def test_a_kill_at_the_commit_leaves_what_was_and_after_it_what_was_asked_for(scene: Any, what: str) -> None:
    _, commit, after = scene.measure(what)
    found = scene.kill(what, commit)
    if scene.is_acknowledged:  # a job: its end comes later
        assert found == after
    else:
        assert found in scene.allowed(what, after) and found != after
    assert scene.kill(what, commit + 1) == after


@pytest.mark.parametrize("step", [3, 9, 30])
def test_a_kill_while_a_store_of_before_is_carried_over_loses_nothing(scene: Any, step: int, tmp_path: Path) -> None:
    assert scene.migrate(tmp_path / "old", step)
