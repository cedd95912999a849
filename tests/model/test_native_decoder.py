"""The native decoder answers as transformers does on the same bfloat16 weights in float32, up to bfloat16's rounding;
what it does not run is served by the other decoder, which says so.

Tolerance: relative RMS of all logits of a prompt and ten greedy tokens, 2e-2, and no more than that of transformers in
bfloat16. A greedy token is the reference's where its logit leads by more than the largest error of a logit, twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, Qwen2Config

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.errors import BadRequest, CheckpointError
from deltaserve.model.load import load_model
from deltaserve_kernels.native import library

from .native_bases import (
    BLOCK,
    CONFIGS,
    SMALL,
    Text,
    decode,
    kernels,
    llama,
    load_native,
    reference,
    relative_rms,
    save,
)

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.model.served import ServedModel

__all__ = ["kernels"]

TOLERANCE = 2e-2
PROMPTS = [[5, 9, 200, 31, 77, 4, 4, 120, 250, 66, 13, 87, 5, 300, 8, 91, 42, 17, 3], [8], [3, 90, 51, 7, 7, 42]]


def check(model: ServedModel, base: Path) -> None:
    """Prompts of all lengths in one step, then ten tokens of all of them together."""
    texts = [Text(list(prompt), blocks=[2 * i, 2 * i + 1]) for i, prompt in enumerate(PROMPTS)]
    decode(model, texts, 10)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        found, wanted = text.stacked, reference(base, text.tokens)
        assert found.shape == wanted.shape == (len(prompt) + 10, SMALL["vocab_size"])
        error = relative_rms(found, wanted)
        assert error <= TOLERANCE
        assert error <= relative_rms(reference(base, text.tokens, torch.bfloat16), wanted)
        best = wanted.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * (found - wanted).abs().max()
        assert clear.any()
        assert torch.equal(found.argmax(1)[clear], wanted.argmax(1)[clear])


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_and_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    base = save(CONFIGS[name], tmp_path / "base")
    check(load_native(base), base)


@pytest.mark.parametrize("name", ["llama-wide", "qwen3"])
def test_on_every_instruction_set(name: str, kernels: str, tmp_path: Path) -> None:
    base = save(CONFIGS[name], tmp_path / "base")
    model = load_native(base, kernels)
    assert model.runtime == {"decoder": "native", "kernels": kernels}
    check(model, base)


def load(base: Path, **options: Any) -> ServedModel:
    given = {"device": torch.device("cpu"), "dtype": None, "kv_slots": 64, "block_size": BLOCK, **options}
    return load_model(Checkpoint.open(base), **given)


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=64), {}),
    "gemma3": (Gemma3TextConfig(**SMALL), {}),
    "hidden size": (llama(hidden_size=72), {}),
    "intermediate size": (llama(intermediate_size=88), {}),
    "head size": (llama(head_dim=10), {}),
    "growing rotary": (llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), {}),
    "partial rotary": (llama(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), {}),
    "activation": (Qwen2Config(**SMALL, hidden_act="gelu"), {}),
    "block size": (llama(), {"block_size": 8}),
    "float32": (llama(), {"dtype": torch.float32}),
    "torch": (llama(), {"kernels": "torch"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_served_by_transformers(name: str, tmp_path: Path) -> None:
    config, options = OTHERS[name]
    model = load(save(config, tmp_path / "base"), **options)
    plain = name in ("float32", "torch")
    assert model.runtime == {"decoder": "transformers", "kernels": "torch" if plain else library.load().instruction_set}


def test_without_native_kernels_transformers_serves_through_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(llama(), tmp_path / "base")
    monkeypatch.setattr(library, "available", lambda: ())
    library.load.cache_clear()
    try:
        assert load(base).runtime == {"decoder": "transformers", "kernels": "torch"}
    finally:
        library.load.cache_clear()


def test_kernels_that_cannot_be_had_are_an_error_where_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(llama(), tmp_path / "base")
    with pytest.raises(BadRequest, match=r"--kernels amx: they serve bfloat16 on a CPU, not torch.float32 on cpu"):
        load(base, kernels="amx", dtype=torch.float32)
    monkeypatch.setattr(library, "available", lambda: ("avx2",))
    library.load.cache_clear()
    try:
        with pytest.raises(BadRequest, match=r"--kernels amx: no native kernels for amx here; there are: avx2"):
            load(base, kernels="amx")
    finally:
        library.load.cache_clear()


def test_a_checkpoint_that_lacks_a_tensor_or_has_one_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save(llama(), tmp_path / "base")
    file, name = base / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    for change, message in (
        ({name: tensors[name][:, :32].contiguous()}, rf"{name} is \(96, 32\), not \(96, 64\)"),
        ({name: None}, f"{name} is missing"),
    ):
        file.unlink()
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load(base)
