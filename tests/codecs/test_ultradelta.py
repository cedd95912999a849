"""UltraDelta: the table on paper, classes that keep their mass, the plan, the norm, the published ratios."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deltaserve.codecs.base import CodingError, LayerStats, Planner, Site, decode
from deltaserve.codecs.ultradelta import UltraDelta
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded

SITE = Site(number=5, seed=7)


def matrix(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def encode(codec: UltraDelta, delta: torch.Tensor, site: Site = SITE) -> Coded:
    (term,) = codec.encode(delta, site)
    assert isinstance(term, Coded)
    return term


def layer(name: str, std: float, rows: int = 10, cols: int = 100) -> LayerStats:
    return LayerStats(name, rows, cols, norm=std * math.sqrt(rows * cols), std=std, base_norm=10.0)


def test_the_table_on_paper() -> None:
    """Seed 7, site 5 keeps columns 0 3 · 1 3 · 0 3 · 1 2 of the four rows. Of seven 2s four survive (2 · 7/4), of nine
    −1s four (−9/4)."""
    delta = torch.tensor([[2.0, -1, -1, -1], [2, -1, -1, 2], [2, 2, -1, 2], [-1, -1, 2, -1]])
    for estimator in ("unbiased", "paper"):
        term = encode(UltraDelta(estimator=estimator), delta)  # type: ignore[arg-type]
        assert layout.unpack(term.codes, 4, 2).tolist() == [[15, 0], [0, 15], [15, 15], [0, 15]]
        assert term.decode()[0].tolist() == pytest.approx([2 * 7 / 5, 0, 0, -9 / 3])
        assert term.table is not None
        assert term.table.tolist() == pytest.approx([-3.0, *[0.0] * 14, 2.8])


@pytest.mark.parametrize("estimator", ["unbiased", "paper"])
def test_every_class_keeps_its_mass_whatever_survives(estimator: Any) -> None:
    delta = matrix(64, 192)
    low, high = delta.min(), delta.max()
    classes = ((delta - low) / (high - low) * 15).round()
    grid = low + torch.arange(16) * (high - low) / 15
    decoded = decode([encode(UltraDelta(bits=0.5, estimator=estimator), delta)])
    term = encode(UltraDelta(bits=0.5, estimator=estimator), delta)
    codes = torch.zeros_like(delta) - 1
    codes.scatter_(1, term.mask.columns(64, 192), layout.unpack(term.codes, 4, term.num_codes).float())  # type: ignore[union-attr]
    means = torch.stack([delta[classes == k].mean() for k in range(16)]).nan_to_num()
    number = torch.stack([(classes == k).sum() for k in range(16)])
    alive = torch.stack([(codes == k).any() for k in range(16)])
    whole = float(delta.square().sum() / (number * means.square())[alive].sum())
    values = means * whole if estimator == "unbiased" else grid
    for k in range(16):
        if bool((codes == k).any()):
            assert float(decoded[codes == k].sum()) == pytest.approx(float(number[k] * values[k]), rel=1e-4)
    assert int((codes >= 0).sum()) == 64 * term.num_codes


def test_the_mean_gain_over_seeds_is_one() -> None:
    delta = matrix(32, 128)
    gains = [CodingError.of(delta, decode([encode(UltraDelta(bits=0.6), delta, Site(5, n))])).gain for n in range(80)]
    assert sum(gains) / 80 == pytest.approx(1, abs=4 * float(torch.tensor(gains).std()) / 80**0.5)


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.95, 32.9), (0.97, 50.9), (0.99, 132.5)])
def test_the_papers_ratios_are_those_of_four_bits_and_an_entropy_coded_mask(sparsity: float, ratio: float) -> None:
    """16 / (4 (1 − s) + H₂(s)), s from what survives here; DARE's 23.7 is the same with 16-bit values at s = 0.97."""
    rows, cols = 100, 8000
    term = encode(UltraDelta(bits=4 * (1 - sparsity) + 512 / (rows * cols)), matrix(rows, cols))
    kept = term.num_codes / cols
    assert kept == pytest.approx(1 - sparsity, rel=0.02)
    assert 16 / (8 * term.codes.nbytes / (rows * cols) + entropy(kept)) == pytest.approx(ratio, rel=0.02)
    assert 16 / (4 * (1 - sparsity) + entropy(sparsity)) == pytest.approx(ratio, abs=0.05)
    assert 16 / (16 * 0.03 + entropy(0.97)) == pytest.approx(23.7, abs=0.05)


def entropy(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


@pytest.mark.parametrize("shape", [(192, 576), (576, 1536), (256, 4096)], ids=str)
@pytest.mark.parametrize("bits", [0.03, 0.125, 1.7])
def test_bits_are_a_ceiling_with_the_table_counted(shape: tuple[int, int], bits: float) -> None:
    spent = 8 * encode(UltraDelta(bits=bits), torch.zeros(shape)).nbytes / (shape[0] * shape[1])
    assert 0.6 * bits < spent <= bits


def test_the_plan_gives_the_thirds_of_the_parameters_by_variance_their_sparsity() -> None:
    """Two low layers of 1000, two of 1000, one of 2000 high: s + 0.01, s, s − 0.01 at s = 0.95, in bits 4 (1 − s)."""
    layers = [layer("b", 2), layer("e", 5, 20), layer("a", 1), layer("d", 4), layer("c", 3)]
    codec = UltraDelta(bits=0.2)
    assert isinstance(codec, Planner)
    plan = codec.plan(layers)
    bits = {name: made.config()["bits"] for name, made in plan.items()}
    assert bits == pytest.approx({"a": 0.16, "b": 0.16, "c": 0.2, "d": 0.2, "e": 0.24})


def test_the_plan_keeps_the_mean_where_the_thirds_are_uneven_and_the_step_too_large() -> None:
    layers = [layer(str(n), n + 1, rows) for n, rows in enumerate((3, 50, 7, 7, 90, 1))]
    codec = UltraDelta(bits=0.06)  # s = 0.985: a step of 0.01 would leave the first third next to nothing
    bits = {name: made.config()["bits"] for name, made in codec.plan(layers).items()}
    assert min(bits.values()) == pytest.approx(0.04)
    assert sum(bits[each.name] * each.parameters for each in layers) == pytest.approx(
        0.06 * sum(each.parameters for each in layers)
    )


def test_layers_alike_and_one_layer_alone_can_be_planned() -> None:
    assert {made.config()["bits"] for made in UltraDelta(step=0.0).plan([layer("a", 0), layer("b", 0)]).values()} == {
        0.125
    }
    assert UltraDelta().plan([layer("a", 1)])["a"].config()["bits"] < 0.125
    assert UltraDelta().plan([]) == {}


def test_the_norm_is_the_trace_norm_of_the_dropped_delta_against_the_reference() -> None:
    """r = 0.3 of the base's trace norm. What the plan computes is near what the singular values say."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (128, 512), "b": (512, 128), "c": (256, 256)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    deltas = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    layers = [
        LayerStats(n, *shapes[n], float(deltas[n].norm()), float(deltas[n].std()), float(base[n].norm()))
        for n in shapes
    ]
    codec = UltraDelta(bits=0.25, step=0.0, reference=0.3)
    made = codec.plan(layers)["a"]
    assert isinstance(made, UltraDelta)
    trace = sum(float(torch.linalg.svdvals(base[name]).sum()) for name in shapes)
    dropped = sum(
        float(torch.linalg.svdvals(decode(UltraDelta(bits=0.25).encode(deltas[n], SITE))).sum()) for n in shapes
    )
    assert 0.5 < made.gamma < 1
    assert made.gamma == pytest.approx(0.3 * trace / dropped, rel=0.1)
    halved = decode(made.encode(deltas["a"], SITE))
    torch.testing.assert_close(halved, made.gamma * decode(UltraDelta(bits=0.25).encode(deltas["a"], SITE)))


@pytest.mark.parametrize(("reference", "gamma"), [(1e-6, 0.5), (100.0, 1.0)])
def test_the_norm_stays_between_a_half_and_one(reference: float, gamma: float) -> None:
    (made,) = UltraDelta(reference=reference).plan([layer("a", 1)]).values()
    assert made.config()["gamma"] == gamma


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 0.0}, "bits 0 is not in 0 … 4"),
        ({"bits": 4.5}, "bits 4.5 is not in 0 … 4"),
        ({"step": 1.0}, "step 1.0 is not in 0 … 1"),
        ({"estimator": "best"}, "estimator 'best' is not one of ('unbiased', 'paper')"),
        ({"reference": 0.0}, "reference 0.0 is not > 0"),
        ({"reference": math.inf}, "finite"),
        ({"gamma": 0.0}, "gamma 0.0 is not in 0 … 1"),
    ],
)
def test_a_bad_configuration_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CodecError) as caught:
        UltraDelta(**options)
    assert says in caught.value.message
