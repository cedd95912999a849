"""Attacks by terms that are small in a file and huge in memory: refused before any tensor is read.

Every file here is consistent: it holds exactly the tensors that its manifest describes, in the packed form.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.artifact import Artifact, deflated
from deltaserve.deltas.manifest import Manifest
from deltaserve.errors import ArtifactError, ArtifactMismatch, ArtifactTooLarge

from .target import MATRIX, Target, with_header

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, COLS = 64, 4096
SIZE = {"rows": ROWS, "cols": COLS}


@pytest.fixture(scope="module")
def wide_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Its matrix is of a size where limits matter."""
    return Target(tmp_path_factory.mktemp("wide"), "bitdelta", packed=True, shape=(ROWS, COLS))


def made_of(target: Target, *terms: dict[str, Any], data: bytes = b"") -> bytes:
    """A packed artifact of these terms alone; `data`, then zeros."""
    _, manifest = target.parts()
    manifest["layers"][MATRIX]["terms"] = list(terms)
    manifest["overrides"] = {}
    layout = Manifest.model_validate_json(json.dumps(manifest)).layout().values()
    total = sum(math.prod(shape) * types[0].itemsize for shape, types in layout)
    assert len(data) <= total < 2**23, "the attack is not small"
    entry = {"dtype": "U8", "shape": [total], "data_offsets": [0, total]}
    header = {"__metadata__": {"deltaserve": deflated(json.dumps(manifest))}, "packed": entry}
    return with_header(json.dumps(header).encode(), data.ljust(total, b"\0"))


def coded(**fields: Any) -> dict[str, Any]:
    return {"kind": "coded", **SIZE, "bits": 1, "grid": "sign", **fields}


def codebook(**fields: Any) -> dict[str, Any]:
    return {"kind": "codebook", **SIZE, "bits": 8, "length": 64, **fields}


PATCHES = {"kind": "patches", **SIZE, "size": 8, "bits": 1, "count": 0}
EXACT = {"kind": "exact", **SIZE, "value_bits": 32, "count": 4096}
BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "a table of 64 GB": (codebook(bits=16, length=COLS, tile=ROWS), "a table of 8589934592 entries, at most 16777216"),
    "a table of 2^46": (codebook(bits=16, signed=False, length=2**16, tile=2**10), "a table of 4398046511104 entries"),
    "products of 64 GB a token": (
        codebook(bits=16, signed=False, length=1, tile=ROWS),
        "17179869184 products of a token with the table, at most 16777216",
    ),
    "a block over the matrix": (codebook(bits=2, length=COLS + 1), "blocks of 1 × 4097 in 64 × 4096"),
    "a table of many parts": (codebook(bits=16, stages=8, turns=8, length=128), "a table of 33554432 entries"),
    "more parts than stages": (codebook(bits=2, stages=3, turns=4), "3 stages that take turns at 4 parts of a table"),
    "a book that nobody has": (codebook(bits=9, book="gaussian"), "no gaussian book of 8 bits for 64 entries"),
    "an index of no bits": (codebook(bits=1), "a signed code of 1 bit has no index"),
    "blocks of terabytes": (
        {"kind": "placed", "term": coded(cols=8), "cols": COLS, "block": 2**40},
        "blocks of 1099511627776 columns, at most 4096",
    ),
    "a placed term of terabytes": (
        {"kind": "placed", "term": codebook(cols=2**30, bits=2, length=2**16, tile=64), "cols": COLS, "block": 8},
        "1073741824 of 4096 columns",
    ),
    "a mask laid out far past the end": (
        coded(bits=4, grid="int", mask={"kind": "seeded", "group": 2**16, "keep": 2}),
        "a mask of groups of 65536 columns, at most 4096",
    ),
    "more survivors than columns": (
        coded(bits=4, grid="int", mask={"kind": "seeded", "group": 2, "keep": 4}),
        "4 survivors in groups of 2",
    ),
    "a scale repeated without end": (
        coded(bits=2, grid="int", row="group", group=2**40),
        "scales of groups of 1099511627776 columns, at most 4096",
    ),
    "patches far over the edge": ({**PATCHES, "size": 1024}, "patches of 1024 × 1024 in 64 × 4096"),
    "a transform of every size": (
        {"kind": "rotated", "term": PATCHES, "t_in": {"kind": "dct", "size": 4095}},
        "dct of size 4095, at most 256",
    ),
    "a transform that does not exist": (
        {"kind": "rotated", "term": PATCHES, "t_out": {"kind": "hadamard", "size": 12}},
        "hadamard of size 12, no power of two",
    ),
    "a rank over the smaller side": (
        {"kind": "low-rank", "left": coded(cols=COLS), "right": coded(rows=COLS)},
        "rank 4096 is over 64",
    ),
    "a wall of zeros": ({**EXACT, "rows": 2**40, "cols": 2**40}, "its layer needs (64, 4096)"),
    "patches of zeros": ({**PATCHES, "rows": 2**15, "cols": 2**15}, "its layer needs (64, 4096)"),
    "one code for everything": (
        codebook(rows=2**30, cols=2**14, bits=1, signed=False, length=2**14, tile=2**10),
        "its layer needs (64, 4096)",
    ),
}


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a tensor was read before its size was known")

    monkeypatch.setattr(Artifact, "read", never)


@pytest.mark.usefixtures("nothing_read")
@pytest.mark.parametrize(("term", "message"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(wide_target: Target, term: dict[str, Any], message: str) -> None:
    """Threat: a kilobyte of codes that stands for terabytes of numbers."""
    with pytest.raises(ArtifactMismatch) as caught:
        wide_target.receive(made_of(wide_target, term))
    assert message in caught.value.message


BOUNDS: dict[str, dict[str, Any]] = {
    "a tile of a mask": coded(mask={"kind": "seeded", "group": 8, "tile": 2**11}),
    "a group of a mask": coded(mask={"kind": "explicit", "group": 2**17}),
    "a tile of a codebook": codebook(tile=2**11),
    "a length of a codebook": codebook(length=2**17),
    "the bits of a codebook": codebook(bits=17),
    "a stream of a codebook": codebook(stream=16),
    "a size of a patch": {**PATCHES, "size": 2048},
    "a size of a transform": {"kind": "rotated", "term": PATCHES, "t_in": {"kind": "hadamard", "size": 8192}},
    "another width of values": {**EXACT, "value_bits": 64},
    "nothing in a stream": {**EXACT, "count": 0},
    "fewer than no patches": {**PATCHES, "count": -1},
    "wrapped twice": {"kind": "rotated", "term": {"kind": "rotated", "term": PATCHES}},
    "a stream in a wrapper": {"kind": "placed", "term": EXACT, "cols": COLS, "block": 8},
    "patches on blocks": {"kind": "placed", "term": PATCHES, "cols": COLS, "block": 8},
}


@pytest.mark.parametrize("term", BOUNDS.values(), ids=BOUNDS)
def test_a_term_out_of_bounds_is_no_manifest(wide_target: Target, term: dict[str, Any]) -> None:
    """Threat: numbers that the layout of the file would be computed from."""

    def change(_: object, manifest: dict[str, Any]) -> None:
        manifest["layers"][MATRIX]["terms"] = [term]

    with pytest.raises(ArtifactError, match="manifest: layers"):
        wide_target.receive(wide_target.edited(change))


def stream(num_bytes: int) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


@pytest.mark.usefixtures("nothing_read")
def test_a_delta_far_larger_in_memory_than_its_base_is_refused(wide_target: Target) -> None:
    """Threat: sixteen kilobytes of streams that inflate to sixteen full models."""
    with pytest.raises(ArtifactTooLarge, match="over 4 × the"):
        wide_target.receive(made_of(wide_target, *[EXACT] * 16))


@pytest.mark.usefixtures("nothing_read")
def test_tables_that_add_up_are_refused(wide_target: Target) -> None:
    """Threat: every term asks for a table of its own, each within the limit."""
    terms = [codebook(bits=16, signed=False, length=256, stream=index) for index in range(16)]
    with pytest.raises(ArtifactTooLarge, match="16 codebooks of 1073741824 bytes, at most 805306368"):
        wide_target.receive(made_of(wide_target, *terms))


def test_the_same_table_counts_once(wide_target: Target) -> None:
    artifact = wide_target.receive(made_of(wide_target, *[codebook(bits=9)] * 16))
    assert len(artifact.manifest.layers[MATRIX].terms) == 16


INFLATED: dict[str, tuple[Callable[[int], bytes], str]] = {
    "more than it should": (lambda size: stream(100 * size), "the stream is cut off, or too long"),
    "less than it should": (lambda size: stream(size - 1), "the stream holds another matrix"),
    "no stream": (lambda size: b"x" * 64, "the stream is damaged"),
}


@pytest.mark.parametrize(("make", "message"), INFLATED.values(), ids=INFLATED)
def test_a_stream_is_inflated_to_its_own_size_and_no_further(
    wide_target: Target, make: Callable[[int], bytes], message: str
) -> None:
    """Threat: a thousandfold inflation."""
    data = make(8 + 4 * ROWS * COLS)
    with pytest.raises(ArtifactMismatch, match=message):
        wide_target.receive(made_of(wide_target, {**EXACT, "count": len(data)}, data=data))
