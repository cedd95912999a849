"""Every tenant of a mixed batch through Triton's kernels (its interpreter, where there is no GPU) as through torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.errors import BadRequest
from deltaserve.model.load import TransformersModel, load_model
from deltaserve_kernels.fused.compiles import watch

from .native_bases import BLOCK, Text, advance, relative_rms

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT = [5, 9]
TOLERANCE = 1e-3  # of the logits: activations in float16 between factors and books


def load(base: Path, kernels: str, dtype: torch.dtype = torch.float32, **more: Any) -> TransformersModel:
    checkpoint = Checkpoint.open(base)
    model = load_model(checkpoint, device=DEVICE, dtype=dtype, kv_slots=1024, block_size=BLOCK, kernels=kernels, **more)
    assert isinstance(model, TransformersModel)
    assert model.runtime["kernels"] == kernels
    return model


def answers(model: TransformersModel, town: Any) -> dict[str, Text]:
    """A prompt of the base and of every tenant, in one step. The interpreter is slow: of two tokens."""
    deltas = [model.load_delta(artifact).to(DEVICE) for artifact, _ in town.tenants.values()]
    slots = {name: slot for slot, name in enumerate(town.tenants)} | {"base": -1}
    texts = {name: Text(list(PROMPT), slot, [slot + 1]) for name, slot in slots.items()}
    texts["grown"].tokens[1] = model.vocab_size + 1  # its second own token
    advance(model, [(text, len(PROMPT)) for text in texts.values()], deltas)
    return texts


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_every_tenant_of_a_mixed_batch(towns: dict[str, Any], kind: str) -> None:
    town = towns[kind]
    found, wanted = (answers(load(town.base, kernels), town) for kernels in ("triton", "torch"))
    for name, text in found.items():
        assert relative_rms(text.stacked, wanted[name].stacked) < TOLERANCE, name
    assert torch.equal(found["base"].stacked, wanted["base"].stacked)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_every_tenant_with_its_weights_written_out(towns: dict[str, Any], kind: str) -> None:
    """Wherever they can be: the others' layers, and the head, stay packed in the same step."""
    town = towns[kind]
    model = load(town.base, "triton", materialize_tokens=len(PROMPT))
    writes = []
    original = model.scratch.write
    model.scratch.write = lambda *given: (writes.append(given[1]), original(*given))[1]
    found, wanted = answers(model, town), answers(load(town.base, "torch"), town)
    assert len(writes) > 7, "layers of several tenants"
    for name, text in found.items():
        assert relative_rms(text.stacked, wanted[name].stacked) < TOLERANCE, name
    assert model.scratch_bytes == sum(4 * rows * cols for rows, cols in model.scratch.matrices)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"kernels": "torch"}, "100: Triton's kernels do that"),
        ({"kernels": "triton", "quantization": "int8"}, "100: not on a quantised base"),
        ({"kernels": "triton", "materialize_tokens": "auto"}, "auto: .*needs a GPU"),
    ],
)
def test_written_weights_that_cannot_be_had_are_refused(tiny_base: Path, more: dict[str, Any], reason: str) -> None:
    given = {"materialize_tokens": 100, **more}
    with pytest.raises(BadRequest, match=f"--materialize-tokens {reason}"):
        load_model(Checkpoint.open(tiny_base), device=torch.device("cpu"), dtype=None, kv_slots=64, **given)


def test_resident_bytes_are_those_of_the_bundle(towns: dict[str, Any]) -> None:
    model = load(towns["tied"].base, "triton")
    for artifact, _ in towns["tied"].tenants.values():
        delta = model.load_delta(artifact)
        assert delta.bundle is not None
        overrides = sum(override.nbytes for override in delta.overrides.values())
        factors = sum(layer.nbytes for layer in delta.layers.values())
        assert delta.nbytes == delta.bundle.nbytes + overrides + factors


@pytest.fixture
def nothing_compiles() -> Iterator[None]:
    """Fails the test for whatever is compiled in it, but where deltas are loaded."""
    told: list[str] = []
    end = watch(told.append)
    yield
    end()
    assert not told, "a step waited for a compiler"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter compiles nothing")
@pytest.mark.parametrize("more", [{}, {"materialize_tokens": len(PROMPT)}])
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.usefixtures("nothing_compiles")
def test_no_step_waits_for_a_compiler(towns: dict[str, Any], kind: str, more: dict[str, int]) -> None:
    answers(load(towns[kind].base, "triton", torch.bfloat16, **more), towns[kind])


def test_a_model_without_kernels_that_compile_watches_nothing(towns: dict[str, Any]) -> None:
    load(towns["tied"].base, "torch").watch_compiles(pytest.fail)()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has Triton")
def test_triton_without_a_gpu_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BadRequest, match="--kernels triton: .*need a CUDA device, not cpu"):
        load(tiny_base, "triton")
