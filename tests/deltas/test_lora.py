"""An imported PEFT adapter computes what PEFT computes, and what is no plain LoRA is refused by name."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaserve.deltas.adapters import import_adapter, is_adapter
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.restore import restore
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = torch.tensor([[5, 17, 80, 201, 33]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 7},
    "alpha_pattern": {"down_proj": 1, r"layers\.0\.self_attn\..*": 40, "q_proj": 2},
}
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"target_modules": ["q_proj", "v_proj"]}),
    ("every linear layer", {"target_modules": LINEAR, "r": 16, "lora_alpha": 8}),
    ("rslora", {"target_modules": LINEAR, "use_rslora": True, "lora_alpha": 3}),
    ("patterns", {"target_modules": LINEAR, **PATTERNS}),
    ("rslora with patterns", {"target_modules": LINEAR, "use_rslora": True, **PATTERNS}),
    ("a head of its own", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("norms", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    ("trained biases", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    ("all biases", {"target_modules": ["q_proj"], "bias": "all"}),
    ("the head adapted", {"target_modules": ["q_proj", "lm_head"]}),
]


def make_adapter(base: Path, out: Path, config: Any) -> torch.Tensor:
    """Saves an adapter with random weights; returns the logits PEFT gives with it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # PEFT's warnings are not under test
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(out)
        logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **fields})


@pytest.fixture
def edited(untied_base: Path, tmp_path: Path) -> Callable[[Any], Path]:
    """A plain adapter whose tensors were changed by a function."""

    def make(change: Any) -> Path:
        make_adapter(untied_base, tmp_path / "adapter", lora(target_modules=["q_proj", "k_proj"]))
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        file.unlink()
        save_file(tensors, file)
        return tmp_path / "adapter"

    return make


def refusal(base: Path, adapter: Path) -> str:
    out = adapter.parent / "delta.safetensors"
    with pytest.raises(CheckpointError) as caught:
        import_adapter(Checkpoint.open(base), adapter, out)
    assert not out.exists()
    return caught.value.message


@pytest.mark.parametrize("config", [config for _, config in ADAPTERS], ids=[name for name, _ in ADAPTERS])
def test_the_restored_model_gives_pefts_logits(untied_base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    wanted = make_adapter(untied_base, tmp_path / "adapter", lora(**config))
    base = Checkpoint.open(untied_base)
    assert is_adapter(tmp_path / "adapter") and not is_adapter(untied_base)
    artifact = import_adapter(base, tmp_path / "adapter", tmp_path / "delta.safetensors")
    check_against_base(artifact, base)
    check_numbers(artifact, base)
    restore(base, artifact, tmp_path / "restored", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, wanted, atol=1e-4, rtol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(untied_base, dtype=torch.float32)(TOKENS).logits
    assert (plain - wanted).abs().max() > 1e-2


def test_factors_travel_as_they_are(untied_base: Path, tmp_path: Path) -> None:
    make_adapter(untied_base, tmp_path / "adapter", lora(target_modules=["q_proj"]))
    artifact = import_adapter(Checkpoint.open(untied_base), tmp_path / "adapter", tmp_path / "delta.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    term = artifact.terms(f"{module}.weight")[0]
    assert torch.equal(term.left.codes, factors[f"base_model.model.{module}.lora_B.weight"])
    assert torch.equal(term.right.codes, factors[f"base_model.model.{module}.lora_A.weight"])
    assert torch.equal(term.s, torch.full((4,), 2.5))
    assert (artifact.manifest.codec, artifact.manifest.config) == ("lora", {"rank": 4})


@pytest.mark.parametrize(
    ("named", "config"),
    [
        ("use_dora", {"use_dora": True}),
        ("layer_replication", {"layer_replication": [[0, 2], [0, 2]]}),
        ("init_lora_weights 'pissa'", {"init_lora_weights": "pissa"}),
        ("init_lora_weights 'olora'", {"init_lora_weights": "olora"}),
        ("lora_embedding_A", {"target_modules": ["embed_tokens"]}),
        ("lora_B.bias", {"lora_bias": True}),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    untied_base: Path, tmp_path: Path, named: str, config: dict[str, Any]
) -> None:
    make_adapter(untied_base, tmp_path / "adapter", lora(**{"target_modules": ["q_proj"], **config}))
    assert named in refusal(untied_base, tmp_path / "adapter")


def test_another_kind_of_adapter_is_refused_by_name(untied_base: Path, tmp_path: Path) -> None:
    make_adapter(untied_base, tmp_path / "adapter", LoHaConfig(target_modules=["k_proj"]))
    assert "'LOHA'" in refusal(untied_base, tmp_path / "adapter")


def test_a_saved_head_on_a_tied_base_is_refused(tiny_base: Path, tmp_path: Path, files: Any, workshop: Any) -> None:
    stored = workshop.copy_of(tiny_base, "stored")
    make_adapter(tiny_base, tmp_path / "adapter", lora(target_modules=["q_proj"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = load_file(tiny_base / "model.safetensors")["model.embed_tokens.weight"].clone()
    file.unlink()
    save_file({**tensors, "base_model.model.lm_head.weight": head}, file)
    files.tensors(stored, lambda tensors: tensors.update({"lm_head.weight": head.clone()}))
    for base in (tiny_base, stored):
        assert "lm_head.weight: " in refusal(base, tmp_path / "adapter")


def test_everything_that_does_not_fit_is_listed(edited: Callable[[Any], Path], untied_base: Path) -> None:
    prefix = "base_model.model.model.layers"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"]
        tensors[f"{prefix}.0.self_attn.k_proj.lora_B.weight"] = torch.zeros(33, 4)
        tensors[f"{prefix}.1.self_attn.q_proj.lora_A.weight"] = torch.zeros(5, 64)
        tensors[f"{prefix}.1.self_attn.k_proj.lora_A.weight"] = torch.zeros(40, 64)
        tensors[f"{prefix}.1.self_attn.k_proj.lora_B.weight"] = torch.zeros(32, 40)
        tensors[f"{prefix}.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
        tensors[f"{prefix}.7.self_attn.q_proj.lora_B.weight"] = torch.zeros(64, 4)
        tensors[f"{prefix}.1.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64, dtype=torch.float64)
        tensors[f"{prefix}.1.mlp.up_proj.lora_B.weight"] = torch.zeros(96, 4, dtype=torch.int16)
        tensors[f"{prefix}.0.mlp.up_proj.lora_A.weight"] = torch.full((4, 64), float("nan"))
        tensors["base_model.model.model.surprise"] = torch.zeros(4)

    message = refusal(untied_base, edited(change))
    for line in (
        "model.layers.0.self_attn.q_proj: lora_B is missing",
        "model.layers.0.self_attn.k_proj: B·A has shape (33, 64), base has (32, 64)",
        "model.layers.1.self_attn.q_proj: ranks 5 of A and 4 of B differ",
        "model.layers.1.self_attn.k_proj: rank 40 is over 32",
        "model.layers.7.self_attn.q_proj: the base has no model.layers.7.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj: factors of type torch.float64, torch.int16",
        f"{prefix}.0.mlp.up_proj.lora_A.weight: 256 NaN",
        "base_model.model.model.surprise: neither a LoRA factor nor a tensor of the base",
    ):
        assert line in message


def test_a_weight_both_adapted_and_replaced_is_refused(edited: Callable[[Any], Path], untied_base: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    key = f"base_model.model.{name}.base_layer.weight"
    adapter = edited(lambda tensors: tensors.update({key: torch.zeros(64, 64)}))
    assert f"{name}.weight: both adapted and replaced" in refusal(untied_base, adapter)


def test_a_pickled_adapter_is_not_read(untied_base: Path, tmp_path: Path) -> None:
    make_adapter(untied_base, tmp_path / "adapter", lora(target_modules=["q_proj"]))
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "no safetensors file" in refusal(untied_base, tmp_path / "adapter")
