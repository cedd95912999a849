"""PEFT's LoRA: one low-rank term a layer, its factors kept as they are.

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

from deltaserve.deltas.adapters.parts import ADAPTER_CONFIG, PREFIX, Parts, plain_name
from deltaserve.deltas.checkpoint import Checkpoint, non_finite
from deltaserve.deltas.specs.base import VECTOR_FLOATS
from deltaserve.errors import CheckpointError
from deltaserve_kernels.terms import Coded, LowRank

if TYPE_CHECKING:
    from pathlib import Path

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


def read_lora(base: Checkpoint, weights: Checkpoint) -> Parts:
    config = weights.json(ADAPTER_CONFIG) or {}
    _check_config(weights.directory, config)
    parts = Parts("lora", {"rank": 0})
    factors: dict[str, dict[str, Tensor]] = {}
    for key in weights.names:
        name, tensor = key.removeprefix(PREFIX), weights.tensor(key)
        if problem := non_finite(tensor):
            parts.problems.append(f"{key}: {problem}")
        elif match := FACTOR.match(name):
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        else:
            parts.replace(base, key, plain_name(key), tensor, "a LoRA factor")
    for module, pair in factors.items():
        if problem := _misfit(base, module, pair):
            parts.problems.append(f"{module}: {problem}")
        else:
            rank = len(pair["A"])
            parts.terms[f"{module}.weight"] = _term(pair["A"], pair["B"], _scale(config, module, rank))
            parts.config["rank"] = max(rank, parts.config["rank"])
    return parts


def _check_config(adapter: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{adapter}: peft_type {config.get('peft_type')!r}; only LORA and IA3 adapters are deltas here"
        )
    refused = [option for option in REFUSED_OPTIONS if config.get(option)]
    if refused:
        raise CheckpointError(f"{adapter}: {', '.join(refused)} in {ADAPTER_CONFIG}: not additive on plain weights")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise CheckpointError(
            f"{adapter}: init_lora_weights {start!r} changes the base's weights; have PEFT convert it to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _misfit(base: Checkpoint, module: str, pair: dict[str, Tensor]) -> str | None:
    """Why these factors are no term of `module`, or None."""
    name = f"{module}.weight"
    if set(pair) != {"A", "B"}:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    if name not in base.names:
        return f"the base has no {name}"
    a, b, shape = pair["A"], pair["B"], base.entries[name].shape
    if (b.shape[0], a.shape[1]) != shape:
        return f"B·A has shape {(b.shape[0], a.shape[1])}, base has {shape}"
    if a.shape[0] != b.shape[1]:
        return f"ranks {a.shape[0]} of A and {b.shape[1]} of B differ"
    if a.shape[0] > min(shape):
        return f"rank {a.shape[0]} is over {min(shape)}"
    if bad := {a.dtype, b.dtype} - set(VECTOR_FLOATS):
        return f"factors of type {', '.join(sorted(map(str, bad)))}"
    return None


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
