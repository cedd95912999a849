"""Attacks by the manifest of an uploaded artifact: what it says is bounded before anything relies on it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.restore import restore
from deltaserve.errors import ArtifactError, ArtifactMismatch

from .target import EMBEDDING, MATRIX, NORM, Target, term, with_header

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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
    "group 0": lambda m: term(m).update(mask={"kind": "seeded", "group": 0}),
    "group 2**63": lambda m: term(m).update(mask={"kind": "seeded", "group": 2**63}),
    "group 2**17": lambda m: term(m).update(mask={"kind": "explicit", "group": 2**17}),
    "no survivor": lambda m: term(m).update(mask={"kind": "seeded", "group": 8, "keep": 0}),
    "a tile without end": lambda m: term(m).update(mask={"kind": "seeded", "group": 8, "tile": 2**40}),
    "group true": lambda m: term(m).update(mask={"kind": "seeded", "group": True}),
    "another mask": lambda m: term(m).update(mask={"kind": "stored", "group": 8}),
    "bits 0": lambda m: term(m).update(bits=0),
    "bits 9": lambda m: term(m).update(bits=9),
    "bits 64": lambda m: term(m).update(bits=64),
    "rows 0": lambda m: term(m).update(rows=0),
    "rows 2**63": lambda m: term(m).update(rows=2**63),
    "another grid": lambda m: term(m).update(grid="__import__"),
    "another term": lambda m: term(m).update(kind="pickle"),
    "nested terms": lambda m: term(m).update(kind="low-rank", left=dict(term(m)), right={"kind": "low-rank"}),
    "no terms": lambda m: m["layers"][MATRIX].update(terms=[]),
    "terms × 1000": lambda m: m["layers"][MATRIX].update(terms=[term(m)] * 1000),
    "a type unknown": lambda m: m["layers"][MATRIX].update(dtype="F7"),
    "a type of an override unknown": lambda m: m["overrides"][NORM].update(dtype="F32\n"),
    "gamma without end": lambda m: m["layers"][MATRIX].update(gamma=1e300),
    "a shift that is infinite": lambda m: m["layers"][MATRIX].update(base_shift=float("-inf")),
    "a difference of nothing": lambda m: m["overrides"][NORM].update(kind="add"),
    "a difference that replaces": lambda m: m["overrides"][NORM].update(coded=dict(term(m))),
    "a difference of a kind unknown": lambda m: m["overrides"][NORM].update(kind="add", coded={"kind": "exact"}),
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


@pytest.mark.parametrize("change", REFUSED_MANIFESTS.values(), ids=REFUSED_MANIFESTS)
def test_a_manifest_out_of_bounds_is_refused(one_target: Target, change: Callable[[dict[str, Any]], object]) -> None:
    """Threat: numbers, names and fields that later code would trust."""
    with pytest.raises(ArtifactError, match="manifest: "):
        one_target.receive(one_target.edited(lambda _, manifest: change(manifest)))


@pytest.mark.parametrize("name", ["a\0b", "a\nlevel=CRITICAL", "\x1b[2J", "\u202egnp", "x" * 10_000])
@pytest.mark.parametrize("field", ["layers", "overrides"])
def test_a_name_that_is_no_plain_text_is_refused(one_target: Target, field: str, name: str) -> None:
    """Threat: forged log lines and terminal escapes, by names that no tensor of the file has."""

    def change(_: object, manifest: dict[str, Any]) -> None:
        manifest[field][name] = next(iter(manifest[field].values()))

    with pytest.raises(ArtifactError, match="printable") as caught:
        one_target.receive(one_target.edited(change))
    assert len(caught.value.message) < 500 and caught.value.message.isprintable()


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
