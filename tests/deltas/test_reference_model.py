"""The reference model is the checkpoint that transformers itself would load, whichever way it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.reference_model import encode_row, load_reference
from deltaserve.errors import CheckpointError, TemplateError

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 40, 41, 42, 43]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def transformers_logits(directory: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


def test_the_base_alone(tiny_base: Path) -> None:
    model = load_reference(Checkpoint.open(tiny_base), None, None, torch.float32)
    assert torch.equal(logits(model), transformers_logits(tiny_base))
    assert not model.training


def test_the_fine_tune_comes_before_the_artifact(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune)
    model = load_reference(Checkpoint.open(tiny_base), artifact, Checkpoint.open(tiny_finetune), torch.float32)
    assert torch.equal(logits(model), transformers_logits(tiny_finetune))


def test_the_artifact_on_its_base(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune)
    model = load_reference(Checkpoint.open(tiny_base), artifact, None, torch.float32)
    assert torch.equal(logits(model), transformers_logits(workshop.restore(tiny_base, artifact, torch.float32)))


def test_what_does_not_fill_the_model_is_named(workshop: Any, tiny_base: Path, files: Any) -> None:
    holed = workshop.copy_of(tiny_base, "holed")
    files.tensors(holed, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_reference(Checkpoint.open(holed), None, None, torch.float32)
    other = workshop.copy_of(tiny_base, "other", model_type="no such type")
    with pytest.raises(CheckpointError, match="does not load as a causal language model"):
        load_reference(Checkpoint.open(other), None, None, torch.float32)


def test_a_row_is_a_turn_and_its_end(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prompt, answer = encode_row(tokenizer, "base", "delta")
    assert tokenizer.decode(prompt) == "<|user|>base</s><|assistant|>"
    assert tokenizer.decode(answer) == "delta</s>"
    tokenizer.chat_template = None
    assert encode_row(tokenizer, "base", "delta") == (tokenizer("base").input_ids, answer)
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(TemplateError, match="fails on a user's message"):
        encode_row(tokenizer, "base", "delta")
