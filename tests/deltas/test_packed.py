"""A packed artifact is the named one in fewer bytes: the same tensors, terms, sizes in memory and restored weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import NAMED_BYTES, compress, write_artifact
from deltaserve.deltas.restore import restore
from deltaserve.deltas.tensorfile import TensorFileWriter
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import CodecError

from ..support.kinds import EveryKind, kinds

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.codecs.base import Codec

NORM = "model.norm.weight"
Pair = tuple[Artifact, Artifact]
MADE: dict[str, Codec] = {"every-kind": EveryKind(), "bitdelta": BitDelta(), "delta-svd": DeltaSvd(rank=3)}


@pytest.fixture(scope="module", params=MADE)
def pair(
    request: pytest.FixtureRequest, tiny_base: Path, tiny_finetune: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """The same artifact with named tensors, and packed."""
    folder = tmp_path_factory.mktemp("packed")
    base, tuned = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)

    def made(packed: bool) -> Artifact:
        out = folder / f"{packed}.safetensors"
        return compress(base, tuned, MADE[request.param], out, seed=7, vector_bits=3, packed=packed)

    return made(False), made(True)


def test_every_tensor_is_the_same(pair: Pair) -> None:
    named, packed = pair
    assert not named.manifest.packed and packed.manifest.packed
    assert packed.manifest.model_copy(update={"packed": False}) == named.manifest
    assert packed.entries.keys() == named.entries.keys() == named.file.entries.keys()
    for name, entry in named.entries.items():
        assert (packed.entries[name].shape, packed.entries[name].dtype) == (entry.shape, entry.dtype)
        assert packed.entries[name].start % entry.dtype.itemsize == 0, "not aligned"
        assert torch.equal(packed.read(name), named.read(name))


def test_every_term_and_override_is_the_same(pair: Pair, tiny_base: Path) -> None:
    named, packed = pair
    for artifact in pair:
        check_against_base(artifact, Checkpoint.open(tiny_base))
        check_numbers(artifact, Checkpoint.open(tiny_base))
    for name in named.manifest.layers:
        for ours, theirs in zip(packed.terms(name), named.terms(name), strict=True):
            assert torch.equal(ours.decode(), theirs.decode())
    for name in named.manifest.overrides:
        assert torch.equal(packed.override(name).values, named.override(name).values)


def test_sizes_count_every_byte(pair: Pair) -> None:
    named, packed = pair
    assert packed.file.num_bytes == packed.file.path.stat().st_size
    assert sum(entry.nbytes for entry in packed.entries.values()) == packed.file.entries["packed"].nbytes
    assert packed.file.num_bytes < named.file.num_bytes
    assert packed.resident_bytes == named.resident_bytes
    assert packed.covered_parameters == named.covered_parameters
    assert packed.bits_per_parameter == packed.file.num_bytes * 8 / packed.covered_parameters


def test_the_same_inputs_give_the_same_bytes(
    pair: Pair, tiny_base: Path, tiny_finetune: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    codec = MADE[request.node.callspec.params["pair"]]
    base, tuned = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    compress(base, tuned, codec, tmp_path / "again", seed=7, vector_bits=3, packed=True)
    assert (tmp_path / "again").read_bytes() == pair[1].file.path.read_bytes()


def test_a_packed_artifact_restores_what_the_named_one_restores(pair: Pair, tiny_base: Path, tmp_path: Path) -> None:
    restored = []
    for index, artifact in enumerate(pair):
        restore(Checkpoint.open(tiny_base), artifact, tmp_path / str(index), dtype=torch.float32)
        restored.append(load_file(tmp_path / str(index) / "model.safetensors"))
    assert restored[0].keys() == restored[1].keys()
    assert all(torch.equal(tensor, restored[1][name]) for name, tensor in restored[0].items())


def test_a_packed_artifact_is_a_safetensors_file_for_everyone(pair: Pair) -> None:
    with safe_open(pair[1].file.path, "pt") as theirs:
        assert list(theirs.keys()) == ["packed"]
        assert theirs.get_tensor("packed").numel() == pair[1].file.entries["packed"].nbytes


def test_a_writer_that_does_not_align_is_read_too(pair: Pair, files: Any, tmp_path: Path) -> None:
    header, data = files.split(pair[1].file.path.read_bytes())
    for padding in range(4):
        moved = files.join({**header, "__metadata__": {**header["__metadata__"], "x": "x" * padding}}, data)
        (tmp_path / "moved").write_bytes(moved)
        artifact = Artifact.open(tmp_path / "moved")
        assert all(torch.equal(artifact.read(name), pair[0].read(name)) for name in pair[0].entries)


def test_it_is_packed_where_names_matter(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    base, tuned = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    small = compress(base, tuned, BitDelta(), tmp_path / "small")
    assert small.manifest.packed and small.file.num_bytes < NAMED_BYTES * len(small.entries)


def test_large_tensors_keep_their_names(workshop: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (8, NAMED_BYTES)  # a byte for each column of a one-bit delta
    base, tuned = (
        workshop.save(f"{name}.safetensors", {"w": torch.randn(shape, generator=generator)}) for name in ("a", "b")
    )
    checkpoints = Checkpoint.open(base), Checkpoint.open(tuned)
    large = compress(*checkpoints, EveryKind("exact"), workshop.folder / "large")
    assert not large.manifest.packed
    assert "w#0.stream" in large.file.entries


def test_what_has_no_canonical_types_is_not_packed(workshop: Any, tiny_base: Path, tiny_finetune: Path) -> None:
    artifact = workshop.compress(tiny_base, tiny_finetune)
    writer = TensorFileWriter(workshop.folder)
    for name in artifact.entries:
        tensor = artifact.read(name)
        writer.add(name, tensor.half() if name == f"{next(iter(artifact.manifest.layers))}#0.row" else tensor)
    out = workshop.folder / "other"
    write_artifact(out, artifact.manifest, writer)
    assert not Artifact.open(out).manifest.packed
    with pytest.raises(CodecError, match="cannot be packed"):
        write_artifact(out, artifact.manifest, writer, packed=True)
    writer.close()


def test_an_artifact_of_nothing_packs_too(workshop: Any, tiny_base: Path) -> None:
    same = Checkpoint.open(tiny_base)
    artifact = compress(same, same, BitDelta(), workshop.folder / "same", packed=True)
    assert artifact.manifest.packed and not artifact.entries and artifact.resident_bytes == 0
    check_against_base(artifact, same)


@pytest.mark.parametrize("kind", kinds(64, 64))
def test_every_kind_alone_survives_the_file(tiny_base: Path, tiny_finetune: Path, tmp_path: Path, kind: str) -> None:
    codec = EveryKind(kind)
    base = Checkpoint.open(tiny_base)
    artifact = compress(base, Checkpoint.open(tiny_finetune), codec, tmp_path / "delta", seed=7)
    check_against_base(artifact, base)
    check_numbers(artifact, base)
    name = "model.layers.0.mlp.up_proj.weight"
    (term,) = artifact.terms(name)
    (spec,) = artifact.manifest.layers[name].terms
    assert {local: tensor.shape for local, tensor in term.tensors().items()} == {
        local: torch.Size(shape) for local, (shape, _) in spec.layout().items()
    }
    assert term.serving().nbytes == sum(tensor.nbytes for tensor in term.tensors().values()) + spec.derived_bytes()
