"""Attacks by the header of an uploaded file. Opening it raises an error of ours, promptly."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from deltaserve.deltas.tensorfile import MAX_HEADER_BYTES
from deltaserve.errors import ArtifactCorrupt, ArtifactError

from .target import MATRIX, NORM, Target, with_header


def test_the_sound_artifact_passes(target: Target) -> None:
    assert set(target.receive(target.sound).manifest.layers) == {MATRIX}


def test_a_file_cut_off_anywhere_is_corrupt(target: Target) -> None:
    """Threat: a partial upload is read past its end."""
    end_of_header = 8 + target.header_bytes
    total = len(target.sound)
    within_data = range(end_of_header, total, 1 + (total - end_of_header) // 200)
    cuts = {0, 1, 7, 8, 9, 10, end_of_header // 2, end_of_header - 1, *within_data, total - 1}
    for cut in cuts:
        with pytest.raises(ArtifactCorrupt):
            target.receive(target.sound[:cut])


def test_bytes_after_the_end_are_corrupt(target: Target) -> None:
    """Threat: a second file hidden behind the first."""
    with pytest.raises(ArtifactCorrupt, match="cut off or padded"):
        target.receive(target.sound + b"\0")


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_header_length_bomb_allocates_nothing(one_target: Target, length: int) -> None:
    """Threat: eight bytes make the server reserve exabytes."""
    with pytest.raises(ArtifactCorrupt, match="header length"):
        one_target.receive(struct.pack("<Q", length) + one_target.sound[8:])


@pytest.mark.parametrize(
    "header",
    [
        b"{}}",
        b"[]",
        b"null",
        b'"x"',
        b'{"a":',
        b"\xff\xfe{}",
        b'{"\xff":1}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":NaN}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"deltaserve":1}}',
        b'{"__metadata__":{"deltaserve":{"a":"b"}}}',
    ],
)
def test_a_header_that_is_no_plain_json_object_is_corrupt(one_target: Target, header: bytes) -> None:
    """Threat: parsers that guess encodings, read NaN, or convert huge numbers in quadratic time."""
    with pytest.raises(ArtifactCorrupt):
        one_target.receive(with_header(header))


def test_something_named_twice_is_corrupt(one_target: Target) -> None:
    """Threat: two readers see different tensors under one name."""
    twice = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    inner = b'{"a":{"dtype":"U8","shape":[1],"shape":[0],"data_offsets":[0,0]}}'
    for header in (twice, inner):
        with pytest.raises(ArtifactCorrupt, match="twice"):
            one_target.receive(with_header(header, b"x"))


@pytest.mark.parametrize(
    "offsets",
    [
        [[0, 4], [0, 4]],  # the same bytes
        [[0, 4], [2, 6]],  # overlap
        [[0, 4], [5, 9]],  # hole
        [[4, 8], [8, 12]],  # hole at the start
        [[0, 4], [8, 4]],  # backwards
        [[0, 4], [-4, 0]],
        [[0, 4], [4, 2**47]],
        [[0, 4], [4, 2**64]],
        [[0, 4], [4]],
        [[0, 4], [4, 8, 12]],
        [[0, 4], [4.0, 8.0]],
        [[0, 4], ["4", "8"]],
        [[0, 4], [False, True]],
        [[0, 4], None],
        [[0, 4], {"start": 4}],
    ],
)
def test_offsets_that_do_not_tile_the_file_are_corrupt(one_target: Target, offsets: list[Any]) -> None:
    """Threat: tensors over one another, over the header, or over memory that is not the file's."""
    header = {f"t{i}": {"dtype": "U8", "shape": [4], "data_offsets": pair} for i, pair in enumerate(offsets)}
    with pytest.raises(ArtifactCorrupt):
        one_target.receive(with_header(json.dumps(header).encode(), bytes(8)))


@pytest.mark.parametrize(
    "shape",
    [
        [-1],
        [-2, -2],
        [2**48],
        [2**64],
        [2**32, 2**32],
        [2**47] * 8,
        [1] * 9,
        [1] * 100_000,
        [4.0],
        [True, 4],
        ["4"],
        [[4]],
        [None],
        4,
        None,
        {"0": 4},
        [5],
        [],
    ],
)
def test_a_shape_that_is_not_the_data_is_corrupt(one_target: Target, shape: object) -> None:
    """Threat: products that overflow, sizes that are no counts, buffers larger than the file."""
    header = {"t": {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}}
    with pytest.raises(ArtifactCorrupt) as caught:
        one_target.receive(with_header(json.dumps(header).encode(), bytes(4)))
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("dtype", ["F8_E4M3", "f32", "object", "", None, 1, ["F32"], {"F32": 1}, "U64", "O" * 10**6])
def test_an_unknown_dtype_is_corrupt(one_target: Target, dtype: object) -> None:
    """Threat: a type that the reader would make up, or that is no name at all."""
    header = {"t": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}
    with pytest.raises(ArtifactCorrupt, match="dtype") as caught:
        one_target.receive(with_header(json.dumps(header).encode(), bytes(4)))
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("dtype", ["F64", "F16", "U8", "BOOL"])
def test_a_wrong_byte_count_is_corrupt(one_target: Target, dtype: str) -> None:
    """Threat: four bytes read as eight."""
    header = {"t": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}
    with pytest.raises(ArtifactCorrupt, match="does not take 4 bytes"):
        one_target.receive(with_header(json.dumps(header).encode(), bytes(4)))


@pytest.mark.parametrize("fields", [{}, [], 1, "x", None, {"dtype": "U8", "shape": [4]}])
def test_an_entry_without_its_fields_is_corrupt(one_target: Target, fields: object) -> None:
    """Threat: a reader that takes defaults, or that skips what it does not know."""
    with pytest.raises(ArtifactCorrupt):
        one_target.receive(with_header(json.dumps({"t": fields}).encode(), bytes(4)))
    extra = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], "compressed": "gzip"}
    with pytest.raises(ArtifactCorrupt, match="exactly"):
        one_target.receive(with_header(json.dumps({"t": extra}).encode(), bytes(4)))


@pytest.mark.parametrize("depth", [500, 100_000])
def test_json_nested_too_deep_is_refused(one_target: Target, depth: int) -> None:
    """Threat: a stack overflow in the parser of the header or of the manifest."""
    with pytest.raises(ArtifactCorrupt):
        one_target.receive(with_header(b'{"a":' + b"[" * depth + b"]" * depth + b"}"))
    nested = json.dumps({"__metadata__": {"deltaserve": '{"config":' + "[" * depth + "]" * depth + "}"}})
    with pytest.raises(ArtifactError):
        one_target.receive(with_header(nested.encode()))


@pytest.mark.parametrize("name", ["a\0b", "a\nlevel=CRITICAL", "\x1b[2J", "\ud800", "\u202egnp", "x" * 10_000])
def test_a_tensor_name_that_is_no_plain_text_is_corrupt(one_target: Target, name: str) -> None:
    """Threat: forged log lines, terminal escapes, replies that cannot be encoded."""
    with pytest.raises(ArtifactCorrupt, match="printable") as caught:
        one_target.receive(one_target.edited(lambda header, _: header.update({name: header.pop(NORM)})))
    assert len(caught.value.message.encode()) < 500 and "\n" not in caught.value.message
