"""An artifact on its base → a full checkpoint in Hugging Face layout, overrides put back.

W = (1 + base_shift) · diag(rows) · W_base · diag(cols) + gamma · Σ terms
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from deltaserve.deltas.artifact import restored_weight
from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.deltas.tensorfile import DTYPES, TensorFileWriter
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.compress import Progress


def restored_names(base: Checkpoint, artifact: Artifact) -> list[str]:
    """The fine-tune's tensors: the base's, and a head of its own where it has one."""
    manifest = artifact.manifest
    untied = base.ties_lm_head and manifest.model_config_changes.get("tie_word_embeddings") is False
    return sorted({*base.names, *manifest.layers, *manifest.overrides, *([LM_HEAD] if untied else [])})


def restored_tensor(base: Checkpoint, artifact: Artifact, name: str, dtype: torch.dtype | None) -> Tensor:
    """One tensor of the fine-tune; `dtype` None = the type the fine-tune had."""
    manifest = artifact.manifest
    if name in manifest.layers:
        layer = manifest.layers[name]
        terms, factors, kept = artifact.terms(name), artifact.base_factors(name), DTYPES[layer.dtype]
        return restored_weight(base.tensor(name), terms, layer.gamma, layer.base_shift, dtype or kept, factors)
    if name in manifest.overrides:
        override = artifact.override(name)
        spec = manifest.overrides[name]
        whole = override.apply(None if spec.kind == "replace" else base.tensor(name))
        if override.adds:
            return whole.to(dtype or DTYPES[spec.dtype])
    else:
        whole = base.tensor(name)
    return whole.to(dtype) if dtype and whole.is_floating_point() else whole


def restore(
    base: Checkpoint,
    artifact: Artifact,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the directory `out`, whole or not at all. Raises CheckpointError where it exists, ArtifactError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty")
    check_against_base(artifact, base)
    check_numbers(artifact, base)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    writer = TensorFileWriter(staged)
    try:
        names = restored_names(base, artifact)
        for done, name in enumerate(names):
            if progress:
                progress(name, done, len(names))
            writer.add(name, restored_tensor(base, artifact, name, dtype))
        with (staged / "model.safetensors").open("wb") as file:
            writer.write(file, {"format": "pt"})
        _write_companions(base, artifact, staged, dtype)
        if out.exists():
            out.rmdir()
        staged.rename(out)
    finally:
        writer.close()
        shutil.rmtree(staged, ignore_errors=True)
    if progress:
        progress("", len(names), len(names))


def _write_companions(base: Checkpoint, artifact: Artifact, out: Path, dtype: torch.dtype | None) -> None:
    manifest = artifact.manifest
    if base.config:
        layers = manifest.layers.values()
        kept = DTYPES[next(iter(layers)).dtype] if layers else None
        config = {**base.config, **manifest.model_config_changes}
        if (chosen := dtype or kept) is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(chosen).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = base.json("generation_config.json")
    if generation is not None or manifest.generation:
        merged = {**(generation or {}), **manifest.generation}
        (out / "generation_config.json").write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    if (base.directory / "tokenizer.json").is_file():
        load_tokenizer(base.directory, manifest).save_pretrained(out)
