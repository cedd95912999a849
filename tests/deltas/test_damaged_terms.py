"""What the shapes cannot tell: the contents of a term are looked at before a kernel sees them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.restore import restore
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import ArtifactMismatch, ArtifactNotFinite
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Exact

from ..support.kinds import EveryKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Tensors = dict[str, Tensor]

ROWS, COLS = 12, 22


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., tuple[Artifact, Checkpoint]]:
    """An artifact of one matrix `w` and one kind of term, its tensors (by local name) and its spec changed."""

    def make(kind: str, change: Callable[[Tensors, dict[str, Any]], object]) -> tuple[Artifact, Checkpoint]:
        for name in ("base", "tuned"):
            generator = torch.Generator().manual_seed(len(name))
            save_file({"w": torch.randn(ROWS, COLS, generator=generator)}, tmp_path / f"{name}.safetensors")
        base, path = Checkpoint.open(tmp_path / "base.safetensors"), tmp_path / "delta.safetensors"
        tuned = Checkpoint.open(tmp_path / "tuned.safetensors")
        artifact = compress(base, tuned, EveryKind(kind), path, seed=7, packed=False)
        manifest = json.loads(artifact.file.metadata["deltaserve"])
        tensors = {name.removeprefix("w#0."): tensor for name, tensor in load_file(path).items()}
        change(tensors, manifest["layers"]["w"]["terms"][0])
        path.unlink()
        save_file({f"w#0.{name}": t for name, t in tensors.items()}, path, {"deltaserve": json.dumps(manifest)})
        return Artifact.open(path), base

    return make


def packed_places(tensors: Tensors, change: Callable[[Tensor], object]) -> None:
    places = layout.unpack(tensors["mask.places"], 2, 11)  # uint8 [ROWS, 11]: two of four columns, five times, and one
    change(places)
    tensors["mask.places"] = layout.pack(places, 2)


def matrix_of(value: float) -> Tensor:
    return torch.full((ROWS, COLS), value)


def put(tensors: Tensors, spec: dict[str, Any], stream: Tensor) -> None:
    """`stream` in place of an exact term's."""
    tensors["stream"] = stream
    spec["count"] = len(stream)


DAMAGES: dict[str, tuple[str, Callable[[Tensors, dict[str, Any]], object], str]] = {
    "a place past the last column": (
        "explicit",
        lambda t, _: packed_places(t, lambda places: places[3, 10:].fill_(3)),
        "w#0: mask: a place past the last of 22 columns",
    ),
    "a place that is taken twice": (
        "explicit",
        lambda t, _: packed_places(t, lambda places: places[3, :2].fill_(1)),
        "w#0: mask: the places of a row are not ascending",
    ),
    "places out of order": (
        "explicit",
        lambda t, _: packed_places(t, lambda places: places[3, :2].copy_(torch.tensor([2, 0]))),
        "w#0: mask: the places of a row are not ascending",
    ),
    "fewer patches than are present": (
        "patches",
        lambda t, _: t["present"].fill_(255),
        "w#0: 12 patches, but 18 are said to be present",
    ),
    "more patches than are present": (
        "patches",
        lambda t, _: t["present"].zero_(),
        "w#0: 12 patches, but 0 are said to be present",
    ),
    "patches of a wrapped term": (
        "rotated-patches",
        lambda t, _: t["term.present"].zero_(),
        "w#0: term: 12 patches, but 0 are said to be present",
    ),
    "blocks that hold fewer columns": (
        "placed",
        lambda t, _: t["present"].zero_(),
        "a term of 12 columns in blocks of",
    ),
    "blocks that hold more columns": (
        "placed-codebook",
        lambda t, _: t["present"].fill_(255),
        "w#0: a term of 12 columns in blocks of 22",
    ),
    "a column boosted twice": (
        "codebook-stages",
        lambda t, _: t["boosted"].fill_(3),
        "w#0: a column is boosted twice",
    ),
    "a column boosted that is not there": (
        "codebook-stages",
        lambda t, _: t["boosted"][0:1].fill_(COLS),
        "w#0: a boosted column that is not in 0 … 21",
    ),
    "a column boosted before the first": (
        "codebook-stages",
        lambda t, _: t["boosted"][0:1].fill_(-1),
        "w#0: a boosted column that is not in 0 … 21",
    ),
    "a stream cut off": (
        "exact",
        lambda t, spec: put(t, spec, t["stream"][:-9].clone()),
        "w#0: the stream is cut off, or too long",
    ),
    "bytes after a stream": (
        "exact",
        lambda t, spec: put(t, spec, torch.cat((t["stream"], torch.zeros(9, dtype=torch.uint8)))),
        "w#0: the stream is cut off, or too long",
    ),
    "a stream of noise": ("exact", lambda t, _: t["stream"].fill_(7), "w#0: the stream is damaged"),
    "a stream of another matrix": (
        "exact",
        lambda t, spec: put(t, spec, Exact.of(torch.randn(ROWS, COLS + 1)).stream),
        "w#0: the stream",
    ),
    "values that are no bfloat16": (
        "exact",
        lambda t, spec: put(t, spec, Exact.of(matrix_of(0.1)).stream),
        "w#0: value_bits 16, but the values are no bfloat16",
    ),
    "values that are not finite": (
        "exact",
        lambda t, spec: put(t, spec, Exact.of(matrix_of(float("nan"))).stream),
        "w#0: the stream holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize(("kind", "change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_contents_are_refused_by_name(
    damaged: Callable[..., tuple[Artifact, Checkpoint]], tmp_path: Path, kind: str, change: Any, message: str
) -> None:
    artifact, base = damaged(kind, change)
    check_against_base(artifact, base)
    with pytest.raises(ArtifactMismatch) as caught:
        check_numbers(artifact, base)
    assert message in caught.value.message
    with pytest.raises(ArtifactMismatch):
        restore(base, artifact, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("codebook", "row"),
        ("codebook-rows", "row"),
        ("codebook-stages", "gains"),
        ("patches", "scale"),
        ("placed", "term.row"),
        ("rotated", "term.row"),
        ("groups", "row"),
        ("table", "table"),
        ("several", "codes"),
        ("factors", "s"),
        ("factors", "right.col"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(
    damaged: Callable[..., tuple[Artifact, Checkpoint]], kind: str, name: str, value: float
) -> None:
    artifact, base = damaged(kind, lambda tensors, _: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(ArtifactNotFinite, match=f"w#0.{name}: 1 NaN|w#0.{name}: 0 NaN and 1 infinite"):
        check_numbers(artifact, base)


@pytest.mark.parametrize("kind", ["codebook", "patches", "placed", "rotated", "explicit", "groups", "exact"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(
    damaged: Callable[..., tuple[Artifact, Checkpoint]], kind: str
) -> None:
    name = {"placed": "term.codes", "rotated": "term.codes", "exact": "stream"}.get(kind, "codes")
    artifact, base = damaged(kind, lambda tensors, _: tensors.pop(name))
    with pytest.raises(ArtifactMismatch, match=f"w#0.{name}: missing"):
        check_against_base(artifact, base)
    artifact, base = damaged(kind, lambda tensors, _: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ArtifactMismatch, match=f"w#0.{name}: shape"):
        check_against_base(artifact, base)
