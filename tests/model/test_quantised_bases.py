"""A base in fewer bits: y = x·Q(W)ᵀ + the delta, for every tenant of one batch; what cannot be had is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.resident import ResidentDelta
from deltaserve.deltas.restore import restored_tensor
from deltaserve.errors import BadRequest, CheckpointError
from deltaserve.model import quantization
from deltaserve.model.load import load_model

from ..isolation.rig import CPU, PAGE, Rig, make_request
from .test_architectures import SMALL, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltaserve.model.quantization import Quantization
    from deltaserve.model.served import ServedModel

PROMPT = [5, 9, 200, 31, 77, 4, 4, 120]
TOLERANCE = 1e-5  # of the largest logit, in float32


@pytest.fixture(scope="module")
def artifact(
    untied_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    folder = tmp_path_factory.mktemp("quantised")
    tuned = Checkpoint.open(make_finetune(untied_base, folder / "tuned", scale=0.05, seed=3))
    return compress(Checkpoint.open(untied_base), tuned, BitDelta(), folder / "delta.safetensors")


def load(base: Path, kind: Quantization) -> ServedModel:
    dtype = torch.float32
    return load_model(Checkpoint.open(base), device=CPU, dtype=dtype, kv_slots=256, block_size=PAGE, quantization=kind)


def whole_matrix(value: torch.Tensor) -> torch.Tensor:
    """What a product with the quantised matrix multiplies by."""
    return torch.nn.functional.linear(torch.eye(value.shape[1]), value).T


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_base_and_tenant_are_what_the_quantised_matrices_and_the_delta_make(
    kind: Quantization, untied_base: Path, artifact: Artifact
) -> None:
    served = load(untied_base, kind)
    assert served.runtime["quantization"] == kind
    rig = Rig.of(served, {"tenant": ResidentDelta.load(artifact)})
    requests = {"tenant": make_request(PROMPT, "tenant"), "base": make_request(PROMPT)}
    answers = dict(zip(requests, rig.run(*requests.values()), strict=True))
    assert answers["tenant"] != answers["base"]

    base = Checkpoint.open(untied_base)
    for name, request in requests.items():
        reference = AutoModelForCausalLM.from_pretrained(untied_base, dtype=torch.float32).eval()
        quantization.quantise(reference, reference.get_output_embeddings(), kind)
        state = {}
        for tensor, value in reference.state_dict().items():
            whole = base.tensor(tensor).float()
            coarse = whole_matrix(value) if type(value) is not torch.Tensor else whole
            assert torch.equal(coarse, whole) == (type(value) is torch.Tensor)
            tuned = restored_tensor(base, artifact, tensor, torch.float32) if name == "tenant" else whole
            state[tensor] = coarse + (tuned - whole)
        wanted_model = AutoModelForCausalLM.from_pretrained(untied_base, dtype=torch.float32).eval()
        wanted_model.load_state_dict(state)
        with torch.no_grad():
            wanted = wanted_model(torch.tensor([PROMPT + answers[name]])).logits[0, len(PROMPT) - 1 : -1]
        served_logits = rig.logits(request)
        assert float((served_logits - wanted).abs().max() / wanted.abs().max()) <= TOLERANCE


def test_a_base_that_is_stored_quantised_is_refused(untied_base: Path, tmp_path: Path) -> None:
    for file in untied_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"stored as gptq.*--quantization"):
        load(tmp_path, "none")


def test_matrices_that_torchao_would_leave_as_they_are_are_named(tmp_path: Path) -> None:
    base = save(LlamaConfig(**SMALL), tmp_path)  # 48 columns, no whole number of groups of 32
    with pytest.raises(BadRequest, match=r"--quantization int4: torchao leaves 2 matrices .*down_proj \(32, 48\)"):
        load(base, "int4")
