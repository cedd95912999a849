"""Everything that is wrong with an artifact is said, at once and by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.codecs.base import decode
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.restore import restore
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import ArtifactMismatch, ArtifactNotFinite, BaseMismatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def edited(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> Callable[..., Artifact]:
    """A sound artifact whose tensors and manifest were changed by a function."""

    def make(change: Any, codec: str = "delta-svd", **budget: Any) -> Artifact:
        return workshop.edited(workshop.compress(tiny_base, tiny_finetune, codec, **budget), change)

    return make


@pytest.fixture
def mismatch(workshop: Any, edited: Callable[..., Artifact], tiny_base: Path) -> Callable[..., str]:
    return lambda *args, **budget: workshop.mismatch(edited(*args, **budget), tiny_base)


def test_another_base_is_named_with_both_fingerprints(
    workshop: Any, tiny_base: Path, untied_base: Path, tiny_finetune: Path
) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune)
    ours, theirs = Checkpoint.open(untied_base), Checkpoint.open(tiny_base)
    with pytest.raises(BaseMismatch) as caught:
        check_against_base(artifact, ours)
    assert ours.fingerprint in caught.value.message and theirs.fingerprint in caught.value.message
    with pytest.raises(BaseMismatch):
        restore(ours, artifact, workshop.folder / "out")
    assert not (workshop.folder / "out").exists()


def test_every_kind_of_mismatch_is_listed_at_once(mismatch: Callable[..., str]) -> None:
    def change(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        del tensors[f"{Q_PROJ}#0.s"]
        tensors[f"{K_PROJ}#0.left.codes"] = tensors[f"{K_PROJ}#0.left.codes"][:-1].clone()
        tensors[f"{K_PROJ}#0.s"] = tensors[f"{K_PROJ}#0.s"].half()
        tensors["stowaway"] = torch.zeros(3)
        tensors[NORM] = tensors[NORM].float()
        layers, overrides = manifest["layers"], manifest["overrides"]
        layers["model.layers.9.mlp.up_proj.weight"] = layers[Q_PROJ]
        layers["model.layers.1.self_attn.q_proj.weight"]["shape"] = [64, 65]
        layers["model.layers.1.mlp.up_proj.weight"]["dtype"] = "I32"
        overrides["model.layers.0.nothing"] = overrides[NORM]
        overrides["model.layers.0.input_layernorm.weight"]["shape"] = [63]
        overrides["model.layers.1.self_attn.k_proj.weight"] = {"kind": "replace", "shape": [32, 64], "dtype": "BF16"}
        overrides["model.layers.1.input_layernorm.weight"]["dtype"] = "I64"
        manifest["added_tokens"][0]["id"] = 5000
        manifest["model_config_changes"]["vocab_size"] = 5000

    message = mismatch(change, rank=4)
    for line in (
        f"{Q_PROJ}#0.s: missing",
        f"{K_PROJ}#0.left.codes: shape (31, 4), expected (32, 4)",
        f"{K_PROJ}#0.s: type float16, expected float32",
        "stowaway: the manifest does not mention it",
        f"{NORM}: type float32, expected bfloat16",
        "model.layers.9.mlp.up_proj.weight: the base has no such tensor",
        "model.layers.1.self_attn.q_proj.weight: shape (64, 65), base has (64, 64)",
        "model.layers.1.self_attn.q_proj.weight#0: term of shape (64, 64), its layer needs (64, 65)",
        "model.layers.1.mlp.up_proj.weight: type I32, base has BF16",
        "model.layers.0.nothing: the base has no such tensor",
        "model.layers.0.input_layernorm.weight: shape (63,), base has (64,)",
        "model.layers.1.self_attn.k_proj.weight: both compressed and overridden",
        "model.layers.1.input_layernorm.weight: type I64, base has BF16",
        "added token '<|tool|>': id 5000",
        "vocab_size: 5000",
    ):
        assert f"  {line}" in message


def test_more_mismatches_than_fit_are_counted(mismatch: Callable[..., str]) -> None:
    message = mismatch(lambda tensors, _: tensors.update({f"x{i}": torch.zeros(1) for i in range(1030)}))
    assert message.startswith("1030 mismatches:") and message.endswith("… and 30 more")


def test_a_rank_over_the_smaller_side_is_refused(mismatch: Callable[..., str]) -> None:
    def change(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        term = manifest["layers"][K_PROJ]["terms"][0]
        term["left"]["cols"] = term["right"]["rows"] = 33
        tensors[f"{K_PROJ}#0.s"] = torch.ones(33)
        tensors[f"{K_PROJ}#0.left.codes"] = torch.ones(32, 33).bfloat16()
        tensors[f"{K_PROJ}#0.right.codes"] = torch.ones(33, 64).bfloat16()

    assert f"{K_PROJ}#0: rank 33 is over 32" in mismatch(change)


@pytest.mark.parametrize(("bits", "grid"), [(4, "sign"), (1, "int"), (1, "float"), (16, "int"), (32, "sign")])
def test_a_grid_without_such_codes_is_refused(mismatch: Callable[..., str], bits: int, grid: str) -> None:
    def change(_: object, manifest: dict[str, Any]) -> None:
        manifest["layers"][Q_PROJ]["terms"][0].update(bits=bits, grid=grid)

    assert f"grid '{grid}' has no {bits}-bit codes" in mismatch(change, "bitdelta")


@pytest.mark.parametrize(
    "rows", [[3, 3, 300, 301], [7, 3, 300, 301], [-1, 3, 300, 301], [3, 7, 300, 2**40], [3, 7, 300, 302]]
)
def test_row_numbers_out_of_order_or_range_are_refused(
    edited: Callable[..., Artifact], tiny_base: Path, tmp_path: Path, rows: list[int]
) -> None:
    size = Checkpoint.open(tiny_base).entries[EMBEDDING].shape[0]
    moved = [row + size - 300 if 300 <= row < 2**40 else row for row in rows]
    artifact = edited(lambda tensors, _: tensors.update({f"{EMBEDDING}#rows": torch.tensor(moved)}))
    check_against_base(artifact, Checkpoint.open(tiny_base))
    with pytest.raises(ArtifactMismatch, match="not ascending row numbers"):
        check_numbers(artifact, Checkpoint.open(tiny_base))
    with pytest.raises(ArtifactMismatch, match="not ascending row numbers"):
        restore(Checkpoint.open(tiny_base), artifact, tmp_path / "out")


def test_new_rows_that_are_not_stored_are_refused(edited: Callable[..., Artifact], tiny_base: Path) -> None:
    artifact = edited(lambda tensors, _: tensors.update({f"{EMBEDDING}#rows": torch.tensor([1, 3, 5, 7])}))
    with pytest.raises(ArtifactMismatch, match="are new, and not all of them are stored"):
        check_numbers(artifact, Checkpoint.open(tiny_base))


@pytest.mark.parametrize("name", [f"{Q_PROJ}#0.s", f"{K_PROJ}#0.left.codes", NORM, f"{EMBEDDING}#values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_all_named(
    edited: Callable[..., Artifact], tiny_base: Path, name: str, value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor], _: object) -> None:
        for bad in (name, "model.layers.1.input_layernorm.weight"):
            tensors[bad].view(-1)[0] = value

    artifact = edited(change)
    check_against_base(artifact, Checkpoint.open(tiny_base))
    with pytest.raises(ArtifactNotFinite) as caught:
        check_numbers(artifact, Checkpoint.open(tiny_base))
    assert name in caught.value.message and "model.layers.1.input_layernorm.weight" in caught.value.message


def test_a_scale_that_is_not_finite_is_named(edited: Callable[..., Artifact], tiny_base: Path) -> None:
    artifact = edited(lambda tensors, _: tensors[f"{Q_PROJ}#0.row"].fill_(float("nan")), "bitdelta")
    with pytest.raises(ArtifactNotFinite, match=f"{Q_PROJ}#0.row: 1 NaN"):
        check_numbers(artifact, Checkpoint.open(tiny_base))


def test_a_head_and_an_embedding_of_different_sizes_are_refused(mismatch: Callable[..., str], tiny_base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        size = Checkpoint.open(tiny_base).entries[EMBEDDING].shape[0]
        tensors["lm_head.weight"] = torch.zeros(size + 9, 64).bfloat16()
        manifest["overrides"]["lm_head.weight"] = {"kind": "replace", "shape": [size + 9, 64], "dtype": "BF16"}

    assert "lm_head.weight: " in mismatch(change)


def test_terms_with_tensors_of_every_kind_read_as_they_were_written(
    workshop: Any, tiny_base: Path, tiny_finetune: Path
) -> None:
    for codec, options, name in (
        ("dare", {"group": 8}, "codes"),
        ("bitdelta", {}, "row"),
        ("delta-svd", {"rank": 4}, "right.codes"),
    ):
        artifact = workshop.compress(tiny_base, tiny_finetune, codec, options=options)
        check_against_base(artifact, Checkpoint.open(tiny_base))
        assert f"{Q_PROJ}#0.{name}" in artifact.file.entries
        assert decode(artifact.terms(Q_PROJ)).shape == (64, 64)
