"""A PEFT adapter directory → an artifact: LoRA is one low-rank term, its factors kept as they are.

    ΔW = (α / r) · B · A        rsLoRA: α / √r           Hu et al., arXiv 2106.09685; PEFT's adapter_config.json

modules_to_save and trained biases become overrides. What is not additive on the base's weights (DoRA, LoRA on
embeddings, other adapter kinds) is refused by name.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaserve.deltas.artifact import Artifact, Override, override_spec, override_tensors, term_spec, term_tensors
from deltaserve.deltas.checkpoint import Checkpoint, non_finite
from deltaserve.deltas.compress import Progress, make_manifest, write_artifact
from deltaserve.deltas.manifest import LayerSpec, OverrideSpec
from deltaserve.deltas.tensorfile import DTYPE_NAMES, TensorFileWriter
from deltaserve.deltas.validate import FLOATS
from deltaserve.errors import CheckpointError
from deltaserve_kernels.terms import Coded, LowRank

if TYPE_CHECKING:
    from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight$")
REFUSED_OPTIONS = (
    "use_dora",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others (PiSSA, OLoRA, …) change the base as well


def is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file()


def import_lora(base: Checkpoint, adapter: Path, out: Path, *, progress: Progress | None = None) -> Artifact:
    """Writes the artifact `out` and opens it. Raises CheckpointError listing everything that does not fit."""
    weights = Checkpoint.open(adapter)
    config = weights.json(ADAPTER_CONFIG) or {}
    _check_config(adapter, config)
    factors: dict[str, dict[str, Tensor]] = {}
    overrides: dict[str, Tensor] = {}
    problems: list[str] = []
    for key in weights.names:
        name = key.removeprefix(PREFIX)
        if problem := non_finite(weights.tensor(key)):
            problems.append(f"{key}: {problem}")
        elif match := FACTOR.match(name):
            factors.setdefault(match["module"], {})[match["factor"]] = weights.tensor(key)
        else:
            plain = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            plain = plain.replace(".base_layer.", ".")
            if plain in base.names and base.entries[plain].shape == tuple(weights.entries[key].shape):
                if not torch.equal(base.tensor(plain).to(weights.entries[key].dtype), weights.tensor(key)):
                    overrides[plain] = weights.tensor(key)
            else:
                problems.append(f"{key}: neither a LoRA factor nor a tensor of the base in the same shape")
    terms = _terms(base, config, factors, problems)
    problems += [f"{name}: both adapted and replaced" for name in sorted(terms.keys() & overrides.keys())]
    if problems:
        raise CheckpointError(f"{adapter}: {len(problems)} problems:\n" + "\n".join(f"  {p}" for p in problems[:50]))
    return _write(base, weights, terms, overrides, out, progress)


def _check_config(adapter: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{adapter}: peft_type {config.get('peft_type')!r}; only LORA adapters are deltas here")
    refused = [option for option in REFUSED_OPTIONS if config.get(option)]
    if refused:
        raise CheckpointError(f"{adapter}: {', '.join(refused)} in {ADAPTER_CONFIG}: not additive on plain weights")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise CheckpointError(
            f"{adapter}: init_lora_weights {start!r} changes the base's weights; have PEFT convert it to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _terms(
    base: Checkpoint, config: dict[str, Any], factors: dict[str, dict[str, Tensor]], problems: list[str]
) -> dict[str, LowRank]:
    terms = {}
    for module, pair in factors.items():
        name = f"{module}.weight"
        if set(pair) != {"A", "B"}:
            problems.append(f"{module}: lora_{'B' if 'A' in pair else 'A'} is missing")
        elif name not in base.names:
            problems.append(f"{module}: the base has no {name}")
        elif (pair["B"].shape[0], pair["A"].shape[1]) != base.entries[name].shape:
            shape = (pair["B"].shape[0], pair["A"].shape[1])
            problems.append(f"{module}: B·A has shape {shape}, base has {base.entries[name].shape}")
        elif pair["A"].shape[0] != pair["B"].shape[1]:
            problems.append(f"{module}: ranks {pair['A'].shape[0]} of A and {pair['B'].shape[1]} of B differ")
        elif pair["A"].shape[0] > min(base.entries[name].shape):
            problems.append(f"{module}: rank {pair['A'].shape[0]} is over {min(base.entries[name].shape)}")
        elif bad := {pair["A"].dtype, pair["B"].dtype} - set(FLOATS):
            problems.append(f"{module}: factors of type {', '.join(sorted(map(str, bad)))}")
        else:
            terms[name] = _term(pair["A"], pair["B"], _scale(config, module, pair["A"].shape[0]))
    return terms


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """α/r, or α/√r for rsLoRA, with the adapter's per-module α."""
    alpha = float(config.get("lora_alpha", rank))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break  # PEFT takes the first that matches
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _term(a: Tensor, b: Tensor, scale: float) -> LowRank:
    def plain(matrix: Tensor) -> Coded:
        rows, cols = matrix.shape
        return Coded(rows, cols, 8 * matrix.element_size(), "float", matrix.contiguous())

    return LowRank(plain(b), torch.full((a.shape[0],), scale), plain(a))


def _write(
    base: Checkpoint,
    weights: Checkpoint,
    terms: dict[str, LowRank],
    overrides: dict[str, Tensor],
    out: Path,
    progress: Progress | None,
) -> Artifact:
    layers: dict[str, LayerSpec] = {}
    specs: dict[str, OverrideSpec] = {}
    writer = TensorFileWriter(out.parent)
    total = len(terms) + len(overrides)
    try:
        for done, (name, term) in enumerate(sorted(terms.items())):
            if progress:
                progress(name, done, total)
            for key, tensor in term_tensors(term, f"{name}#0").items():
                writer.add(key, tensor)
            entry = base.entries[name]
            layers[name] = LayerSpec(shape=list(entry.shape), dtype=DTYPE_NAMES[entry.dtype], terms=[term_spec(term)])
        for name, tensor in sorted(overrides.items()):
            override = Override(tensor, None, tuple(tensor.shape))
            specs[name] = override_spec(override, DTYPE_NAMES[tensor.dtype])
            for key, part in override_tensors(name, override).items():
                writer.add(key, part)
        manifest = make_manifest(
            base, weights, "lora", {"rank": max((term.left.cols for term in terms.values()), default=0)}
        )
        write_artifact(out, manifest.model_copy(update={"layers": layers, "overrides": specs}), writer)
    finally:
        writer.close()
    if progress:
        progress("", total, total)
    return Artifact.open(out)
