"""Attacks by what lies beside or in place of safetensors: pickles, indices, code."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.errors import ArtifactCorrupt, CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from .target import Target


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_under_another_name_is_never_loaded(one_target: Target, tmp_path: Path) -> None:
    """Threat: code that runs when it is unpickled (SGLang CVE-2026-15969, GHSA-x3m8-f7g5-qhm7)."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "saved.bin")
    for raw in (pickle.dumps(Explosive()), (tmp_path / "saved.bin").read_bytes(), b"PK\x03\x04" + bytes(64)):
        with pytest.raises(ArtifactCorrupt, match="not a safetensors file"):
            one_target.receive(raw)
        checkpoint = tmp_path / "model.safetensors"
        checkpoint.write_bytes(raw)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            Checkpoint.open(tmp_path)


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    """Threat: a .bin beside a config.json is loaded because nothing else is there."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive()))
    for reference in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError):
            Checkpoint.open(reference)


def test_an_index_that_points_elsewhere_stays_in_its_folder(tmp_path: Path) -> None:
    """Threat: a checkpoint's index names files of the host."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"secret": torch.zeros(1)}, tmp_path / "secret.safetensors")
    for path in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": path}}))
        with pytest.raises(CheckpointError, match="missing secret"):
            Checkpoint.open(folder)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000, "\xff"])
def test_an_index_of_nonsense_is_refused(tmp_path: Path, index: str) -> None:
    """Threat: errors of the parser that nobody expects."""
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)


def test_code_beside_a_checkpoint_never_runs(tmp_path: Path) -> None:
    """Threat: auto_map in config.json names a Python file (vLLM CVE-2026-22807)."""
    from deltaserve.deltas.companions import changed_companions

    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError):
        changed_companions(checkpoint, checkpoint)
    assert not (tmp_path / "ran").exists()
