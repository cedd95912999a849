"""What may differ from layer to layer: the codec, the two scalars, the gram matrix that a codec is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from deltaserve.codecs.base import decode
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import Scalars, compress, natural_order
from deltaserve.deltas.restore import restore
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Book, Codebook

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from deltaserve.codecs.base import Site
    from deltaserve_kernels.terms import Term

Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def test_scalars_multiply_the_base_and_the_terms(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    base, chosen = Checkpoint.open(tiny_base), {Q_PROJ: Scalars(gamma=0.5, base_shift=-0.25)}
    tuned = Checkpoint.open(tiny_finetune)
    artifact = compress(base, tuned, BitDelta(), tmp_path / "delta", scalars=chosen)
    plain = compress(base, tuned, BitDelta(), tmp_path / "plain")
    spec, other = artifact.manifest.layers[Q_PROJ], artifact.manifest.layers[K_PROJ]
    assert (spec.gamma, spec.base_shift, other.gamma, other.base_shift) == (0.5, -0.25, 1.0, 0.0)
    assert other == plain.manifest.layers[K_PROJ]

    restore(base, artifact, tmp_path / "out", dtype=torch.float32)
    restored = load_file(tmp_path / "out" / "model.safetensors")
    before, after = (checkpoint.tensor(Q_PROJ).float() for checkpoint in (base, tuned))
    wanted = 0.75 * before + 0.5 * decode(artifact.terms(Q_PROJ))
    assert torch.equal(restored[Q_PROJ], wanted)
    assert spec.error is not None
    relative = float((wanted - after).norm() / (after - before).norm())
    assert spec.error.relative == pytest.approx(relative, rel=1e-3)  # of what is restored, not of the terms alone


def test_scalars_are_read_as_they_were_written(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    chosen = {Q_PROJ: Scalars(gamma=1 / 3, base_shift=-1e-7)}
    checkpoints = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    for packed in (False, True):
        compress(*checkpoints, BitDelta(), tmp_path / "delta", scalars=chosen, packed=packed)
        spec = Artifact.open(tmp_path / "delta").manifest.layers[Q_PROJ]
        assert (spec.gamma, spec.base_shift) == (1 / 3, -1e-7)


def test_a_layer_may_have_a_codec_of_its_own(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    per_layer = {Q_PROJ: DeltaSvd(rank=2)}
    checkpoints = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    layers = compress(*checkpoints, BitDelta(), tmp_path / "delta", per_layer=per_layer).manifest.layers
    kinds = {name: [term.kind for term in layer.terms] for name, layer in layers.items()}
    assert kinds.pop(Q_PROJ) == ["low-rank"]
    assert set(map(tuple, kinds.values())) == {("coded",)}


@dataclass(frozen=True)
class Recorder(BitDelta):
    """Bitdelta that keeps what it is told of its sites."""

    needs_gram: ClassVar[bool] = True
    seen: ClassVar[list[Tensor | None]] = []

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        self.seen.append(site.gram)
        return super().encode(delta, site)


class Grams:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def gram(self, name: str) -> Tensor | None:
        self.asked.append(name)
        return None if name == K_PROJ else torch.full((1, 1), float(len(self.asked)))


def test_grams_are_asked_in_natural_order_and_only_where_they_are_needed(
    tiny_base: Path, tiny_finetune: Path, tmp_path: Path
) -> None:
    checkpoints, grams = (Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)), Grams()
    Recorder.seen.clear()
    artifact = compress(*checkpoints, Recorder(), tmp_path / "a", grams=grams, per_layer={Q_PROJ: BitDelta()})
    assert Q_PROJ not in grams.asked
    assert grams.asked == sorted(artifact.manifest.layers.keys() - {Q_PROJ}, key=natural_order)
    assert [gram is None for gram in Recorder.seen] == [name == K_PROJ for name in grams.asked]


def test_natural_order_counts() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed", "layers.1.z"]
    assert sorted(names, key=natural_order) == ["embed", "layers.1.z", "layers.2.a", "layers.2.b", "layers.10.a"]


@dataclass(frozen=True)
class TooLarge(BitDelta):
    """Asks for a table that no server makes."""

    def encode(self, delta: Tensor, site: Site) -> list[Term]:  # noqa: ARG002
        rows, cols = delta.shape
        codes = torch.zeros(2 * -(-rows // 16), dtype=torch.uint8)
        return [Codebook(rows, cols, 16, cols, Book("seeded"), codes, torch.ones(()), tile=16)]


def test_what_no_server_would_take_is_refused_when_it_is_made(workshop: Any, tiny_base: Path, tmp_path: Path) -> None:
    tuned = workshop.copy_of(tiny_base, "tuned")
    checkpoints = Checkpoint.open(tiny_base), Checkpoint.open(tuned)
    assert compress(*checkpoints, TooLarge(), tmp_path / "none").manifest.layers == {}  # nothing changed
    changed = workshop.save("b.safetensors", {"w": torch.ones(64, 4096)})
    base = workshop.save("a.safetensors", {"w": torch.zeros(64, 4096)})
    with pytest.raises(CodecError, match="w: what bitdelta makes of it cannot be served: a table of 2147483648"):
        compress(Checkpoint.open(base), Checkpoint.open(changed), TooLarge(), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
