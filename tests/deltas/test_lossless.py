"""lossless, from checkpoint to checkpoint: the fine-tune's bits, whatever the base's are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaserve.codecs.lossless import Lossless
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.restore import restore
from deltaserve.errors import CheckpointError, CodecError

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.deltas.artifact import Artifact

FINITE = st.integers(0, 2**16 - 1).filter(lambda bits: bits >> 7 & 0xFF != 0xFF)  # bfloat16 that are numbers


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def numbers(patterns: list[int]) -> Tensor:
    """bfloat16 [1, n] of these bit patterns."""
    return torch.tensor([[p - 2**16 if p >= 2**15 else p for p in patterns]], dtype=torch.int16).view(torch.bfloat16)


def there_and_back(
    folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor]
) -> tuple[Artifact, dict[str, Tensor]]:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    checkpoint = Checkpoint.open(folder / "base.safetensors")
    artifact = compress(checkpoint, Checkpoint.open(folder / "tuned.safetensors"), Lossless(), folder / "delta")
    out = folder / "out"
    for path in out.glob("*"):
        path.unlink()
    restore(checkpoint, artifact, out)
    return artifact, load_file(out / "model.safetensors")


def normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=6))
def test_any_bfloat16_over_any_other_comes_back(folder: Path, pairs: list[tuple[int, int]]) -> None:
    """Zeros of both signs, subnormals and the largest numbers among them."""
    before, after = numbers([b for b, _ in pairs]), numbers([a for _, a in pairs])
    _, restored = there_and_back(folder, {"w": before}, {"w": after})
    assert bits(restored["w"]) == bits(after)


@pytest.mark.parametrize(
    "before, after, shift",
    [
        (1.0, 1.5, 0.0),
        (1.0, 2.0**-9, 0.0),
        (2.0**-100, 1.0, 0.0),
        (-3e38, 3e38, -1.0),  # their difference is no float32
        (1.0, 2.0**-30, -1.0),  # a difference of 1 forgets it
        (1.0, 0.0, 0.0),
        (1.0, -0.0, -1.0),
        (0.0, -0.0, -1.0),
        (-0.0, 0.0, 0.0),
        (0.0, 1e-40, 0.0),
    ],
)
def test_a_layer_whose_difference_forgets_an_entry_travels_as_it_is(
    tmp_path: Path, before: float, after: float, shift: float
) -> None:
    base = {"w": torch.tensor([[before, 1.0]]).bfloat16(), "v": normal(1, torch.bfloat16, 4, 4)}
    tuned = {"w": torch.tensor([[after, 2.0]]).bfloat16(), "v": 2 * base["v"]}
    artifact, restored = there_and_back(tmp_path, base, tuned)
    assert {name: bits(tensor) for name, tensor in restored.items()} == {n: bits(t) for n, t in tuned.items()}
    assert {name: spec.base_shift for name, spec in artifact.manifest.layers.items()} == {"w": shift, "v": 0.0}


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base_kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_may_differ_and_norms_and_embeddings_come_along(
    tmp_path: Path, base_kind: torch.dtype, kind: torch.dtype
) -> None:
    shapes = {"layers.0.w": (9, 31), "norm.weight": (31,), "embed_tokens.weight": (6, 31)}
    base = {name: normal(1, base_kind, *shape) for name, shape in shapes.items()}
    tuned = {name: (base[name].float() + 0.01 * normal(2, torch.float32, *s)).to(kind) for name, s in shapes.items()}
    tuned["norm.weight"][3] = tuned["embed_tokens.weight"][2, 3] = -0.0
    base["norm.weight"][3] = base["embed_tokens.weight"][2, 3] = 0.0
    _, restored = there_and_back(tmp_path, base, tuned)
    assert {name: (t.dtype, bits(t)) for name, t in restored.items()} == {
        n: (t.dtype, bits(t)) for n, t in tuned.items()
    }


def test_a_zero_that_changed_its_sign_alone_is_a_change(tmp_path: Path) -> None:
    base = {"w": torch.zeros(2, 3), "wte.weight": torch.zeros(40, 3)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w"][1, 2] = tuned["wte.weight"][7, 1] = -0.0
    artifact, restored = there_and_back(tmp_path, base, tuned)
    assert {name: bits(tensor) for name, tensor in restored.items()} == {n: bits(t) for n, t in tuned.items()}
    assert artifact.manifest.overrides["wte.weight"].num_rows == 1


def test_what_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="w: lossless holds float32, and its F64 numbers need more"):
        there_and_back(tmp_path, {"w": torch.ones(1, 2)}, {"w": torch.tensor([[1 / 3, 1.0]], dtype=torch.float64)})


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="w: 1 NaN"):
        there_and_back(tmp_path, {"w": torch.ones(1, 2)}, {"w": torch.tensor([[torch.nan, 1.0]])})


def test_coded_norms_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1, 2)}, tmp_path / "one.safetensors")
    one = Checkpoint.open(tmp_path / "one.safetensors")
    with pytest.raises(CodecError, match="lossless: vector bits 8"):
        compress(one, one, Lossless(), tmp_path / "delta", vector_bits=8)
