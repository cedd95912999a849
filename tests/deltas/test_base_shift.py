"""DBMS' two numbers: found again where they are known, never worse than none, stored and served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GraniteConfig

from deltaserve.codecs.auto import Auto
from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve.deltas.base_shift import find_gamma, fit_scalars, rescaled
from deltaserve.deltas.calibration import Text, load_texts
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.deltas.compress import Scalars, compress
from deltaserve.deltas.prepare import make_delta
from deltaserve.deltas.reference_model import load_reference
from deltaserve.deltas.restore import restored_tensor
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaserve.deltas.artifact import Artifact

GAMMA, SHIFT = 0.6, 0.05


@pytest.fixture(scope="module")
def texts(tiny_base: Path) -> list[Text]:
    return load_texts("builtin", load_tokenizer(tiny_base), max_tokens=48, limit=40)


@pytest.fixture(scope="module")
def tuned(make_finetune: Callable[..., Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finetune(tiny_base, tmp_path_factory.mktemp("tuned") / "whole", scale=0.1, seed=3)


@pytest.fixture(scope="module")
def blended(tiny_base: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W = (1 + SHIFT) · W_base + GAMMA · Δ in the linears, Δ that of `tuned`."""
    out = tmp_path_factory.mktemp("blended") / "model"
    shutil.copytree(tuned, out)
    before, after = load_file(tiny_base / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name, tensor in after.items():
        if name.endswith("proj.weight"):
            delta = tensor.float() - before[name].float()
            after[name] = ((1 + SHIFT) * before[name].float() + GAMMA * delta).bfloat16()
    save_file(after, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Δ of `tuned`, all of it."""
    out = tmp_path_factory.mktemp("whole") / "delta.safetensors"
    return compress(Checkpoint.open(tiny_base), Checkpoint.open(tuned), DeltaSvd(energy=1.0), out)


@pytest.mark.parametrize("numbers", ["gamma", "shift", "both"])
def test_what_the_fine_tune_is_made_of_is_found_again(
    numbers: Any, whole: Artifact, tiny_base: Path, blended: Path, texts: list[Text]
) -> None:
    fit = fit_scalars(
        Checkpoint.open(tiny_base), Checkpoint.open(blended), whole, texts, span="task", numbers=numbers, steps=40
    )
    (scalars,) = set(fit.scalars.values())
    assert fit.after < fit.before
    assert numbers == "both" or (scalars.base_shift == 0) == (numbers == "gamma")
    assert numbers == "both" or (scalars.gamma == 1) == (numbers == "shift")
    if numbers == "both":
        assert fit.after < 0.05 * fit.before
        assert scalars.gamma == pytest.approx(GAMMA, abs=0.08)
        assert scalars.base_shift == pytest.approx(SHIFT, abs=0.02)


def test_by_layer_every_linear_has_its_own(whole: Artifact, tiny_base: Path, blended: Path, texts: list[Text]) -> None:
    fit = fit_scalars(Checkpoint.open(tiny_base), Checkpoint.open(blended), whole, texts, steps=12)
    assert set(fit.scalars) == set(whole.manifest.layers)
    assert len(set(fit.scalars.values())) == len(fit.scalars)
    assert fit.after < fit.before


def test_a_delta_that_is_right_already_is_left_as_it_is(
    whole: Artifact, tiny_base: Path, tuned: Path, texts: list[Text]
) -> None:
    fit = fit_scalars(Checkpoint.open(tiny_base), Checkpoint.open(tuned), whole, texts, steps=3)
    assert fit.after >= fit.before or fit.before < 1e-3
    assert not fit.scalars or fit.after < fit.before


def test_rescaled_is_the_same_file_with_other_numbers_and_their_errors(
    tiny_base: Path, tuned: Path, tmp_path: Path
) -> None:
    base, finetuned = Checkpoint.open(tiny_base), Checkpoint.open(tuned)
    before = compress(base, finetuned, BitDelta(), tmp_path / "delta.safetensors")
    tensors = {name: before.read(name).clone() for name in before.entries}
    name = next(iter(before.manifest.layers))
    after = rescaled(base, finetuned, before, {name: Scalars(gamma=0.5, base_shift=0.01)})
    assert {key: after.read(key).tolist() for key in after.entries} == {k: t.tolist() for k, t in tensors.items()}
    layer, delta = after.manifest.layers[name], finetuned.tensor(name).float() - base.tensor(name).float()
    assert (layer.gamma, layer.base_shift) == (0.5, 0.01)
    residual = restored_tensor(base, after, name, torch.float32) - finetuned.tensor(name).float()
    assert layer.error is not None
    assert layer.error.relative == pytest.approx(float(residual.norm() / delta.norm()), rel=1e-3)
    others = set(before.manifest.layers) - {name}
    assert all(after.manifest.layers[other] == before.manifest.layers[other] for other in others)


def test_make_delta_fits_them_when_asked(tiny_base: Path, blended: Path, tmp_path: Path) -> None:
    base, finetuned = Checkpoint.open(tiny_base), Checkpoint.open(blended)
    told: list[str] = []
    artifact = make_delta(
        base,
        finetuned,
        BitDelta(),
        tmp_path / "delta",
        base_shift="task",
        progress=lambda name, *_: told.append(name),
    )
    assert "fitting scalars" in told
    plain = make_delta(base, finetuned, BitDelta(), tmp_path / "plain")
    assert {layer.gamma for layer in plain.manifest.layers.values()} == {1.0}
    assert artifact.manifest.layers.keys() == plain.manifest.layers.keys()


def test_one_gamma_is_found_where_less_of_the_delta_is_nearer(
    whole: Artifact, tiny_base: Path, tuned: Path, blended: Path, texts: list[Text]
) -> None:
    base = Checkpoint.open(tiny_base)
    assert find_gamma(base, Checkpoint.open(tuned), whole, texts) == 1.0
    assert find_gamma(base, Checkpoint.open(blended), whole, texts) == pytest.approx(GAMMA, abs=0.11)


def test_the_distance_is_that_of_the_models_whose_logits_are_scaled(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
    }
    config = GraniteConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0)
    for seed, name in enumerate(("base", "tuned")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    base, finetuned = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    artifact = compress(base, finetuned, BitDelta(), tmp_path / "delta.safetensors")
    texts = [
        Text([(7 * start + 3 * place) % 97 for place in range(9)]) for start in range(9)
    ]  # the last one is held out
    models = [
        load_reference(base, artifact, None, torch.bfloat16),
        load_reference(base, None, finetuned, torch.bfloat16),
    ]
    ids = torch.tensor([texts[-1].tokens])  # held out
    with torch.no_grad():
        log_q, log_p = (model(input_ids=ids).logits[0, :-1].float().log_softmax(-1) for model in models)
    found = fit_scalars(base, finetuned, artifact, texts, steps=1)
    assert found.before == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=0.05)


def test_auto_takes_less_of_a_delta_whose_noise_is_loud(tiny_base: Path, tuned: Path, tmp_path: Path) -> None:
    base, finetuned = Checkpoint.open(tiny_base), Checkpoint.open(tuned)
    gammas = {}
    for bits in (0.6, 4.0):
        artifact = make_delta(base, finetuned, Auto(bits=bits), tmp_path / f"{bits}.safetensors")
        (gammas[bits],) = {layer.gamma for layer in artifact.manifest.layers.values()}
        assert artifact.bits_per_parameter <= bits
    assert gammas[0.6] < 1
    assert gammas[4.0] == 1


def test_too_few_texts_are_refused(whole: Artifact, tiny_base: Path, tuned: Path, texts: list[Text]) -> None:
    with pytest.raises(CheckpointError, match="too few"):
        fit_scalars(Checkpoint.open(tiny_base), Checkpoint.open(tuned), whole, texts[:8])
