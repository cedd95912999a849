"""A disk that is full, or cannot be written, from any step of any change on: a clear answer, nothing is lost, serving
goes on, and the change is made when the disk is back."""

from __future__ import annotations

import errno
import itertools
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ANSWERS = {errno.ENOSPC: (507, "insufficient_storage"), errno.EROFS: (503, "store_unavailable", "registry_unavailable")}
OPERATIONS = ["upload under a new name", "part", "move", "complete", "delete"]
ASKED = "acme:twin"  # none of them changes it
ROOM_BYTES = (0, 8192, 40960)


@pytest.fixture(params=ANSWERS, ids=["full", "read-only"])
def error(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def is_refused(reply: httpx.Response, status: int, *codes: str) -> bool:
    """A change that was not made says why; one that was made is acknowledged."""
    if reply.is_success:
        return False
    assert reply.status_code == status and reply.json()["error"]["code"] in codes, reply.text
    assert ("retry-after" in reply.headers) == (status == 503)
    return True


def test_from_any_step_on_a_change_is_refused_or_made_and_serving_goes_on(scene: Any, kills: Any, error: int) -> None:
    store = scene.copy()
    life = scene.start(store)
    state = scene.look(life.http)
    for what in OPERATIONS:
        for step in itertools.count(1):
            life.fail_from(step, error)
            refused = is_refused(kills.OPERATIONS[what](scene, life.http), *ANSWERS[error])
            scene.ask(life.http, ASKED, state["models"][ASKED][1][0][1])
            life.die_at(0)  # the disk is back
            found = scene.look(life.http, asks=False)
            assert (found == state) == refused, (what, step)
            if not refused:
                state = found
                break
    assert life.stop() == 0 and "Traceback" not in life.printed, life.printed
    assert scene.after_restart(store) == state


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MiB."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_disk_that_is_truly_full_is_no_end(scene: Any, kills: Any, small_disk: Path) -> None:
    store = small_disk / "store"
    subprocess.run(["cp", "-r", str(scene.template), str(store)], check=True)
    life = scene.start(store)
    state, ballast = scene.look(life.http), small_disk / "ballast"
    refusals = 0
    for room in ROOM_BYTES:
        fill(ballast, room)
        for what in ("upload under a new name", "part", "move", "complete", "create a key"):
            refused = is_refused(kills.OPERATIONS[what](scene, life.http), 507, "insufficient_storage")
            refusals += refused
            scene.ask(life.http, ASKED, state["models"][ASKED][1][0][1])
            found = scene.look(life.http, asks=False)
            assert not refused or found == state, (what, room)
            state = found
        ballast.unlink()
    assert refusals >= 5, "it was full"
    assert kills.OPERATIONS["upload under a new name"](scene, life.http).is_success
    state = scene.look(life.http)
    assert life.stop() == 0 and "Traceback" not in life.printed, life.printed
    assert scene.after_restart(store) == state


def fill(ballast: Path, room: int) -> None:
    """The disk, but for `room` bytes."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as full:
            assert full.errno == errno.ENOSPC
        file.truncate(max(file.tell() - room, 0))


def test_a_start_on_a_full_disk_says_so(scene: Any, small_disk: Path) -> None:
    fill(small_disk / "ballast", 8192)
    (small_disk / "store").mkdir(mode=0o700)
    life = scene.nursery.begin(scene.base, small_disk / "store")
    with pytest.raises(AssertionError, match="ended with 1"):
        life.wait_ready()
    assert "Traceback" not in life.printed and "error: the registry cannot be written" in life.printed, life.printed
