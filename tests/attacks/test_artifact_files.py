"""Attacks by an uploaded artifact file. Opening and checking it succeeds or raises an error of ours, promptly."""

from __future__ import annotations

import json
import pickle
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.restore import restore
from deltaserve.deltas.tensorfile import MAX_HEADER_BYTES
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import ArtifactCorrupt, ArtifactError, ArtifactMismatch, CheckpointError, DeltaServeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPTLY_S = 5.0  # on a busy machine
MATRIX, EMBEDDING, NORM = "layers.0.q_proj.weight", "model.embed_tokens.weight", "norm.weight"


FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Target:
    """A base, one sound artifact on it, and what a server does with an upload."""

    def __init__(self, folder: Path, codec: str) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in ("base", "tuned"):
            tensors = {
                MATRIX: torch.randn(6, 9, generator=generator),
                EMBEDDING: torch.randn(8 if name == "base" else 9, 4, generator=torch.Generator().manual_seed(1)),
                NORM: torch.randn(5, generator=generator).bfloat16(),
            }
            save_file(tensors, folder / f"{name}.safetensors")
        self.base = Checkpoint.open(folder / "base.safetensors")
        tuned = Checkpoint.open(folder / "tuned.safetensors")
        artifact = compress(self.base, tuned, make_codec(codec), folder / "sound.safetensors")
        self.path = folder / "upload.safetensors"
        self.sound = artifact.file.path.read_bytes()
        self.header_bytes = struct.unpack("<Q", self.sound[:8])[0]

    def receive(self, raw: bytes) -> Artifact:
        """Opens and checks an upload; decodes what passed."""
        self.path.write_bytes(raw)
        start = time.monotonic()
        try:
            artifact = Artifact.open(self.path)
            check_against_base(artifact, self.base)
            check_numbers(artifact, self.base)
            for name in artifact.manifest.layers:
                for term in artifact.terms(name):
                    assert term.decode().shape == self.base.entries[name].shape
            for name in artifact.manifest.overrides:
                assert (
                    artifact.override(name).apply(self.base.tensor(name)).shape[1:] == self.base.entries[name].shape[1:]
                )
            return artifact
        finally:
            assert time.monotonic() - start < PROMPTLY_S

    def edited(self, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
        """The sound artifact with its header and manifest changed."""
        header = json.loads(self.sound[8 : 8 + self.header_bytes])
        manifest = json.loads(header["__metadata__"]["deltaserve"])
        change(header, manifest)
        if "__metadata__" in header:
            header["__metadata__"]["deltaserve"] = json.dumps(manifest)
        return with_header(json.dumps(header).encode(), self.sound[8 + self.header_bytes :])


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture(scope="module", params=["bitdelta", "dare", "delta-svd"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("target"), request.param)


@pytest.fixture(scope="module")
def one_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("target"), "dare")


def test_the_sound_artifact_passes(target: Target) -> None:
    assert set(target.receive(target.sound).manifest.layers) == {MATRIX}


def test_a_file_cut_off_anywhere_is_corrupt(target: Target) -> None:
    """Threat: a partial upload is read past its end."""
    end_of_header = 8 + target.header_bytes
    cuts = {0, 1, 7, 8, 9, 10, end_of_header // 2, end_of_header - 1, *range(end_of_header, len(target.sound))}
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


@pytest.mark.parametrize("field", ["created_by", "codec", "chat_template", "base"])
def test_a_huge_manifest_is_refused(one_target: Target, field: str) -> None:
    """Threat: a manifest that fills memory, a catalogue or a log."""

    def fill(manifest: dict[str, Any], field: str) -> None:
        manifest[field] = {**manifest["base"], "name": "x" * 2**20} if field == "base" else "x" * 2**20

    with pytest.raises(ArtifactError) as caught:
        one_target.receive(one_target.edited(lambda _, manifest: fill(manifest, field)))
    assert len(caught.value.message) < 1000


def test_a_million_layers_are_refused_with_a_short_answer(one_target: Target) -> None:
    """Threat: an error report as long as the attack."""

    def change(_: object, manifest: dict[str, Any]) -> None:
        manifest["overrides"] = {f"x{i}": {"kind": "replace", "shape": [1], "dtype": "U8"} for i in range(20_000)}

    with pytest.raises(ArtifactMismatch) as caught:
        one_target.receive(one_target.edited(change))
    assert len(caught.value.message) < 50_000


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "C:\\x", "a/../../b", "~/.ssh/id", "__class__", ""]
)
def test_a_tensor_named_like_a_path_stays_a_name(one_target: Target, name: str) -> None:
    """Threat: tensor names that become file names."""

    def change(header: dict[str, Any], manifest: dict[str, Any]) -> None:
        header[name] = header.pop(NORM)
        manifest["overrides"][name] = manifest["overrides"].pop(NORM)

    with pytest.raises(ArtifactMismatch, match="the base has no such tensor"):
        one_target.receive(one_target.edited(change))


@pytest.mark.parametrize("name", ["a\0b", "a\nlevel=CRITICAL", "\x1b[2J", "\ud800", "\u202egnp", "x" * 10_000])
def test_a_tensor_name_that_is_no_plain_text_is_corrupt(one_target: Target, name: str) -> None:
    """Threat: forged log lines, terminal escapes, replies that cannot be encoded."""
    with pytest.raises(ArtifactCorrupt, match="printable") as caught:
        one_target.receive(one_target.edited(lambda header, _: header.update({name: header.pop(NORM)})))
    assert len(caught.value.message.encode()) < 500 and "\n" not in caught.value.message


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_under_another_name_is_never_loaded(one_target: Target, tmp_path: Path) -> None:
    """Threat: code that runs when it is unpickled (SGLang CVE-2026-15969, GHSA-x3m8-f7g5-qhm7)."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "saved.bin")
    for raw in (pickle.dumps(Explosive()), (tmp_path / "saved.bin").read_bytes(), b"PK\x03\x04" + bytes(64)):
        with pytest.raises(ArtifactCorrupt, match="not a safetensors file"):
            one_target.receive(raw)
        checkpoint = tmp_path / "model.safetensors"
        checkpoint.write_bytes(raw)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            Checkpoint.open(tmp_path)


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    """Threat: a .bin beside a config.json is loaded because nothing else is there."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive()))
    for reference in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError):
            Checkpoint.open(reference)


def test_an_index_that_points_elsewhere_stays_in_its_folder(tmp_path: Path) -> None:
    """Threat: a checkpoint's index names files of the host."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"secret": torch.zeros(1)}, tmp_path / "secret.safetensors")
    for path in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": path}}))
        with pytest.raises(CheckpointError, match="missing secret"):
            Checkpoint.open(folder)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000, "\xff"])
def test_an_index_of_nonsense_is_refused(tmp_path: Path, index: str) -> None:
    """Threat: errors of the parser that nobody expects."""
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)


def test_code_beside_a_checkpoint_never_runs(tmp_path: Path) -> None:
    """Threat: auto_map in config.json names a Python file (vLLM CVE-2026-22807)."""
    from deltaserve.deltas.companions import changed_companions

    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError):
        changed_companions(checkpoint, checkpoint)
    assert not (tmp_path / "ran").exists()


REFUSED_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown field": lambda m: m.update(pickle="x"),
    "missing field": lambda m: m.pop("base"),
    "another format": lambda m: m.update(format="deltaserve-base"),
    "a later version": lambda m: m.update(version=2),
    "version as text": lambda m: m.update(version="1"),
    "a config of anything": lambda m: m.update(config={"x": [[[]]]}),
    "a config that is not finite": lambda m: m.update(config={"x": float("inf")}),
    "seed below": lambda m: m.update(seed=-1),
    "seed above": lambda m: m.update(seed=2**64),
    "seed of a fraction": lambda m: m.update(seed=1.5),
    "fingerprint no hash": lambda m: m["base"].update(fingerprint="../x"),
    "fingerprint with a newline": lambda m: m["base"].update(fingerprint="0" * 64 + "\n"),
    "layers no map": lambda m: m.update(layers=[]),
    "group 0": lambda m: term(m).update(mask={"kind": "seeded-1-of-n", "group": 0}),
    "group 2**63": lambda m: term(m).update(mask={"kind": "seeded-1-of-n", "group": 2**63}),
    "group true": lambda m: term(m).update(mask={"kind": "seeded-1-of-n", "group": True}),
    "another mask": lambda m: term(m).update(mask={"kind": "stored", "group": 8}),
    "bits 2": lambda m: term(m).update(bits=2),
    "bits 8": lambda m: term(m).update(bits=8),
    "bits 0": lambda m: term(m).update(bits=0),
    "rows 0": lambda m: term(m).update(rows=0),
    "rows 2**63": lambda m: term(m).update(rows=2**63),
    "another grid": lambda m: term(m).update(grid="__import__"),
    "another term": lambda m: term(m).update(kind="pickle"),
    "nested terms": lambda m: term(m).update(kind="low-rank", left=dict(term(m)), right={"kind": "low-rank"}),
    "no terms": lambda m: m["layers"][MATRIX].update(terms=[]),
    "terms × 1000": lambda m: m["layers"][MATRIX].update(terms=[term(m)] * 1000),
    "shape of 9": lambda m: m["layers"][MATRIX].update(shape=[1] * 9),
    "negative shape": lambda m: m["layers"][MATRIX].update(shape=[-6, 9]),
    "negative rows stored": lambda m: m["overrides"][EMBEDDING].update(num_rows=-1),
    "another override": lambda m: m["overrides"][NORM].update(kind="file"),
    "template too long": lambda m: m.update(chat_template="x" * (2**18 + 1)),
    "too many tokens": lambda m: m.update(added_tokens=[{"id": 1, "content": "x"}] * 65537),
    "a token of nothing": lambda m: m.update(added_tokens=[{"id": 1, "content": ""}]),
    "code in the config": lambda m: m.update(model_config_changes={"auto_map": {"AutoModel": "evil.Evil"}}),
    "another architecture": lambda m: m.update(model_config_changes={"num_hidden_layers": 10**9}),
    "an endless vocabulary": lambda m: m.update(model_config_changes={"vocab_size": 2**60}),
    "an attribute of the tokenizer": lambda m: m.update(special_tokens={"__class__": "x"}),
    "another attribute of the tokenizer": lambda m: m.update(special_tokens={"chat_template": "{{ x }}"}),
    "a generation field unknown": lambda m: m.update(generation={"custom_generate": "evil"}),
    "a generation field of text": lambda m: m.update(generation={"temperature": "hot"}),
    "end tokens without end": lambda m: m.update(generation={"eos_token_id": list(range(10_000))}),
}


def term(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["layers"][MATRIX]["terms"][0]
    return found


@pytest.mark.parametrize("change", REFUSED_MANIFESTS.values(), ids=REFUSED_MANIFESTS)
def test_a_manifest_out_of_bounds_is_refused(one_target: Target, change: Callable[[dict[str, Any]], object]) -> None:
    """Threat: numbers, names and fields that later code would trust."""
    with pytest.raises(ArtifactError, match="manifest: "):
        one_target.receive(one_target.edited(lambda _, manifest: change(manifest)))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", '"1"'])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_a_generation_default_that_is_no_number_is_refused(one_target: Target, field: str, text: str) -> None:
    """Threat: NaN as a temperature."""
    raw = one_target.edited(lambda _, manifest: manifest.update(generation={field: 12345.678}))
    header = raw[8:].split(b"\n")[0][: struct.unpack("<Q", raw[:8])[0]]
    changed = header.replace(b"12345.678", text.replace('"', '\\"').encode())
    with pytest.raises(ArtifactError, match=f"generation.{field}"):
        one_target.receive(with_header(changed, raw[8 + len(header) :]))


def test_a_safetensors_file_without_a_manifest_is_no_delta(one_target: Target) -> None:
    """Threat: a full checkpoint taken for a delta."""
    with pytest.raises(ArtifactError, match="no delta"):
        one_target.receive(one_target.edited(lambda header, _: header.pop("__metadata__")))


@pytest.mark.parametrize("name", [EMBEDDING, MATRIX, NORM])
@pytest.mark.parametrize("kind", ["replace", "rows"])
def test_a_grown_tensor_without_its_rows_allocates_nothing(one_target: Target, name: str, kind: str) -> None:
    """Threat: a hundred bytes of manifest that stand for terabytes of zeros."""

    def change(_: object, manifest: dict[str, Any]) -> None:
        shape = [2**44, *one_target.base.entries[name].shape[1:]]
        manifest["overrides"][name] = {"kind": kind, "shape": shape, "dtype": "F32", "num_rows": 1}

    with pytest.raises(ArtifactMismatch):
        one_target.receive(one_target.edited(change))


def test_a_token_without_an_embedding_is_refused(one_target: Target) -> None:
    """Threat: a token id past the embedding, read out of bounds on the device."""
    token = {"id": 9, "content": "<|x|>"}
    with pytest.raises(ArtifactMismatch, match="id 9, but model.embed_tokens.weight has 9 rows"):
        one_target.receive(one_target.edited(lambda _, manifest: manifest.update(added_tokens=[token])))


def test_a_refused_artifact_restores_nothing(one_target: Target, tmp_path: Path) -> None:
    """Threat: half a model left where a whole one is looked for."""
    one_target.path.write_bytes(one_target.edited(lambda _, manifest: term(manifest).update(rows=7)))
    with pytest.raises(ArtifactMismatch):
        restore(one_target.base, Artifact.open(one_target.path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@FUZZ
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=4),
    in_header=st.booleans(),
)
@example(flips=[(0, 255)], in_header=True)
def test_flipped_bytes_pass_or_raise_an_error_of_ours(
    target: Target, flips: list[tuple[int, int]], in_header: bool
) -> None:
    """Threat: anything not thought of above."""
    raw = bytearray(target.sound)
    end = 8 + target.header_bytes if in_header else len(raw)
    for place, mask in flips:
        raw[place % end] ^= mask
    try:
        target.receive(bytes(raw))
    except DeltaServeError as error:
        error.message.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_header_or_manifest_passes_or_raises_an_error_of_ours(
    target: Target, data: st.DataObject
) -> None:
    """Threat: values of the wrong kind, deep inside."""

    def change(header: dict[str, Any], manifest: dict[str, Any]) -> None:
        node: Any = data.draw(st.sampled_from([header, manifest]))
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                return
            key = data.draw(st.sampled_from(keys))
            if not isinstance(node[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
                node[key] = data.draw(JSON)
                return
            node = node[key]

    try:
        target.receive(target.edited(change))
    except DeltaServeError as error:
        error.message.encode()
    except TypeError as error:  # __metadata__ itself was replaced: `edited` has nowhere to put the manifest
        assert "item assignment" in str(error) or "indices" in str(error)
