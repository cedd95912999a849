"""An imported (IA)³ adapter is what PEFT merges, and is served as it is restored, in a batch with others.

Tolerance of served logits: 1e-5 of the largest, as in tests/model/test_served_is_restored.py.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaserve.deltas.adapters import import_adapter, is_adapter
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.manifest import LayerSpec
from deltaserve.deltas.resident import ResidentDelta
from deltaserve.deltas.restore import restore
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import ArtifactError, ArtifactNotFinite, CheckpointError

from ..isolation.rig import Rig, load, make_request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = [5, 9, 200, 31, 77, 4, 4, 120]
PREFIX = "base_model.model."
Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
UP_PROJ, DOWN_PROJ = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
PAPER = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "paper": PAPER,  # the layers of the paper, and PEFT's choice for Llama
    "outputs": {"target_modules": EVERY, "feedforward_modules": []},
    "inputs": {"target_modules": EVERY, "feedforward_modules": EVERY},
    "head": {"target_modules": ["q_proj", "lm_head"], "feedforward_modules": ["lm_head"]},
    "saved": {**PAPER, "modules_to_save": ["norm", "lm_head"]},
}


def make_adapter(base: Path, out: Path, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Saves an adapter with random vectors; returns the state of the model that PEFT makes of it, float32."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # PEFT's warnings are not under test
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(plain, IA3Config(task_type="CAUSAL_LM", **fields))
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(out)
        state: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return state


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def check_served(base: Path, artifact: Artifact, restored: Path, other: Artifact) -> None:
    """Logits in steps shared with the base and with another delta are those of the directory `restored`."""
    model = load(base, kv_slots=256)
    model.check_servable(artifact)
    deltas = {name: ResidentDelta.load(one) for name, one in (("ours", artifact), ("other", other))}
    assert deltas["ours"].nbytes == artifact.resident_bytes
    rig = Rig.of(model, deltas)
    requests = [make_request(PROMPT, "ours"), make_request(PROMPT, "other"), make_request(PROMPT)]
    answers = rig.run(*requests)
    for request, answer, directory in ((requests[0], answers[0], restored), (requests[-1], answers[-1], base)):
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            wanted = reference(torch.tensor([PROMPT + answer])).logits[0, len(PROMPT) - 1 : -1]  # float32 [tokens, V]
        assert largest_difference(rig.logits(request), wanted) <= 1e-5 * float(wanted.abs().max())
        assert answer == wanted.argmax(1).tolist()
    assert largest_difference(rig.logits(requests[0])[0], rig.logits(requests[-1])[0]) > 0.01


@pytest.fixture
def imported(untied_base: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """The artifact of an adapter on a base with attention biases, and the adapter itself in tmp_path / "adapter"."""

    def make(fields: dict[str, Any] = PAPER) -> Artifact:
        make_adapter(untied_base, tmp_path / "adapter", fields)
        return import_adapter(Checkpoint.open(untied_base), tmp_path / "adapter", tmp_path / "delta.safetensors")

    return make


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_it_is_restored_as_peft_merges_it_and_served_as_it_is_restored(
    untied_base: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    merged = make_adapter(untied_base, tmp_path / "adapter", fields)
    base = Checkpoint.open(untied_base)
    assert is_adapter(tmp_path / "adapter")
    artifact = import_adapter(base, tmp_path / "adapter", tmp_path / "delta.safetensors")
    check_against_base(artifact, base)
    check_numbers(artifact, base)
    assert artifact.manifest.codec == "ia3"
    restore(base, artifact, tmp_path / "restored", dtype=torch.float32)
    restored = load_file(tmp_path / "restored" / "model.safetensors")
    assert restored.keys() == merged.keys()
    for name, tensor in restored.items():
        assert largest_difference(tensor, merged[name]) <= 1e-6, name
    changed = {name for name in merged if not torch.equal(merged[name], base.tensor(name).float())}
    assert changed == artifact.manifest.layers.keys() | artifact.manifest.overrides.keys()

    make_adapter(untied_base, tmp_path / "other", ADAPTERS["inputs"])
    other = import_adapter(base, tmp_path / "other", tmp_path / "other.safetensors")
    check_served(untied_base, artifact, tmp_path / "restored", other)


def test_vectors_travel_as_they_are(imported: Callable[..., Artifact], tmp_path: Path, untied_base: Path) -> None:
    artifact = imported()
    vectors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = artifact.manifest.layers
    assert all(not layer.terms for layer in layers.values())
    assert (layers[f"{K_PROJ}.weight"].base_rows, layers[f"{K_PROJ}.weight"].base_cols) == (True, False)
    assert (layers[f"{DOWN_PROJ}.weight"].base_rows, layers[f"{DOWN_PROJ}.weight"].base_cols) == (False, True)
    rows, cols = artifact.base_factors(f"{K_PROJ}.weight").rows, artifact.base_factors(f"{DOWN_PROJ}.weight").cols
    assert rows is not None and torch.equal(rows, vectors[f"{PREFIX}{K_PROJ}.ia3_l"].flatten())
    assert cols is not None and torch.equal(cols, vectors[f"{PREFIX}{DOWN_PROJ}.ia3_l"].flatten())
    biases = {f"model.layers.{i}.self_attn.{m}_proj.bias": 32 for i in (0, 1) for m in "kv"}
    assert artifact.manifest.overrides.keys() == biases.keys()
    assert artifact.resident_bytes == 4 * (sum(len(v.flatten()) for v in vectors.values()) + sum(biases.values()))
    untouched = Checkpoint.open(untied_base).tensor(f"{K_PROJ}.bias").float()
    assert torch.equal(artifact.override(f"{K_PROJ}.bias").values, untouched * rows)


def test_a_base_without_biases_has_no_overrides(tiny_base: Path, tmp_path: Path) -> None:
    make_adapter(tiny_base, tmp_path / "adapter", PAPER)
    artifact = import_adapter(Checkpoint.open(tiny_base), tmp_path / "adapter", tmp_path / "delta.safetensors")
    assert (len(artifact.manifest.layers), artifact.manifest.overrides) == (6, {})


def test_packed_or_named_it_is_the_same(imported: Callable[..., Artifact], tmp_path: Path, untied_base: Path) -> None:
    packed = imported()
    assert packed.manifest.packed
    edit(tmp_path / "adapter" / "adapter_model.safetensors", lambda t: t.update({k: v.half() for k, v in t.items()}))
    named = import_adapter(Checkpoint.open(untied_base), tmp_path / "adapter", tmp_path / "half.safetensors")
    assert not named.manifest.packed  # float16 vectors are kept, and float32 is the packed type
    for name in packed.manifest.layers:
        ours, theirs = packed.base_factors(name), named.base_factors(name)
        for a, b in ((ours.rows, theirs.rows), (ours.cols, theirs.cols)):
            assert (a is None) == (b is None) and (a is None or torch.equal(a.half(), b))
    assert ResidentDelta.load(named).nbytes == named.resident_bytes < packed.resident_bytes


def test_factors_terms_and_scalars_together_are_served_as_they_are_restored(
    workshop: Any, untied_base: Path, make_finetune: Callable[..., Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        for module in (Q_PROJ, UP_PROJ):
            spec = manifest["layers"][f"{module}.weight"]
            spec.update(base_rows=True, base_cols=True, gamma=0.5, base_shift=0.25)
            for name, size in zip(("base_rows", "base_cols"), spec["shape"], strict=True):
                tensors[f"{module}.weight#{name}"] = 1 + 0.3 * torch.randn(size, generator=generator)

    tuned = make_finetune(untied_base, tmp_path / "tuned", scale=0.02, seed=1)
    artifact = workshop.edited(workshop.compress(untied_base, tuned), change)
    base, weight = Checkpoint.open(untied_base), f"{Q_PROJ}.weight"
    restored = workshop.restore(untied_base, artifact, torch.float32)
    rows, cols = artifact.read(f"{weight}#base_rows"), artifact.read(f"{weight}#base_cols")
    wanted = base.tensor(weight).float() * rows[:, None] * cols
    wanted = 1.25 * wanted + 0.5 * artifact.terms(weight)[0].decode()
    torch.testing.assert_close(load_file(restored / "model.safetensors")[weight], wanted)

    make_adapter(untied_base, tmp_path / "other", PAPER)
    other = import_adapter(base, tmp_path / "other", tmp_path / "other.safetensors")
    check_served(untied_base, artifact, restored, other)


@pytest.fixture
def edited(imported: Callable[..., Artifact]) -> Callable[..., Artifact]:
    """A sound artifact, every tensor under its name, whose tensors and manifest were changed by a function."""

    def make(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Artifact:
        artifact = imported()
        path = artifact.file.path
        tensors = {name: artifact.read(name).clone() for name in artifact.entries}
        manifest = {**artifact.manifest.model_dump(), "packed": False}
        change(tensors, manifest)
        path.unlink()
        save_file(tensors, path, {"deltaserve": json.dumps(manifest)})
        return Artifact.open(path)

    return make


def test_factors_that_do_not_fit_the_base_are_listed(
    edited: Callable[..., Artifact], untied_base: Path, workshop: Any
) -> None:
    def change(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        tensors[f"{K_PROJ}.weight#base_rows"] = torch.ones(33)
        tensors[f"{DOWN_PROJ}.weight#base_cols"] = torch.ones(96, dtype=torch.int32)
        del tensors["model.layers.1.self_attn.k_proj.weight#base_rows"]
        manifest["layers"]["model.layers.0.mlp.down_proj.weight"].update(base_cols=False, base_rows=True)
        manifest["layers"]["model.layers.9.mlp.up_proj.weight"] = manifest["layers"][f"{K_PROJ}.weight"]

    message = workshop.mismatch(edited(change), untied_base)
    for line in (
        f"{K_PROJ}.weight#base_rows: shape (33,), expected (32,)",
        f"{DOWN_PROJ}.weight#base_cols: type int32, expected float32 or bfloat16 or float16",
        "model.layers.1.self_attn.k_proj.weight#base_rows: missing",
        "model.layers.0.mlp.down_proj.weight#base_rows: missing",
        "model.layers.0.mlp.down_proj.weight#base_cols: the manifest does not mention it",
        "model.layers.9.mlp.up_proj.weight: the base has no such tensor",
    ):
        assert f"  {line}" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_factors_that_are_not_finite_are_refused(
    edited: Callable[..., Artifact], untied_base: Path, value: float
) -> None:
    artifact = edited(lambda tensors, _: tensors[f"{K_PROJ}.weight#base_rows"][3:4].fill_(value))
    with pytest.raises(ArtifactNotFinite, match=f"{K_PROJ}.weight#base_rows"):
        check_numbers(artifact, Checkpoint.open(untied_base))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base_rows": False}, "at least one term, or factors"),
        ({"shape": [32, 64, 1]}, "only a matrix has factors"),
        ({"base_rows": "yes"}, "valid boolean"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    edited: Callable[..., Artifact], changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        edited(lambda _, manifest: manifest["layers"][f"{K_PROJ}.weight"].update(changed))


def test_a_manifest_says_of_factors_only_what_is_stored() -> None:
    layer = LayerSpec(shape=[2, 3], dtype="F32", terms=[], base_cols=True)
    assert json.loads(layer.model_dump_json()).keys() >= {"base_cols"}
    assert "base_rows" not in layer.model_dump_json()
    assert LayerSpec.model_validate_json(layer.model_dump_json()) == layer


def refusal(base: Path, adapter: Path) -> str:
    out = adapter.parent / "refused.safetensors"
    with pytest.raises(CheckpointError) as caught:
        import_adapter(Checkpoint.open(base), adapter, out)
    assert not out.exists()
    return caught.value.message


def test_everything_that_does_not_fit_is_listed(untied_base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{K_PROJ}.ia3_l"] = torch.ones(33, 1)
        tensors[f"{PREFIX}{DOWN_PROJ}.ia3_l"] = torch.ones(64, 96)
        tensors[f"{PREFIX}model.layers.1.self_attn.k_proj.ia3_l"] = torch.ones(32, 1, dtype=torch.float64)
        tensors[f"{PREFIX}model.layers.7.self_attn.k_proj.ia3_l"] = torch.ones(32, 1)
        tensors[f"{PREFIX}model.layers.0.self_attn.v_proj.ia3_l"][0] = torch.nan
        tensors[f"{PREFIX}model.layers.1.self_attn.v_proj.base_layer.bias"] = torch.ones(32)
        tensors[f"{PREFIX}model.embed_tokens.ia3_l"] = torch.ones(1, 64)
        tensors[f"{PREFIX}model.norm.ia3_l"] = torch.ones(64, 1)
        tensors[f"{PREFIX}{UP_PROJ}.ia3_l"] = torch.ones(96, 1)
        tensors[f"{PREFIX}{UP_PROJ}.weight"] = torch.ones(96, 64)
        tensors[f"{PREFIX}{Q_PROJ}.ia3_l"] = torch.full((64, 1), 3e38)
        tensors[f"{PREFIX}{Q_PROJ}.lora_A.weight"] = torch.ones(4, 64)

    make_adapter(untied_base, tmp_path / "adapter", PAPER)
    edit(tmp_path / "adapter" / "adapter_model.safetensors", change)
    message = refusal(untied_base, tmp_path / "adapter")
    for line in (
        f"{K_PROJ}: a vector of shape (33, 1), base has (32, 64): (32, 1) or (1, 64) fit",
        f"{DOWN_PROJ}: a vector of shape (64, 96), base has (64, 96): (64, 1) or (1, 96) fit",
        "model.layers.1.self_attn.k_proj: a vector of type torch.float64",
        "model.layers.7.self_attn.k_proj: the base has no model.layers.7.self_attn.k_proj.weight",
        f"{PREFIX}model.layers.0.self_attn.v_proj.ia3_l: 1 NaN",
        "model.layers.1.self_attn.v_proj.bias: both scaled and replaced",
        "model.embed_tokens: (IA)³ on an embedding",
        "model.norm: (IA)³ on a weight of shape (64,)",
        f"{UP_PROJ}.weight: both adapted and replaced",
        f"{PREFIX}{Q_PROJ}.lora_A.weight: neither an (IA)³ vector nor a tensor of the base",
    ):
        assert line in message


def test_a_bias_that_overflows_is_refused(imported: Callable[..., Artifact], untied_base: Path, tmp_path: Path) -> None:
    imported()
    base = tmp_path / "large"
    base.mkdir()
    for file in untied_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    edit(base / "model.safetensors", lambda tensors: tensors[f"{K_PROJ}.bias"].fill_(3e38))
    edit(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda tensors: tensors[f"{PREFIX}{K_PROJ}.ia3_l"].fill_(10.0),
    )
    assert f"{K_PROJ}.bias: scaled, it has 0 NaN and 32 infinite" in refusal(base, tmp_path / "adapter")


def test_a_convolution_and_transposed_weights_are_refused_by_name(
    imported: Callable[..., Artifact], untied_base: Path, tmp_path: Path
) -> None:
    imported()
    conv = tmp_path / "conv"
    conv.mkdir()
    (conv / "config.json").write_bytes((untied_base / "config.json").read_bytes())
    save_file({"conv.weight": torch.ones(4, 3, 2, 2)}, conv / "model.safetensors")
    config = tmp_path / "adapter" / "adapter_config.json"
    vector = {f"{PREFIX}conv.ia3_l": torch.ones(1, 4, 1, 1)}
    edit(tmp_path / "adapter" / "adapter_model.safetensors", lambda tensors: tensors.update(vector))
    assert "conv: (IA)³ on a weight of shape (4, 3, 2, 2)" in refusal(conv, tmp_path / "adapter")
    config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": True}))
    assert "fan_in_fan_out" in refusal(untied_base, tmp_path / "adapter")


def test_a_tied_head_cannot_be_scaled(tiny_base: Path, tmp_path: Path) -> None:
    make_adapter(tiny_base, tmp_path / "adapter", ADAPTERS["head"])
    assert "lm_head: the base has no lm_head.weight" in refusal(tiny_base, tmp_path / "adapter")
