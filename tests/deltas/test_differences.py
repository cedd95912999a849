"""Norms and biases as coded differences: small on disk, close to the fine-tune, and for vectors alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import code_vector, compress
from deltaserve.deltas.resident import ResidentDelta
from deltaserve.deltas.restore import restore
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import ArtifactNotFinite, CodecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
EMBEDDING = "model.embed_tokens.weight"


def test_two_bits_by_hand() -> None:
    """Levels −3, −1, 1, 3 of a quarter of the peak; the scale makes ⟨v, v̂⟩ = ‖v‖²."""
    term = code_vector(torch.tensor([4.0, 1.0, -4.0, -2.5]), 2)
    # in quarters of the peak: 4, 1, −4, −2.5 → levels 3, 1, −3, −3;  ‖v‖² = 39.25, ⟨v, levels⟩ = 32.5
    torch.testing.assert_close(term.decode(), torch.tensor([[3.0, 1.0, -3.0, -3.0]]) * 39.25 / 32.5)
    assert term.tensors().keys() == {"codes", "row"} and term.codes.shape == (1, 1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale", [1e-40, 1e-8, 1.0, 1e30])
def test_a_coded_vector_is_unbiased_at_any_scale(bits: int, scale: float) -> None:
    vector = scale * torch.randn(576, generator=torch.Generator().manual_seed(bits))
    decoded = code_vector(vector, bits).decode()[0]
    assert decoded.isfinite().all()
    v, w = vector.double(), decoded.double()
    assert float(v @ w / (v @ v)) == pytest.approx(1, abs=1e-3 if scale < 1e-30 else 1e-5)


def worst(bits: int) -> float:
    """‖v − v̂‖ / ‖v‖ of a Gaussian vector: steps of 2^(1 − bits) of a peak of some four standard deviations."""
    return 3.2 / 2**bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_halves_with_every_bit(bits: int) -> None:
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    decoded = code_vector(vector, bits).decode()[0]
    assert float((vector - decoded).norm() / vector.norm()) < worst(bits)


@pytest.mark.parametrize("vector", [[0.0] * 9, [0.0], [3.0], [-1e-45]])
def test_vectors_of_nothing_and_of_one(vector: list[float]) -> None:
    wanted = torch.tensor(vector)
    decoded = code_vector(wanted, 3).decode()[0]
    torch.testing.assert_close(decoded, wanted, rtol=1e-6, atol=2e-45)


@pytest.fixture
def tuned(make_finetune: Callable[..., Path], untied_base: Path, tmp_path: Path) -> Path:
    return make_finetune(untied_base, tmp_path / "tuned", scale=0.02, seed=3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_norms_and_biases_come_back_close(untied_base: Path, tuned: Path, tmp_path: Path, bits: int) -> None:
    base = Checkpoint.open(untied_base)
    artifact = compress(base, Checkpoint.open(tuned), BitDelta(), tmp_path / "delta", vector_bits=bits)
    check_against_base(artifact, base)
    check_numbers(artifact, base)
    restore(base, artifact, tmp_path / "out", dtype=torch.float32)
    before, after, restored = (
        load_file(folder / "model.safetensors") for folder in (untied_base, tuned, tmp_path / "out")
    )
    vectors = [name for name, tensor in after.items() if tensor.dim() == 1]
    assert {NORM, BIAS} < set(vectors)
    for name in vectors:
        spec = artifact.manifest.overrides[name]
        assert spec.kind == "add" and spec.coded is not None and spec.coded.bits == bits
        difference = after[name].float() - before[name].float()
        error = (restored[name] - after[name].float()).norm() / difference.norm()
        assert float(error) < worst(bits)


def test_what_is_restored_is_what_is_served(untied_base: Path, tuned: Path, tmp_path: Path) -> None:
    """In float32 without rounding, in the fine-tune's type rounded once."""
    base = Checkpoint.open(untied_base)
    artifact = compress(base, Checkpoint.open(tuned), BitDelta(), tmp_path / "delta", vector_bits=3)
    delta = ResidentDelta.load(artifact)
    for dtype in (torch.float32, None):
        restore(base, artifact, tmp_path / str(dtype), dtype=dtype)
        restored = load_file(tmp_path / str(dtype) / "model.safetensors")
        for name in (NORM, BIAS):
            served = delta.overrides[name].apply(base.tensor(name))
            assert served.dtype == torch.float32 and restored[name].dtype == (dtype or torch.bfloat16)
            assert torch.equal(restored[name], served.to(dtype or torch.bfloat16))


def test_a_difference_takes_its_bits_on_disk_and_floats_in_memory(
    untied_base: Path, tuned: Path, tmp_path: Path
) -> None:
    checkpoints = Checkpoint.open(untied_base), Checkpoint.open(tuned)
    exact = compress(*checkpoints, BitDelta(), tmp_path / "exact")
    coded = compress(*checkpoints, BitDelta(), tmp_path / "coded", vector_bits=4)
    sizes = [spec.shape[0] for spec in coded.manifest.overrides.values() if spec.kind == "add"]
    on_disk = [sum(entry.nbytes for entry in made.entries.values()) for made in (exact, coded)]
    assert on_disk[0] - on_disk[1] == sum(2 * size - (size // 2 + 4) for size in sizes)
    assert coded.resident_bytes - exact.resident_bytes == sum((4 - 2) * size for size in sizes)


@pytest.mark.parametrize("bits", [0, 9, 15, 17, 32])
def test_other_widths_are_refused(tiny_base: Path, tmp_path: Path, bits: int) -> None:
    base = Checkpoint.open(tiny_base)
    with pytest.raises(CodecError, match=f"vector bits {bits}: not 1 … 8 or 16"):
        compress(base, base, BitDelta(), tmp_path / "delta", vector_bits=bits)


@pytest.fixture
def edited(workshop: Any, untied_base: Path, tuned: Path, tmp_path: Path) -> Callable[[Any], Artifact]:
    """A sound artifact with differences whose tensors and manifest were changed by a function."""

    def make(change: Any) -> Artifact:
        base, finetuned = Checkpoint.open(untied_base), Checkpoint.open(tuned)
        artifact = compress(base, finetuned, BitDelta(), tmp_path / "edited", vector_bits=4, packed=False)
        return workshop.edited(artifact, lambda tensors, manifest: change(tensors, manifest["overrides"]))

    return make


@pytest.fixture
def mismatch(workshop: Any, edited: Callable[[Any], Artifact], untied_base: Path) -> Callable[[Any], str]:
    return lambda change: workshop.mismatch(edited(change), untied_base)


def test_a_matrix_has_no_difference(mismatch: Callable[[Any], str], untied_base: Path) -> None:
    shape = Checkpoint.open(untied_base).entries[EMBEDDING].shape

    def change(_: object, overrides: dict[str, Any]) -> None:
        overrides[EMBEDDING] = {**overrides[NORM], "shape": list(shape)}

    assert f"only a vector is overridden by a difference, not {shape}" in mismatch(change)


def test_a_difference_of_another_size_is_refused(mismatch: Callable[[Any], str]) -> None:
    message = mismatch(lambda _, overrides: overrides[NORM]["coded"].update(cols=63))
    assert f"{NORM}#difference: term of shape (1, 63), its layer needs (1, 64)" in message


def test_a_difference_under_a_mask_is_refused(mismatch: Callable[[Any], str]) -> None:
    mask = {"kind": "seeded", "group": 8}
    message = mismatch(lambda _, overrides: overrides[BIAS]["coded"].update(mask=mask))
    assert f"{BIAS}: a difference has no mask" in message


def test_a_difference_without_its_codes_is_refused(mismatch: Callable[[Any], str]) -> None:
    message = mismatch(lambda tensors, _: tensors.pop(f"{NORM}#difference.codes"))
    assert f"{NORM}#difference.codes: missing" in message


def test_a_difference_of_integers_is_refused(mismatch: Callable[[Any], str]) -> None:
    message = mismatch(lambda _, overrides: overrides[NORM].update(dtype="I64"))
    assert f"{NORM}: type I64, base has BF16" in message


def test_a_scale_that_is_not_finite_is_named(edited: Callable[[Any], Artifact], untied_base: Path) -> None:
    name = f"{NORM}#difference.row"
    artifact = edited(lambda tensors, _: tensors.update({name: torch.tensor(float("inf"))}))
    with pytest.raises(ArtifactNotFinite, match=name):
        check_numbers(artifact, Checkpoint.open(untied_base))
