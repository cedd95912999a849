"""Attacks by the packed form: one tensor whose inner places only the manifest knows, and a compressed manifest."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.artifact import MAX_MANIFEST_BYTES, deflated
from deltaserve.errors import ArtifactError, ArtifactMismatch

from .target import MATRIX, NORM, Target, with_header

if TYPE_CHECKING:
    from collections.abc import Callable

ENTRY = "packed"


def with_manifest(target: Target, text: str) -> bytes:
    header, _ = target.parts()
    header["__metadata__"]["deltaserve"] = text
    return with_header(json.dumps(header).encode(), target.data)


def resized(target: Target, data: bytes, **fields: Any) -> bytes:
    header, _ = target.parts()
    header[ENTRY] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)], **fields}
    return with_header(json.dumps(header).encode(), data)


def test_the_sound_artifact_passes(packed_target: Target) -> None:
    artifact = packed_target.receive(packed_target.sound)
    assert list(artifact.file.entries) == [ENTRY]
    assert artifact.manifest.overrides[NORM].kind == "add"


@pytest.mark.parametrize("change", [-1, 1, -8, 4096])
def test_bytes_that_the_manifest_does_not_describe_are_refused(packed_target: Target, change: int) -> None:
    """Threat: tensors read past the end, or bytes smuggled in behind them."""
    data = packed_target.data
    with pytest.raises(ArtifactError, match="packed bytes, its manifest describes"):
        packed_target.receive(resized(packed_target, data[:change] if change < 0 else data + bytes(change)))


def test_nothing_at_all_is_refused(packed_target: Target) -> None:
    """Threat: a manifest that describes a model, and no data."""
    with pytest.raises(ArtifactError, match="0 packed bytes"):
        packed_target.receive(resized(packed_target, b""))


@pytest.mark.parametrize("fields", [{"dtype": "I8"}, {"dtype": "BOOL"}, {"shape": None}, {"shape": []}])
def test_a_container_of_another_type_or_shape_is_refused(packed_target: Target, fields: dict[str, Any]) -> None:
    """Threat: bytes that a reader takes for something else."""
    data = packed_target.data if fields.get("shape") != [] else b"x"
    if fields == {"shape": None}:
        fields = {"shape": [1, len(data)]}
    with pytest.raises(ArtifactError, match="one tensor, packed, of bytes"):
        packed_target.receive(resized(packed_target, data, **fields))


@pytest.mark.parametrize("name", ["extra", f"{MATRIX}#0.codes", NORM])
def test_a_tensor_beside_the_packed_one_is_refused(packed_target: Target, name: str) -> None:
    """Threat: two tensors under one name."""

    def add(header: dict[str, Any], _: object) -> None:
        end = len(packed_target.data)
        header[name] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}

    with pytest.raises(ArtifactError, match="one tensor, packed, of bytes"):
        packed_target.receive(packed_target.edited(add))


def test_a_packed_tensor_of_another_name_is_refused(packed_target: Target) -> None:
    """Threat: a container that only some readers find."""
    with pytest.raises(ArtifactError, match="one tensor, packed, of bytes"):
        packed_target.receive(packed_target.edited(lambda header, _: header.update(packing=header.pop(ENTRY))))


def test_a_manifest_and_a_file_of_different_forms_are_refused(packed_target: Target, one_target: Target) -> None:
    """Threat: a file that is sound to one reader and another one's overrun."""
    with pytest.raises(ArtifactError, match="one tensor, packed, of bytes"):
        one_target.receive(one_target.edited(lambda _, manifest: manifest.update(packed=True)))
    with pytest.raises(ArtifactMismatch, match="packed: the manifest does not mention it"):
        packed_target.receive(packed_target.edited(lambda _, manifest: manifest.update(packed=False)))


def test_a_manifest_that_inflates_without_end_allocates_no_more_than_the_limit(packed_target: Target) -> None:
    """Threat: a megabyte that stands for a gigabyte."""
    zeros, packer = bytes(2**20), zlib.compressobj(9)
    first, second = (packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    bomb = base64.b64encode(first + 1023 * second).decode()
    assert len(bomb) < 2**21
    raw = with_manifest(packed_target, bomb)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=f"over {MAX_MANIFEST_BYTES} bytes") as caught:
            packed_target.receive(raw)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()
    assert len(caught.value.message) < 500


def test_a_manifest_of_the_longest_length_is_read_and_one_more_is_not(packed_target: Target) -> None:
    """Threat: a limit that is off by one."""
    text = json.dumps(packed_target.parts()[1])
    longest = text + " " * (MAX_MANIFEST_BYTES - len(text))
    packed_target.receive(with_manifest(packed_target, deflated(longest)))
    with pytest.raises(ArtifactError, match=f"over {MAX_MANIFEST_BYTES} bytes"):
        packed_target.receive(with_manifest(packed_target, deflated(longest + " ")))


DAMAGED: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut anywhere": lambda text: text[: len(text) // 2],
    "cut by a byte": lambda text: text[:-1],
    "cut by a group": lambda text: text[:-4],
    "more base64 behind": lambda text: text + "AAAA",
    "a byte behind the stream": lambda text: base64.b64encode(base64.b64decode(text) + b"x").decode(),
    "a second stream": lambda text: base64.b64encode(2 * base64.b64decode(text)).decode(),
    "white space": lambda text: text[:8] + "\n" + text[8:],
    "no base64": lambda text: "\u20ac" + text,
    "no zlib": lambda text: base64.b64encode(b"x" * 99).decode(),
    "a checksum of another": lambda text: base64.b64encode(base64.b64decode(text)[:-1] + b"\0").decode(),
    "no text": lambda text: base64.b64encode(zlib.compress(b"\xff\xfe{}")).decode(),
    "no JSON": lambda text: deflated("pickle"),
    "twice": lambda text: deflated(text),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_manifest_is_refused(packed_target: Target, damage: Callable[[str], str]) -> None:
    """Threat: a parser that reads what it can and guesses the rest."""
    text: str = packed_target.parts()[0]["__metadata__"]["deltaserve"]
    with pytest.raises(ArtifactError, match="manifest") as caught:
        packed_target.receive(with_manifest(packed_target, damage(text)))
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("dtype", ["F7", "F8_E4M3", "f32", "", "F32\0"])
def test_a_type_that_does_not_exist_is_refused(packed_target: Target, dtype: str) -> None:
    """Threat: sizes of types that the reader would make up."""
    raw = packed_target.edited(lambda _, manifest: manifest["overrides"][NORM].update(kind="replace", dtype=dtype))
    with pytest.raises(ArtifactError, match="manifest: overrides"):
        packed_target.receive(raw)


@pytest.mark.parametrize("size", [2**20, 2**40, 2**47])
def test_sizes_without_data_are_refused(packed_target: Target, size: int) -> None:
    """Threat: numbers in the manifest that become memory before they are compared with the file."""

    def change(_: object, manifest: dict[str, Any]) -> None:
        for spec in manifest["layers"][MATRIX]["terms"]:
            spec.update({name: size for name in ("rows", "cols") if name in spec})
        manifest["layers"][MATRIX]["shape"] = [size, size]

    with pytest.raises(ArtifactError):
        packed_target.receive(packed_target.edited(change))


def test_a_size_that_moves_the_others_is_refused(packed_target: Target) -> None:
    """Threat: one spec grows, another shrinks, the sum is right and every tensor is another's."""

    def change(_: object, manifest: dict[str, Any]) -> None:
        one, other = (
            next(spec for spec in manifest["layers"][MATRIX]["terms"] if spec["kind"] == kind)
            for kind in ("exact", "patches")
        )
        other["count"] += 1
        one["count"] -= 6 + 2  # 4 × 4 codes of 3 bits, and their scale

    with pytest.raises(ArtifactError):
        packed_target.receive(packed_target.edited(change))
