"""base + fine-tune → artifact → fine-tune: what is exact is exact, what is coded is exactly what the codec says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.codecs.base import decode
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.validate import check_against_base, check_numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EMBEDDING = "model.embed_tokens.weight"
CODECS: list[tuple[str, dict[str, Any]]] = [
    ("bitdelta", {}),
    ("bitdelta", {"options": {"scale": "row"}}),
    ("bitdelta", {"options": {"scale": "col", "estimator": "paper"}}),
    ("dare", {"options": {"group": 8}}),
    ("dare", {"options": {"group": 3, "value_bits": 16}}),
    ("delta-svd", {"rank": 4}),
    ("delta-svd", {"energy": 0.5}),
]


def logits(directory: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        output: torch.Tensor = model(torch.tensor([tokens])).logits
    return output


@pytest.mark.parametrize(("codec", "budget"), CODECS)
def test_norms_embeddings_and_unchanged_tensors_come_back_exactly_and_layers_are_base_plus_decoded_delta(
    workshop: Any, tiny_base: Path, tiny_finetune: Path, codec: str, budget: dict[str, Any]
) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune, codec, **dict(budget))
    check_against_base(artifact, Checkpoint.open(tiny_base))
    check_numbers(artifact, Checkpoint.open(tiny_base))
    restored = load_file(workshop.restore(tiny_base, artifact, torch.float32) / "model.safetensors")
    base, tuned = (load_file(directory / "model.safetensors") for directory in (tiny_base, tiny_finetune))
    assert restored.keys() == tuned.keys()
    assert len(artifact.manifest.layers) == 14
    for name, tensor in restored.items():
        if name in artifact.manifest.layers:
            assert torch.equal(tensor, base[name].float() + decode(artifact.terms(name)))
        else:
            assert torch.equal(tensor, tuned[name].float())


def test_the_manifest_says_what_was_done(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune, "delta-svd", rank=4)
    manifest, base = artifact.manifest, Checkpoint.open(tiny_base)
    assert manifest.base.fingerprint == base.fingerprint
    assert (manifest.codec, manifest.config["rank"], manifest.seed) == ("delta-svd", 4, 7)
    assert manifest.overrides[EMBEDDING].kind == "rows"
    assert manifest.overrides[EMBEDDING].num_rows == 4  # two changed, two new
    assert manifest.overrides["model.norm.weight"].kind == "replace"
    layer = manifest.layers["model.layers.0.mlp.down_proj.weight"]
    assert layer.shape == [64, 96] and layer.dtype == "BF16"
    assert layer.error is not None and 0 < layer.error.relative < 1
    rows = base.entries[EMBEDDING].shape[0]
    assert [(token.id, token.content, token.special) for token in manifest.added_tokens] == [
        (rows, "<|tool|>", True),
        (rows + 1, "<|end_of_turn|>", True),
    ]
    assert manifest.special_tokens == {"eos_token": "<|end_of_turn|>"}
    assert manifest.generation == {"temperature": 0.5, "top_p": 0.9, "eos_token_id": rows + 1}
    assert manifest.model_config_changes == {"eos_token_id": rows + 1, "vocab_size": rows + 2}
    assert str(tiny_base.parent) not in manifest.model_dump_json()
    assert 0 < artifact.bits_per_parameter == artifact.file.num_bytes * 8 / artifact.covered_parameters


def test_tokens_template_and_generation_defaults_come_back(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    out = workshop.restore(tiny_base, workshop.compress(tiny_base, tiny_finetune))
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_finetune)
    text = "a delta<|tool|> is small <|end_of_turn|>🦊"
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == "a delta is small 🦊"
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token == "<|end_of_turn|>"
    conversation = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(conversation) == theirs.apply_chat_template(conversation)
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.5, ours.eos_token_id)
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["dtype"]) == (len(ours), ours.eos_token_id, "bfloat16")


def test_delta_svd_at_full_rank_restores_the_fine_tunes_logits(
    workshop: Any, tiny_base: Path, tiny_finetune: Path
) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune, "delta-svd", rank=96)
    out = workshop.restore(tiny_base, artifact, torch.float32)
    tokens = AutoTokenizer.from_pretrained(out).encode("fine-tunes of one base<|tool|>")
    wanted, base = logits(tiny_finetune, tokens), logits(tiny_base, tokens[:-1])
    assert (logits(out, tokens) - wanted).norm() < 0.01 * wanted.norm()
    assert (base - wanted[:, :-1, : base.shape[-1]]).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize(("codec", "budget"), [CODECS[0], CODECS[3], CODECS[5]])
def test_the_same_inputs_give_the_same_bytes(
    workshop: Any, tiny_base: Path, tiny_finetune: Path, codec: str, budget: dict[str, Any]
) -> None:
    files = [workshop.compress(tiny_base, tiny_finetune, codec, name, **dict(budget)).file.path for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_artifact_is_a_safetensors_file_for_everyone(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune, "dare", options={"group": 8})
    with safe_open(artifact.file.path, "pt") as theirs:
        assert set(theirs.keys()) == set(artifact.file.entries)
        for name in theirs.keys():  # noqa: SIM118 (no dict)
            assert torch.equal(theirs.get_tensor(name), artifact.read(name))


def test_an_unchanged_fine_tune_is_an_artifact_without_layers(workshop: Any, tiny_base: Path) -> None:
    artifact = workshop.compress(tiny_base, workshop.copy_of(tiny_base, "same"))
    assert (artifact.manifest.layers, artifact.manifest.overrides, dict(artifact.file.entries)) == ({}, {}, {})
    assert artifact.bits_per_parameter == 0
    out = workshop.restore(tiny_base, artifact)
    assert Checkpoint.open(out).fingerprint == Checkpoint.open(tiny_base).fingerprint


def test_a_head_of_its_own_comes_back_exactly(
    workshop: Any, make_finetune: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    tuned = make_finetune(tiny_base, tmp_path / "untied", scale=0.02, seed=2, untie=True)
    artifact = workshop.compress(tiny_base, tuned)
    assert artifact.manifest.model_config_changes == {"tie_word_embeddings": False}
    out = workshop.restore(tiny_base, artifact)
    restored, wanted = (load_file(directory / "model.safetensors") for directory in (out, tuned))
    assert torch.equal(restored["lm_head.weight"], wanted["lm_head.weight"])
    assert torch.equal(restored[EMBEDDING], wanted[EMBEDDING])
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert torch.equal(model.lm_head.weight, wanted["lm_head.weight"])


def test_a_fine_tune_that_ties_its_head_carries_it(workshop: Any, untied_base: Path, files: Any) -> None:
    tuned = workshop.copy_of(untied_base, "tied", tie_word_embeddings=True)
    files.tensors(tuned, lambda tensors: tensors.pop("lm_head.weight"))
    artifact = workshop.compress(untied_base, tuned)
    assert list(artifact.manifest.overrides) == ["lm_head.weight"]
    assert torch.equal(artifact.override("lm_head.weight").values, load_file(tuned / "model.safetensors")[EMBEDDING])


def test_biases_come_back_exactly(
    workshop: Any, make_finetune: Callable[..., Path], untied_base: Path, tmp_path: Path
) -> None:
    tuned = make_finetune(untied_base, tmp_path / "tuned", scale=0.02, seed=3)
    artifact = workshop.compress(untied_base, tuned)
    biases = [name for name in artifact.manifest.overrides if name.endswith(".bias")]
    restored = load_file(workshop.restore(untied_base, artifact) / "model.safetensors")
    wanted = load_file(tuned / "model.safetensors")
    assert len(biases) == 8
    assert all(torch.equal(restored[name], wanted[name]) for name in biases)


def test_a_file_that_is_no_language_model_is_compressed_too(workshop: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensors(scale: float) -> dict[str, torch.Tensor]:
        return {
            "encoder.conv.weight": 1 + scale * torch.randn(8, 4, 3, 3, generator=generator),
            "encoder.conv.bias": 1 + scale * torch.randn(8, generator=generator),
            "steps": torch.arange(3),
            "scalar": torch.tensor(float(scale)),
            "empty": torch.zeros(0, 5),
        }

    base, tuned = workshop.save("base.safetensors", tensors(0)), workshop.save("tuned.safetensors", tensors(0.1))
    artifact = workshop.compress(base, tuned, "delta-svd", rank=8)
    assert artifact.manifest.layers["encoder.conv.weight"].shape == [8, 4, 3, 3]
    restored = load_file(workshop.restore(base, artifact) / "model.safetensors")
    wanted = load_file(tuned)
    torch.testing.assert_close(restored["encoder.conv.weight"], wanted["encoder.conv.weight"], atol=2e-3, rtol=0)
    assert all(torch.equal(restored[name], wanted[name]) for name in wanted if name != "encoder.conv.weight")


def test_a_sharded_checkpoint_is_the_same_base(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    sharded = workshop.folder / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto").save_pretrained(sharded, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert Checkpoint.open(sharded).fingerprint == Checkpoint.open(tiny_base).fingerprint
    artifacts = [workshop.compress(base, tiny_finetune, name="x").manifest for base in (sharded, tiny_base)]
    assert artifacts[0].layers == artifacts[1].layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, None])
def test_restore_writes_the_type_that_was_asked_for(
    workshop: Any, tiny_base: Path, tiny_finetune: Path, dtype: torch.dtype | None
) -> None:
    out = workshop.restore(tiny_base, workshop.compress(tiny_base, tiny_finetune), dtype)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype or torch.bfloat16}
    said = json.loads((out / "config.json").read_text())["dtype"]
    assert said == str(dtype or torch.bfloat16).removeprefix("torch.")


def test_opening_reads_what_compressing_returned(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune, "dare", options={"group": 8})
    assert Artifact.open(artifact.file.path) == artifact
