"""auto: which codec at which budget, and how bits are shared out among layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from deltaserve.codecs.auto import TURNED_FROM, Auto
from deltaserve.codecs.base import LayerStats
from deltaserve.codecs.higgs import Higgs
from deltaserve.codecs.seeded_vq import SeededVq
from deltaserve.codecs.shares import level_out
from deltaserve.errors import CodecError

SENSITIVITIES = [1e-3, 1e-2, 1e-1, 1.0, 3.0]


def layers(**changes: Any) -> list[LayerStats]:
    return [
        LayerStats(
            **{
                "name": f"layer.{index}",
                "rows": 192 * (1 + index % 2),
                "cols": 576,
                "norm": 1.0,
                "std": 0.003,
                "base_norm": 30.0,
                "sensitivity": sensitivity,
                **changes,
            }
        )
        for index, sensitivity in enumerate(SENSITIVITIES)
    ]


@pytest.mark.parametrize(("bits", "codec"), [(0.01, SeededVq), (0.4, SeededVq), (TURNED_FROM, Higgs), (2.0, Higgs)])
def test_sketches_at_few_bits_and_grids_at_many(bits: float, codec: type) -> None:
    plan = Auto(bits=bits).plan(layers())
    assert all(isinstance(chosen, codec) for chosen in plan.values())
    budgets = [plan[layer.name].config()["bits"] for layer in layers()]
    assert budgets == sorted(budgets)
    assert len(set(budgets)) > 1


@pytest.mark.parametrize("bits", [0.3, 1.0, 1.2, 1.3, 1.7, 2.0, 3.0])
def test_plans_fit_the_budget_and_use_it(bits: float) -> None:
    plan = Auto(bits=bits).plan(layers())
    made = [(layer, plan[layer.name]) for layer in layers()]
    cost = sum(codec.cost(layer.rows, layer.cols) for layer, codec in made if isinstance(codec, Higgs | SeededVq))
    whole = sum(layer.parameters for layer in layers())
    assert 0.85 * bits * whole <= cost <= bits * whole


def test_a_layer_that_nothing_reaches_gets_the_least() -> None:
    plan = Auto(bits=2.0).plan([*layers(), *layers(name="still", norm=0.0)[:1]])
    assert plan["still"].config()["bits"] == min(codec.config()["bits"] for codec in plan.values())


def test_bits_where_noise_halves_with_each_are_shared_as_the_optimum_of_all_shares() -> None:
    worth, parameters = {"a": 1.0, "b": 2.0, "c": 8.0}, {"a": 4, "b": 2, "c": 1}

    def noise(bits: dict[str, float]) -> float:
        return sum(parameters[name] * worth[name] ** 2 * 4 ** -bits[name] for name in worth)

    def spent(bits: Any) -> float:
        return sum(parameters[name] * bits[name] for name in worth)

    found = level_out(worth, parameters, 2.0, 9.0, lambda bits: spent(bits) <= 14.0)
    assert spent(found) == pytest.approx(14.0)
    steps = [index / 4 for index in range(25)]
    tried = [dict(zip(worth, bits, strict=True)) for bits in itertools.product(steps, repeat=3)]
    assert noise(found) <= min(noise(bits) for bits in tried if spent(bits) <= 14.0) + 1e-9


def test_without_a_budget_larger_deltas_get_more() -> None:
    small, large = (Auto().budget(layers(norm=norm)) for norm in (0.1, 3.0))
    assert small == 0.015
    assert small < large <= 1.0


@pytest.mark.parametrize("bits", [0.0, 0.002, 4.5])
def test_bits_out_of_range_are_refused(bits: float) -> None:
    with pytest.raises(CodecError, match="not in"):
        Auto(bits=bits)
