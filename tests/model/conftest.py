"""Tenants of every form that an artifact may take, on a tied and on an untied base with biases."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.adapters import import_adapter
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import Scalars, compress
from deltaserve.deltas.restore import restore

from ..support.kinds import EveryKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHIFTS = {Q_PROJ: Scalars(gamma=0.5, base_shift=-0.25), DOWN_PROJ: Scalars(gamma=-2.0, base_shift=0.125)}
GROWN = {"added_tokens": ("<|x|>", "<|y|>"), "embedding_rows": (77, 120)}
# Options of compress, then of make_finetune; a list of IA3Config's fields for an adapter.
TENANTS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "tied": {
        "sign": ({"codec": BitDelta()}, {}),
        "sparse": ({"codec": make_codec("dare", Budget(), {"group": 4})}, {"norms": False, "embedding_rows": (4, 9)}),
        "own head": ({"codec": make_codec("delta-svd", Budget(rank=4), {})}, {"untie": True}),
        "grown": ({"codec": BitDelta()}, GROWN),
    },
    "untied": {
        "kinds": ({"codec": EveryKind(), "scalars": {Q_PROJ: Scalars(0.5, 0.25)}}, {}),
        "scalars": ({"codec": BitDelta(), "scalars": SHIFTS}, {}),
        "vectors": ({"codec": BitDelta(), "vector_bits": 4}, {}),
        "grown": ({"codec": BitDelta()}, GROWN),
    },
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "outputs": {"target_modules": EVERY, "feedforward_modules": []},
    "inputs": {"target_modules": EVERY, "feedforward_modules": EVERY},
    "head": {"target_modules": ["q_proj", "lm_head"], "feedforward_modules": ["lm_head"]},
}


@dataclass(frozen=True)
class Town:
    """A base and what is served on it: artifact and restored checkpoint by name."""

    base: Path
    tenants: dict[str, tuple[Artifact, Path]]


@pytest.fixture(scope="session")
def towns(
    tiny_base: Path, untied_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Town]:
    found = {}
    for kind, directory in (("tied", tiny_base), ("untied", untied_base)):
        base, folder, artifacts = Checkpoint.open(directory), tmp_path_factory.mktemp(kind), {}
        for seed, (name, (how, changes)) in enumerate(TENANTS[kind].items()):
            tuned = Checkpoint.open(
                make_finetune(directory, folder / f"{name}-tuned", scale=0.05, seed=seed, **changes)
            )
            artifacts[name] = compress(base, tuned, out=folder / f"{name}.safetensors", seed=7, **how)
        for name, fields in ADAPTERS.items() if kind == "untied" else ():
            _make_adapter(directory, folder / f"{name}-adapter", fields)
            artifacts[name] = import_adapter(base, folder / f"{name}-adapter", folder / f"{name}.safetensors")
        for name, artifact in artifacts.items():
            restore(base, artifact, folder / name, dtype=torch.float32)
        found[kind] = Town(directory, {name: (artifact, folder / name) for name, artifact in artifacts.items()})
    return found


def _make_adapter(base: Path, out: Path, fields: dict[str, Any]) -> None:
    """(IA)³ with random factors."""
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # PEFT's warnings are not under test
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(plain, IA3Config(task_type="CAUSAL_LM", **fields))
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(out)
