"""An allocator from the command line to the artifact, on the tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from deltaserve.codecs.auto import Auto
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.dare import Dare
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.codecs.ultradelta import UltraDelta
from deltaserve.deltas.allocate import ALLOCATORS, check_allocatable
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.calibration import Text
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.lone_layers import LoneLayers
from deltaserve.deltas.prepare import make_delta
from deltaserve.deltas.reference_model import load_reference
from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.codecs.base import Codec

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaserve.deltas import prepare

    monkeypatch.setattr(prepare, "GRAM_TEXTS", 4)
    monkeypatch.setattr(prepare, "LONE_TOKENS", 8)


def layer_bits(artifact: Artifact) -> dict[str, float]:
    """Bits per parameter of each layer's terms."""
    return {
        name: 8 * sum(term.nbytes for term in artifact.terms(name)) / (spec.shape[0] * spec.shape[1])
        for name, spec in artifact.manifest.layers.items()
    }


def spent(artifact: Artifact) -> float:
    sizes = {name: spec.shape[0] * spec.shape[1] for name, spec in artifact.manifest.layers.items()}
    bits = layer_bits(artifact)
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_layers_share_the_budget(allocator: str, tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    artifact = make_delta(*checkpoints, Dare(bits=0.8), tmp_path / "delta", allocate=allocator)
    assert spent(artifact) <= 0.8
    config = artifact.manifest.config
    assert (config["allocator"], config["bits"]) == (allocator, 0.8)
    assert 0 < float(config["allocated_bound"] or 0) <= float(config["allocated_loss"] or 0)
    alike = len({round(bits, 6) for bits in layer_bits(artifact).values()}) < 4  # as many as layers have shapes
    assert alike == (allocator == "uniform")


@pytest.mark.parametrize("codec", [UltraDelta(bits=1.0), DeltaSvd(bits=2.0)])
def test_sharing_pays_and_is_the_same_again(codec: Codec, tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    """A planner, whose own plan is the uniform allocation, and a codec of ranks."""
    checkpoints = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    uniform, shared, again = (
        make_delta(*checkpoints, codec, tmp_path / str(number), allocate=allocator)
        for number, allocator in enumerate(("uniform", "linearity", "linearity"))
    )
    losses = [float(artifact.manifest.config["allocated_loss"] or 0) for artifact in (uniform, shared)]
    assert losses[1] < losses[0]
    assert uniform.manifest.config["allocated_bound"] == shared.manifest.config["allocated_bound"]  # one objective
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert again.manifest == shared.manifest


def test_codecs_that_have_nothing_to_share_are_refused() -> None:
    for codec, allocator, reason in (
        (BitDelta(), "ilp", "bitdelta: has no bits per parameter"),
        (Auto(bits=0.1), "ilp", "auto: has an allocation of its own"),
        (Dare(group=8), "ilp", "dare: an allocator needs bits per parameter"),
        (Dare(bits=1.0), "best", "allocator 'best' does not exist; there are gradient, ilp, kl"),
    ):
        with pytest.raises(CodecError, match=reason):
            check_allocatable(codec, allocator)


def test_a_budget_under_what_layers_need_names_the_least(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    with pytest.raises(CodecError, match=r"delta-svd: bits 0\.1: the least that layers can share is 0\.\d+") as refused:
        make_delta(*checkpoints, DeltaSvd(bits=0.1), tmp_path / "delta", allocate="linearity")
    least = float(str(refused.value).split()[-1])
    artifact = make_delta(*checkpoints, DeltaSvd(bits=least), tmp_path / "delta", allocate="linearity")
    assert spent(artifact) == pytest.approx(least, abs=1e-3)


def test_a_fine_tune_of_no_layer_has_nothing_to_share(tiny_base: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_base)
    artifact = make_delta(base, base, Dare(bits=0.5), tmp_path / "delta", allocate="uniform")
    assert artifact.manifest.layers == {}


@pytest.mark.parametrize("cap", [None, 1.0])
def test_a_lone_layer_is_judged_as_the_whole_model_would_be(
    tiny_base: Path, tiny_finetune: Path, cap: float | None
) -> None:
    base, tuned = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    model = load_reference(base, None, tuned, torch.float32)
    if cap:
        model.lm_head.register_forward_hook(lambda module, args, logits: cap * torch.tanh(logits / cap))
    tokens = [1, 40, 30, 20, 10, 50]
    lone = LoneLayers(model, [Text(tokens, start=3), Text(tokens[:4])])
    unchanged = lone.divergence(DOWN, tuned.tensor(DOWN).float())
    assert unchanged is not None
    assert unchanged.abs().max() < 1e-6
    found = lone.divergence(DOWN, base.tensor(DOWN).float())
    assert found is not None

    ids = torch.tensor([tokens, tokens[:4] + [0, 0]])  # the longer first
    log_p = F.log_softmax(model(input_ids=ids).logits.float(), -1)
    model.get_parameter(DOWN).data = base.tensor(DOWN).float()
    log_q = F.log_softmax(model(input_ids=ids).logits.float(), -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(found.float(), torch.cat([kl[0, 2:5], kl[1, :3]]), rtol=1e-3, atol=1e-6)
    assert found.mean() > 1e-4
    assert lone.divergence("lm_head.weight", torch.zeros(1)) is None


def test_the_command_line_says_how_far_a_plan_is_from_the_best(
    tiny_base: Path, tiny_finetune: Path, tmp_path: Path, capsys: Any
) -> None:
    from deltaserve.cli import main

    files = [str(tiny_base), str(tiny_finetune), "-o", str(tmp_path / "delta")]
    words = ["compress", *files, "--codec", "dare", "--quiet"]
    assert main([*words, "--bits", "0.5", "--allocate", "uniform"]) == 0
    assert "allocated by uniform: predicted loss " in capsys.readouterr().out
    for more, reason in (
        (["--allocate", "ilp"], "an allocator needs bits per parameter"),
        (["--bits", "0.5", "--allocate", "best"], "allocator 'best' does not exist"),
    ):
        assert main([*words, *more]) == 2
        assert reason in capsys.readouterr().err
