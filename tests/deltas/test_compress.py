"""What compression refuses, what it tolerates, and that it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import SUMMED_AT_ONCE, Checkpoint, non_finite
from deltaserve.deltas.compress import compress
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def refusal(workshop: Any, base: Path, finetuned: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        workshop.compress(base, finetuned)
    return caught.value.message


def test_a_stored_copy_of_a_tied_head_does_not_change_the_fingerprint(
    workshop: Any, tiny_base: Path, files: Any
) -> None:
    stored = workshop.copy_of(tiny_base, "stored")
    files.tensors(stored, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert "lm_head.weight" in load_file(stored / "model.safetensors")
    assert Checkpoint.open(stored).fingerprint == Checkpoint.open(tiny_base).fingerprint
    assert workshop.compress(tiny_base, stored).manifest.overrides == {}


def test_a_stale_copy_of_a_tied_head_is_never_read(workshop: Any, tiny_base: Path, files: Any) -> None:
    stored = workshop.copy_of(tiny_base, "stored")
    files.tensors(stored, lambda tensors: tensors.update({"lm_head.weight": torch.zeros_like(tensors[EMBEDDING])}))
    checkpoint = Checkpoint.open(stored)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor(EMBEDDING))


def test_every_name_and_shape_that_differs_is_listed(workshop: Any, tiny_base: Path, files: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
        tensors[Q_PROJ] = torch.zeros(128, 64)

    tuned = workshop.copy_of(tiny_base, "tuned")
    files.tensors(tuned, change)
    message = refusal(workshop, tiny_base, tuned)
    assert "4 differ" in message
    assert "model.norm.weight: only in base" in message
    assert "model.layers.1.mlp.up_proj.weight: only in base" in message
    assert "model.layers.2.mlp.up_proj.weight: only in tuned" in message
    assert f"{Q_PROJ}: shape (128, 64), base has (64, 64)" in message


def test_a_head_of_another_size_than_the_tied_embedding_is_refused(workshop: Any, tiny_base: Path, files: Any) -> None:
    tuned = workshop.copy_of(tiny_base, "tuned", tie_word_embeddings=False)
    files.tensors(tuned, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(10, 64)}))
    assert "lm_head.weight: shape (10, 64)" in refusal(workshop, tiny_base, tuned)


def test_a_tensor_that_turned_from_numbers_to_integers_is_refused(workshop: Any, tiny_base: Path, files: Any) -> None:
    tuned = workshop.copy_of(tiny_base, "tuned")
    files.tensors(tuned, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}))
    assert f"{Q_PROJ}: type I8, base has BF16" in refusal(workshop, tiny_base, tuned)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "1 NaN"), (float("-inf"), "1 infinite")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", EMBEDDING])
def test_a_number_that_is_not_finite_is_named(
    workshop: Any, tiny_base: Path, files: Any, name: str, value: float, said: str
) -> None:
    tuned = workshop.copy_of(tiny_base, "tuned")
    files.tensors(tuned, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    message = refusal(workshop, tiny_base, tuned)
    assert message.startswith(f"{name}: ") and said in message.replace("and 1", "1")


def test_a_large_tensor_is_looked_through_in_pieces() -> None:
    """Whole in float64 an embedding would be gigabytes."""
    tensor = torch.zeros(3, SUMMED_AT_ONCE // 2, dtype=torch.bfloat16)
    assert non_finite(tensor) is None
    tensor.fill_(3e38)  # their sum is finite in float64 alone
    assert non_finite(tensor) is None
    tensor[2, -1], tensor[0, 0] = torch.nan, torch.inf
    assert non_finite(tensor) == f"1 NaN and 1 infinite entries of {tensor.numel()}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}), ("hidden_act", "gelu")],
)
def test_a_config_that_computes_something_else_is_refused_by_name(
    workshop: Any, tiny_base: Path, field: str, value: object
) -> None:
    message = refusal(workshop, tiny_base, workshop.copy_of(tiny_base, "tuned", **{field: value}))
    assert f"{field}: " in message
    assert "num_hidden_layers" not in message


def test_rope_theta_in_the_old_place_is_compared_too(workshop: Any, tiny_base: Path, files: Any) -> None:
    def old(theta: float) -> Any:
        return lambda fields: (fields.pop("rope_parameters", None), fields.update(rope_theta=theta))

    same, other = workshop.copy_of(tiny_base, "same"), workshop.copy_of(tiny_base, "other")
    files.json(same / "config.json", old(10000.0))
    files.json(other / "config.json", old(500000.0))
    assert workshop.compress(tiny_base, same).manifest.model_config_changes == {}
    assert "rope_theta" in refusal(workshop, tiny_base, other)


def test_noise_of_other_transformers_versions_is_no_difference(workshop: Any, tiny_base: Path, files: Any) -> None:
    tuned = workshop.copy_of(
        tiny_base, "tuned", transformers_version="4.31.0", use_cache=False, _name_or_path="x", pretraining_tp=1
    )
    files.json(tuned / "config.json", lambda fields: fields.update(torch_dtype=fields.pop("dtype")))
    manifest = workshop.compress(tiny_base, tuned).manifest
    assert (manifest.model_config_changes, manifest.layers) == ({}, {})


@pytest.mark.parametrize("section", ["model", "pre_tokenizer", "normalizer"])
def test_another_tokenizer_is_refused_by_section(workshop: Any, tiny_base: Path, files: Any, section: str) -> None:
    def change(fields: dict[str, Any]) -> None:
        if section == "model":
            first, second = fields["model"]["merges"][:2]
            fields["model"]["merges"][:2] = [second, first]
        else:
            fields[section] = {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Whitespace"}}[section]

    tuned = workshop.copy_of(tiny_base, "tuned")
    files.json(tuned / "tokenizer.json", change)
    assert f"tokenizer.json differs from the base in {section};" in refusal(workshop, tiny_base, tuned)


def test_a_changed_or_missing_token_of_the_base_is_refused(workshop: Any, tiny_base: Path, files: Any) -> None:
    changed, missing = workshop.copy_of(tiny_base, "changed"), workshop.copy_of(tiny_base, "missing")
    files.json(changed / "tokenizer.json", lambda fields: fields["added_tokens"][2].update(lstrip=True))
    files.json(missing / "tokenizer.json", lambda fields: fields["added_tokens"].pop(2))
    assert "token 2: " in refusal(workshop, tiny_base, changed)
    assert "token 2: None" in refusal(workshop, tiny_base, missing)


def test_what_the_format_cannot_hold_is_a_checkpoint_error(workshop: Any, tiny_base: Path, files: Any) -> None:
    tuned = workshop.copy_of(tiny_base, "tuned")
    (tuned / "chat_template.jinja").write_text("x" * (2**18 + 1))
    assert "chat_template" in refusal(workshop, tiny_base, tuned)
    (tuned / "chat_template.jinja").write_text("x")
    files.json(tuned / "generation_config.json", lambda fields: fields.update(temperature="hot"))
    assert "generation.temperature" in refusal(workshop, tiny_base, tuned)


@pytest.mark.parametrize("stop_at", [0, 9])
def test_an_interrupted_compression_leaves_nothing(
    tmp_path: Path, tiny_base: Path, tiny_finetune: Path, stop_at: int
) -> None:
    def stop(name: str, done: int, total: int) -> None:  # noqa: ARG001 (the shape of a progress callback)
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(
            Checkpoint.open(tiny_base),
            Checkpoint.open(tiny_finetune),
            make_codec("bitdelta"),
            tmp_path / "delta.safetensors",
            progress=stop,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(
    workshop: Any, tiny_base: Path, tiny_finetune: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workshop.compress(tiny_base, tiny_finetune).file.path
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("deltaserve.deltas.tensorfile.shutil.copyfileobj", fail)
    with pytest.raises(OSError, match="disk full"):
        workshop.compress(tiny_base, tiny_finetune, "delta-svd", rank=4)
    assert [file.read_bytes() for file in workshop.folder.iterdir()] == [before]


def test_progress_names_every_tensor_and_ends_at_the_total(
    tmp_path: Path, tiny_base: Path, tiny_finetune: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    base = Checkpoint.open(tiny_base)
    compress(
        base,
        Checkpoint.open(tiny_finetune),
        make_codec("bitdelta"),
        tmp_path / "delta",
        progress=lambda *step: seen.append(step),
    )
    assert [name for name, _, _ in seen] == [*base.names, ""]
    assert [done for _, done, _ in seen] == list(range(len(base.names) + 1))


@pytest.mark.parametrize("missing", ["model.safetensors", "."])
def test_a_checkpoint_that_is_not_there_is_explained(workshop: Any, tiny_base: Path, missing: str) -> None:
    broken = workshop.copy_of(tiny_base, "broken")
    (broken / missing).unlink() if missing != "." else [file.unlink() for file in broken.iterdir()]
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint.open(broken)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint.open(broken / "model.safetensors")


def test_a_missing_shard_is_named(workshop: Any, tiny_base: Path) -> None:
    broken = workshop.copy_of(tiny_base, "broken")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"missing model-00001-of-00002\.safetensors"):
        Checkpoint.open(broken)


MEASURE = """
import resource, sys
import torch
from pathlib import Path
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import SUMMED_AT_ONCE, Checkpoint, non_finite
from deltaserve.deltas.compress import compress
from deltaserve.deltas.restore import restore
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    base, tuned = (Checkpoint.open(folder / f"{name}.safetensors") for name in ("base", "tuned"))
    artifact = compress(base, tuned, make_codec("bitdelta"), folder / "delta.safetensors")
    restore(base, artifact, folder / "restored")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    folders = [tmp_path / "8", tmp_path / "64"]
    for folder in folders:
        folder.mkdir()
        for name in ("base", "tuned"):
            tensors = {f"layers.{index}.weight": torch.randn(256, 1024) for index in range(int(folder.name))}
            save_file(tensors, folder / f"{name}.safetensors")
    command = [sys.executable, "-c", MEASURE, *map(str, folders)]
    few, many = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    layer_bytes = 256 * 1024 * 4
    assert many - few < 2 * layer_bytes  # the checkpoints differ by 2 × 56 layers
