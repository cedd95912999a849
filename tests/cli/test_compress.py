"""compress: what reaches the codec, what is printed, and what is refused before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve.deltas.artifact import Artifact

if TYPE_CHECKING:
    from pathlib import Path


def test_compress_tells_the_size_the_error_and_what_to_do_next(
    shell: Any, tiny_base: Path, tiny_finetune: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a delta.safetensors"
    assert shell("compress", tiny_base, tiny_finetune, "-o", path) == 0
    made = Artifact.open(path)
    assert made.manifest.codec == "auto"
    full = sum(tensor.nbytes for tensor in load_file(tiny_finetune / "model.safetensors").values())
    assert f"{full / path.stat().st_size:.1f} times smaller than a full copy" in shell.out
    assert f"{made.bits_per_parameter:.3f} bits per parameter" in shell.out
    assert "mean of 14 layers: relative error " in shell.out
    assert f"deltaserve push '{path}'\n" in shell.out
    assert shell.err == ""  # no terminal, no bar


@pytest.mark.parametrize(
    ("words", "codec", "config"),
    [
        (["--bits", "4"], "auto", {"bits": 4.0, "noise": 0.04}),
        (["--option", "noise=0.5"], "auto", {"bits": None, "noise": 0.5}),
        (["--codec", "seeded-vq", "--option", "code_bits=6"], "seeded-vq", {"bits": 0.03, "code_bits": 6}),
        (["--codec", "delta-svd", "--rank", "2"], "delta-svd", {"rank": 2, "energy": None, "bits": None}),
        (["--rank", "2"], "delta-svd", {"rank": 2, "energy": None, "bits": None}),
        (["--codec", "delta-svd", "--energy", "0.5"], "delta-svd", {"rank": None, "energy": 0.5, "bits": None}),
        (["--codec", "bitdelta", "--option", "scale=row"], "bitdelta", {"scale": "row", "estimator": "unbiased"}),
    ],
)
def test_codec_budget_and_options_reach_the_codec(
    shell: Any, tiny_base: Path, tiny_finetune: Path, tmp_path: Path, words: list[str], codec: str, config: Any
) -> None:
    path = tmp_path / "delta.safetensors"
    assert shell("compress", tiny_base, tiny_finetune, "-o", path, "--seed", "5", *words) == 0
    manifest = Artifact.open(path).manifest
    assert (manifest.codec, manifest.seed) == (codec, 5)
    assert config.items() <= manifest.config.items()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--codec", "zip"], "codec 'zip' does not exist"),
        (["--codec", "dare", "--rank", "4"], "--rank does not apply to this codec"),
        (["--codec", "bitdelta", "--bits", "2"], "exactly 1 bit"),
        (["--option", "colour=3"], "colour"),
    ],
)
def test_a_budget_that_a_codec_cannot_meet_is_wrong_usage(
    shell: Any, tiny_base: Path, tiny_finetune: Path, tmp_path: Path, words: list[str], reason: str
) -> None:
    assert shell("compress", tiny_base, tiny_finetune, "-o", tmp_path / "delta.safetensors", *words) == 2
    assert reason in shell.err
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_never_overwritten(shell: Any, tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_base)
    before = (tiny_base / "model.safetensors").read_bytes()
    for output in (link / "model.safetensors", tiny_finetune / "model.safetensors"):
        assert shell("compress", tiny_base, tiny_finetune, "-o", output) == 2
        assert "is an input" in shell.err
    assert (tiny_base / "model.safetensors").read_bytes() == before


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    shell: Any, tiny_base: Path, tiny_finetune: Path, tmp_path: Path
) -> None:
    assert shell("compress", tiny_base, tiny_finetune, "-o", tmp_path) == 2
    assert "a directory" in shell.err
    assert shell("compress", tiny_base, tiny_finetune, "-o", tmp_path / "no" / "delta") == 2
    assert "does not exist" in shell.err


def test_compress_replaces_an_older_artifact_and_gives_the_same_bytes(
    shell: Any, artifact: Path, tiny_base: Path, tiny_finetune: Path
) -> None:
    before = artifact.read_bytes()
    artifact.write_bytes(b"older")
    assert shell("compress", tiny_base, tiny_finetune, "-o", artifact, "--codec", "bitdelta", "--quiet") == 0
    assert artifact.read_bytes() == before


def test_what_is_no_checkpoint_is_an_error(shell: Any, tiny_base: Path, tmp_path: Path) -> None:
    assert shell("compress", tiny_base, tmp_path, "-o", tmp_path / "delta.safetensors") == 1
    assert "no safetensors file" in shell.err
    assert shell("compress", tmp_path / "nowhere", tiny_base, "-o", tmp_path / "delta.safetensors") == 1
    assert "there is no such file or directory" in shell.err


def test_an_adapter_is_imported_as_it_is(shell: Any, tiny_base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 64), name.format("B"): torch.ones(64, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    path = tmp_path / "delta.safetensors"
    assert shell("compress", tiny_base, adapter, "-o", path) == 0
    assert "relative error" not in shell.out
    assert shell("inspect", path) == 0
    assert "lora (rank 2)" in shell.out
    assert shell("compress", tiny_base, adapter, "-o", path, "--codec", "dare", "--bits", "1") == 2
    assert "--codec, --bits do not apply" in shell.err
