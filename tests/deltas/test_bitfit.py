"""Biases alone are a delta: overrides, and no layer. A base without biases cannot take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaserve.deltas.adapters import import_adapter, is_adapter
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.restore import restore
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = torch.tensor([[5, 17, 80, 201, 33]])
BIAS = "model.layers.1.self_attn.q_proj.bias"


def trained_biases(base: Path) -> dict[str, torch.Tensor]:
    """Of the base, moved; but the last one, which stays."""
    generator = torch.Generator().manual_seed(0)
    biases = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if name.endswith(".bias")}
    *moved, _ = sorted(biases)
    for name in moved:
        biases[name] = (biases[name].float() + 0.1 * torch.randn(biases[name].shape, generator=generator)).bfloat16()
    return biases


def saved(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_restored_model_has_the_trained_biases(untied_base: Path, tmp_path: Path, prefix: str) -> None:
    biases = trained_biases(untied_base)
    adapter = saved(tmp_path / "biases", {prefix + name: tensor for name, tensor in biases.items()})
    base = Checkpoint.open(untied_base)
    assert is_adapter(adapter) and is_adapter(adapter / "model.safetensors") and not is_adapter(untied_base)
    artifact = import_adapter(base, adapter, tmp_path / "delta.safetensors")
    check_against_base(artifact, base)
    check_numbers(artifact, base)
    assert (artifact.manifest.codec, artifact.manifest.layers) == ("bitfit", {})
    assert sorted(artifact.manifest.overrides) == sorted(biases)[:-1]  # the last one did not change
    restore(base, artifact, tmp_path / "restored", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(untied_base, dtype=torch.float32)
    with torch.no_grad():
        plain = model(TOKENS).logits
        model.load_state_dict(biases, strict=False)
        wanted = model(TOKENS).logits
        restored = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype=torch.float32)(TOKENS).logits
    assert torch.equal(restored, wanted)
    assert (plain - wanted).abs().max() > 1e-3


def test_a_base_without_biases_is_said_to_have_none(tiny_base: Path, untied_base: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "biases", trained_biases(untied_base))
    with pytest.raises(CheckpointError, match=f"{BIAS}: the base has no {BIAS}, and a delta cannot add a bias"):
        import_adapter(Checkpoint.open(tiny_base), adapter, tmp_path / "delta.safetensors")
    assert not (tmp_path / "delta.safetensors").exists()


def test_everything_that_does_not_fit_is_listed(untied_base: Path, tmp_path: Path) -> None:
    biases = trained_biases(untied_base)
    biases[BIAS] = torch.zeros(3)
    biases["model.layers.0.self_attn.q_proj.bias"] = torch.full((64,), float("inf"))
    with pytest.raises(CheckpointError) as caught:
        import_adapter(Checkpoint.open(untied_base), saved(tmp_path / "biases", biases), tmp_path / "delta.safetensors")
    for line in (
        "2 problems",
        f"{BIAS}: neither a bias nor a tensor of the base in the same shape",
        "model.layers.0.self_attn.q_proj.bias: 0 NaN and 64 infinite entries",
    ):
        assert line in caught.value.message


def test_what_holds_more_than_biases_is_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    assert not is_adapter(saved(tmp_path / "more", {BIAS: torch.zeros(64), "model.norm.weight": torch.ones(64)}))
    assert not is_adapter(saved(tmp_path / "nothing", {}))
    assert not is_adapter(tmp_path / "missing")
    assert not is_adapter(tiny_base / "config.json")
