"""seeded-vq: the search, the gain, what noise follows, and the bits it takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.auto import Auto
from deltaserve.codecs.base import CodingError, LayerStats, Site, decode
from deltaserve.codecs.seeded_vq import LEVELS_FROM, SeededVq
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Book, Codebook, Rotated

SITE = Site(number=5, seed=7)


def matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def test_every_block_gets_the_vector_that_lies_nearest_to_its_line() -> None:
    delta = matrix(6, 400)
    codec = SeededVq(bits=0.0625, code_bits=5, boost=0)
    (term,) = codec.encode(delta, SITE)
    assert isinstance(term, Codebook)
    table = Book("seeded").table(4, term.length)
    levels = term.row_scales()
    first = (delta / levels)[:, : term.length]
    index, sign = term.indices()
    assert sign is not None
    product = first @ table.T
    chosen = product.gather(1, index[0, :, :1]).flatten()
    assert bool((chosen.abs() >= 0.98 * product.abs().amax(1)).all())  # compared in bfloat16
    assert torch.equal(sign[0, :, 0].sign(), chosen.sign())


@pytest.mark.parametrize("bits", [0.01, 0.03, 0.06, 0.25, 1.0])
def test_the_sketch_is_unbiased(bits: float) -> None:
    delta = matrix(96, 192)
    assert CodingError.of(delta, decode(SeededVq(bits=bits).encode(delta, SITE))).gain == pytest.approx(1, abs=1e-5)


def test_noise_is_what_the_rate_allows() -> None:
    """‖N‖² ≈ ‖Δ‖² / (c · bits) at low rates, c near 1; far less than ‖Δ‖² at a bit."""
    delta = matrix(192, 576)
    error = CodingError.of(delta, decode(SeededVq(bits=0.0625).encode(delta, SITE)))
    assert 0.8 < 1 / (error.relative**2 * 0.0625) < 1.4
    assert CodingError.of(delta, decode(SeededVq(bits=1.0).encode(delta, SITE))).relative < 0.9


def test_stages_take_turns_at_as_many_tables_as_a_token_may_be_multiplied_with() -> None:
    """c stays near 1 with every stage: with one table for all it fell to 0.92 at half a bit (decision 0028)."""
    delta = matrix(192, 576)
    for bits, turns in ((0.06, 1), (0.125, 2), (0.25, 4), (0.5, 4)):
        (term,) = SeededVq(bits=bits).encode(delta, SITE)
        assert isinstance(term, Codebook) and term.turns == turns
        noise = CodingError.of(delta, term.decode()).relative ** 2
        assert math.log1p(1 / noise) / bits > 1.03
    (wide,) = SeededVq(bits=0.5).encode(matrix(8, 8192), SITE)
    assert isinstance(wide, Codebook) and wide.turns * wide.segments << wide.index_bits <= 2**17


def test_columns_of_large_activations_get_less_noise() -> None:
    delta, energy = matrix(96, 192), torch.ones(192)
    energy[7] = 2.0**12
    decoded = decode(SeededVq(bits=0.06).encode(delta, Site(5, 7, gram=torch.diag(energy))))
    noise = (delta - decoded).square().mean(0)
    assert noise[7] < noise.median() / 16
    plain = decode(SeededVq(bits=0.06, boost=0).encode(delta, Site(5, 7, gram=torch.diag(energy))))
    assert (delta - plain).square().mean(0)[7] > noise[7] * 8


def test_rows_are_made_equal_by_levels_or_by_a_rotation() -> None:
    delta = matrix(64, 576) * torch.logspace(-0.4, 0.4, 64)[:, None]
    (levelled,) = SeededVq(bits=LEVELS_FROM).encode(delta, SITE)
    assert isinstance(levelled, Codebook) and levelled.levels is not None
    (rotated,) = SeededVq(bits=LEVELS_FROM / 2).encode(delta, SITE)
    assert isinstance(rotated, Rotated) and rotated.t_out is not None
    for term in (levelled, rotated):
        decoded = term.decode()
        gains = (delta * decoded).sum(1) / delta.square().sum(1)
        assert 0.5 < gains[:32].mean() / gains[32:].mean() < 2


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)])
@pytest.mark.parametrize("bits", [0.004, 0.0075, 0.03, 0.125, 0.5, 2.0])
def test_the_bits_are_near_what_was_asked(shape: tuple[int, int], bits: float) -> None:
    cost = SeededVq(bits=bits).cost(*shape) / math.prod(shape)
    assert cost == pytest.approx(bits, rel=0.35)


def layers(sensitivities: list[float]) -> list[LayerStats]:
    return [
        LayerStats(f"layers.{i}.weight", 576, 576, norm=1.0, std=1 / 576, base_norm=50.0, sensitivity=s)
        for i, s in enumerate(sensitivities)
    ]


def test_a_plan_fits_the_budget_and_gives_more_where_the_curvature_is() -> None:
    stats = layers([1.0, 4.0, 100.0])
    plan = SeededVq(bits=0.1).plan(stats)
    rates = [plan[layer.name].bits for layer in stats]
    assert rates == sorted(rates) and rates[0] < rates[-1]
    assert sum(plan[layer.name].cost(layer.rows, layer.cols) for layer in stats) <= 0.1 * 3 * 576 * 576
    assert max(rates) <= 0.3 + 1e-9 and min(rates) >= 0.1 / 3 - 1e-9


def test_auto_takes_what_the_tenant_needs() -> None:
    small, large = layers([1.0]), [LayerStats("x", 576, 576, norm=1.5, std=0.01, base_norm=50.0)]
    assert Auto().budget(small) < Auto().budget(large) <= 1
    assert Auto(bits=0.2).budget(large) == 0.2
    assert Auto(noise=0.08).budget(large) < Auto().budget(large)


@pytest.mark.parametrize(
    "options",
    [{"bits": 0}, {"bits": 5}, {"bits": math.nan}, {"code_bits": 1}, {"code_bits": 17}, {"code_bits": 2.5}]
    + [{"boost": -1}, {"boost": 3}, {"spread": 0.5}],
)
def test_a_setting_out_of_range_is_named(options: dict[str, float]) -> None:
    with pytest.raises(CodecError, match=f"seeded-vq: {next(iter(options))}"):
        SeededVq(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"bits": 0.001}, {"bits": 9}, {"noise": 0}, {"noise": 2}])
def test_auto_names_a_setting_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(CodecError, match=f"auto: {next(iter(options))}"):
        Auto(**options)
