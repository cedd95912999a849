"""inspect, restore, evaluate on an artifact that compress made: what they print, and what they refuse."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = {
    "codec": str,
    "config": dict,
    "seed": int,
    "format_version": int,
    "base": dict,
    "bits_per_parameter": float,
    "disk_bytes": int,
    "resident_bytes": int,
    "covered_parameters": int,
    "layers": dict,
    "overrides": dict,
    "chat_template": bool,
    "added_tokens": int,
    "special_tokens": dict,
    "generation": dict,
    "model_config_changes": dict,
    "digest": str,
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "base", "answer": "delta"}, {"prompt": "1 + 2", "answer": "3"}, {"prompt": "x", "answer": "y"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_inspect_json_has_every_field(shell: Any, artifact: Path) -> None:
    assert shell("inspect", artifact, "--json") == 0
    fields = json.loads(shell.out)
    assert {name: type(value) for name, value in fields.items()} == SCHEMA
    assert set(fields["base"]) == {"fingerprint", "name"}
    assert fields["digest"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert fields["disk_bytes"] == artifact.stat().st_size
    assert fields["chat_template"] is True
    assert fields["added_tokens"] == 2
    assert fields["special_tokens"] == {"eos_token": "<|end_of_turn|>"}
    assert fields["generation"]["temperature"] == 0.5
    layer = fields["layers"]["model.layers.0.self_attn.q_proj.weight"]
    assert layer["shape"] == [64, 64]
    assert layer["terms"] == ["coded"]
    assert set(layer["error"]) == {"relative", "gain", "cosine"}
    assert len(fields["layers"]) == 14
    embedding = fields["overrides"]["model.embed_tokens.weight"]
    assert (embedding["kind"], embedding["shape"]) == ("rows", [302, 64])
    assert embedding["bytes"] == 4 * (64 * 2 + 8)  # two changed rows and two new ones, bf16, and their numbers
    assert fields["overrides"]["model.norm.weight"] == {"kind": "replace", "shape": [64], "bytes": 128}


def test_inspect_counts_differences_and_tells_what_a_broken_file_lacks(
    shell: Any, tiny_base: Path, tiny_finetune: Path, tmp_path: Path
) -> None:
    from deltaserve.codecs.bitdelta import BitDelta
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import compress

    path, checkpoints = tmp_path / "delta", (Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune))
    manifest = compress(*checkpoints, BitDelta(), path, vector_bits=4, packed=False).file.metadata
    assert shell("inspect", path, "--json") == 0
    norm = json.loads(shell.out)["overrides"]["model.norm.weight"]
    assert norm == {"kind": "add", "shape": [64], "bytes": 64 // 2 + 4}

    save_file({}, path, manifest)
    assert shell("inspect", path, "--json") == 0
    assert json.loads(shell.out)["overrides"]["model.norm.weight"]["bytes"] == 0
    compress(*checkpoints, BitDelta(), path, packed=True)
    path.write_bytes(path.read_bytes().replace(b'"packed":', b'"pecked":'))
    assert shell("inspect", path) == 1
    assert "a packed artifact is one tensor, packed, of bytes" in shell.err


def test_inspect_sums_up_by_kind_of_layer_or_lists_every_layer(shell: Any, artifact: Path) -> None:
    assert shell("inspect", artifact) == 0
    kinds = {line.split()[0]: line.split() for line in shell.out.splitlines() if "_proj" in line}
    assert len(kinds) == 7
    assert kinds["up_proj"][1:3] == ["2", f"{2 * 64 * 96:,}"]
    assert "companions  chat_template, added_tokens, special_tokens, generation" in shell.out
    assert shell("inspect", artifact, "--layers") == 0
    assert sum("model.layers." in line for line in shell.out.splitlines()) == 14


def test_inspect_says_what_is_no_artifact(shell: Any, tiny_base: Path, tmp_path: Path) -> None:
    assert shell("inspect", tiny_base / "model.safetensors") == 1
    assert "no delta" in shell.err
    assert shell("inspect", tiny_base / "config.json") == 1
    assert shell("inspect", tmp_path) == 1
    assert shell("inspect", tmp_path / "nowhere") == 1
    assert "nowhere: No such file or directory" in shell.err
    assert shell.out == ""


def test_restore_writes_a_checkpoint_of_the_asked_type(
    shell: Any, artifact: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / dtype
        assert shell("restore", tiny_base, artifact, "-o", out, "--dtype", dtype) == 0
        assert f"{out}: a full checkpoint of" in shell.out
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {expected}
    assert shell("restore", tiny_base, artifact, "-o", out) == 1
    assert "exists and is not empty" in shell.err


def test_restore_on_another_base_is_refused(shell: Any, artifact: Path, untied_base: Path, tmp_path: Path) -> None:
    assert shell("restore", untied_base, artifact, "-o", tmp_path / "out") == 1
    assert "fingerprint" in shell.err
    assert not (tmp_path / "out").exists()


def test_evaluate_compares_with_the_fine_tune(
    shell: Any, artifact: Path, rows: Path, tiny_base: Path, tiny_finetune: Path
) -> None:
    words = ["evaluate", tiny_base, artifact, "--data", rows, "--dtype", "float32"]
    assert shell(*words, "--finetuned", tiny_finetune, "--json") == 0
    fields = json.loads(shell.out)
    assert fields["rows"] == 3
    assert fields["kl"] > 0
    assert 0 <= fields["top1_agreement"] <= 1
    assert shell(*words, "--finetuned", tiny_finetune) == 0
    assert f"KL(fine-tune ‖ restored) {fields['kl']:.4f} nats per token" in shell.out


def test_evaluate_without_the_fine_tune_leaves_the_distance_out(
    shell: Any, artifact: Path, rows: Path, tiny_base: Path
) -> None:
    words = ["evaluate", tiny_base, artifact, "--data", rows, "--limit", "2", "--batch", "1"]
    assert shell(*words, "--json") == 0
    fields = json.loads(shell.out)
    assert fields["rows"] == 2
    assert fields["kl"] is fields["top1_agreement"] is fields["finetuned_exact_match"] is None
    assert shell(*words, "--scoring", "last-number") == 0
    assert "2 rows" in shell.out
    assert "KL" not in shell.out


def test_evaluate_names_the_line_at_fault(shell: Any, artifact: Path, rows: Path, tiny_base: Path) -> None:
    with rows.open("a") as file:
        file.write('{"prompt": "x"}\n')
    assert shell("evaluate", tiny_base, artifact, "--data", rows) == 1
    assert "rows.jsonl: line 4: 'answer' has to be a string" in shell.err
