"""Arrivals are those that were asked for, the same for a seed, and one model's do not depend on the others."""

from __future__ import annotations

from collections import Counter

import pytest

from deltaserve.bench.workload import Lengths, at_once, parse_range, poisson, shares
from deltaserve.errors import BadRequest

LENGTHS = Lengths(prompt=(5, 20), answer=(1, 9), prefix=8, vocab_size=100)


def test_popularities() -> None:
    models = ["a", "b", "c"]
    assert shares("identical", models) == {"a": 1.0}
    assert shares("uniform", models) == dict.fromkeys(models, 1 / 3)
    assert shares("zipf:1", models) == pytest.approx({"a": 6 / 11, "b": 3 / 11, "c": 2 / 11})
    for bad in ("zipf:x", "normal"):
        with pytest.raises(BadRequest, match="identical, uniform, or zipf:S"):
            shares(bad, models)


def test_arrivals_have_their_rate_and_come_in_order() -> None:
    jobs = poisson({"a": 20.0, "b": 5.0, "c": 0.0}, 100.0, LENGTHS, 1)
    counts = Counter(job.model for job in jobs)
    assert 1850 < counts["a"] < 2150
    assert 430 < counts["b"] < 570
    assert counts["c"] == 0
    assert [job.due_s for job in jobs] == sorted(job.due_s for job in jobs)
    assert max(job.due_s for job in jobs) < 100


def test_a_models_own_arrivals_do_not_depend_on_who_else_asks() -> None:
    alone = poisson({"a": 2.0}, 50.0, LENGTHS, 7)
    among = poisson({"b": 9.0, "a": 2.0}, 50.0, LENGTHS, 7)
    assert [job for job in among if job.model == "a"] == alone
    assert poisson({"a": 2.0}, 50.0, LENGTHS, 8) != alone


def test_lengths_are_in_their_ranges_and_a_models_prompts_begin_alike() -> None:
    jobs = poisson({"a": 20.0, "b": 20.0}, 20.0, LENGTHS, 1)
    assert {len(job.prompt) for job in jobs} == set(range(5, 21))
    assert {job.max_tokens for job in jobs} == set(range(1, 10))
    assert all(0 <= token < 100 for job in jobs for token in job.prompt)
    starts = {(job.model, tuple(job.prompt[:8])) for job in jobs if len(job.prompt) >= 8}
    assert len(starts) == 2
    assert len({tuple(job.prompt) for job in jobs if len(job.prompt) > 12}) > 100


def test_all_at_once_is_shared_out_by_weight_and_mixed() -> None:
    jobs = at_once({"a": 2.0, "b": 1.0}, 9, LENGTHS, 1)
    assert [job.model for job in jobs] == ["a", "b", "a"] * 3
    assert {job.due_s for job in jobs} == {0.0}


def test_ranges() -> None:
    assert (parse_range("64"), parse_range("1:9")) == ((64, 64), (1, 9))
    for bad in ("0", "9:1", "x", "1:x"):
        with pytest.raises(ValueError, match=r"LEAST|invalid literal"):
            parse_range(bad)
