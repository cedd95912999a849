"""Paths that lead out of the import root: none of them is opened, and all are told apart from no file by nothing."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.imports import ImportRoot
from deltaserve.errors import BadRequest, NotFound, PermissionDenied

from ..support.imports import read

if TYPE_CHECKING:
    from pathlib import Path

SECRET = b"secret"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`root`, reached by a link, with honest files in it; a secret beside it."""
    made = tmp_path / "true-root"
    (made / "folder").mkdir(parents=True)
    (made / "folder" / "file").write_bytes(b"honest")
    (tmp_path / "true-root-secret").write_bytes(SECRET)
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "root").symlink_to(made)
    return tmp_path / "root"


def test_files_under_the_root_are_read_by_any_name_that_stays_there(root: Path) -> None:
    (root / "link").symlink_to("folder/file")
    (root / "absolute").symlink_to(root / "folder")
    whole = os.path.realpath(root)
    for asked in ("folder/file", "./folder/../folder/file", "link", "absolute/file", f"{root}/link", f"{whole}/link"):
        assert read(ImportRoot(root), asked) == b"honest"


def test_paths_out_of_the_root_answer_like_no_file(root: Path) -> None:
    beside = root.parent
    (root / "out").symlink_to(beside / "secret")
    (root / "folder" / "up").symlink_to("../..")
    (root / "chain").symlink_to("out")
    (root / "loop").symlink_to("loop")
    (root / "self").symlink_to("/proc/self/environ")
    os.mkfifo(root / "pipe")
    attacks = [
        "../secret", "folder/../../secret", f"{beside}/secret", f"{beside}/true-root-secret", "../true-root-secret",
        "out", "chain", "folder/up/secret", "loop", "self", "/etc/passwd", "/proc/self/mem", "/dev/zero", "pipe",
        "", ".", "folder", "folder/file\0.safetensors", "\ud800", "a" * 5000, "~/.ssh/id_rsa",
        "file:///etc/passwd", "https://example.com/x.safetensors", "s3://bucket/x", "hf://owner/name", "%2e%2e/secret",
    ]  # fmt: skip
    for asked in attacks:
        with pytest.raises(NotFound) as caught:
            read(ImportRoot(root), asked)
        assert caught.value.message == f"there is no file {asked[:200]!r} under the import root"


def test_a_folder_that_becomes_a_link_while_it_is_opened_leads_nowhere(root: Path) -> None:
    """A writer below the root swaps a folder for a link to the secret's, again and again."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(SECRET)
    (root / "a").mkdir()
    (root / "a" / "file").write_bytes(b"honest")
    (root / "b").symlink_to(outside)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for old, new in (("a", "c"), ("b", "a"), ("a", "b"), ("c", "a")):
                os.rename(root / old, root / new)

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen: set[Any] = set()
    try:
        for _ in range(3000):
            try:
                seen.add(read(ImportRoot(root), "a/file"))
            except NotFound:
                seen.add(None)
    finally:
        done.set()
        swapping.join()
    assert seen == {b"honest", None}


def test_without_a_root_nothing_is_opened_and_a_root_must_be_there(root: Path) -> None:
    with pytest.raises(PermissionDenied, match="--import-root"), ImportRoot(None).open("/etc/passwd"):
        pass
    for wrong in (root / "absent", root / "folder" / "file"):
        with pytest.raises(BadRequest, match="--import-root"):
            ImportRoot(wrong)
