"""Bits by rank: Delta-CoMe's groups, and the 0/1 program against brute force and a solver."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from deltaserve.codecs.rank_widths import (
    allocate,
    group_bytes,
    paper_groups,
    paper_widths,
)
from deltaserve_kernels.layout import planes

WIDTHS = (2, 3, 4, 6)


def test_groups_shrink_together_and_the_widest_is_last_to_go() -> None:
    assert [list(paper_groups(n).values()) for n in (1, 2, 3, 70, 501)] == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [1, 3, 66],
        [1, 16, 484],
    ]


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("bits", [0.1, 0.5, 1.0])
def test_as_many_ranks_as_the_bits_pay_for(bits: float, group: int | None) -> None:
    widths = paper_widths((192, 576), 192, bits, group)

    def size(groups: dict[int, int]) -> float:
        return 8 * sum(group_bytes(n, 192, 576, b, b, group) for b, n in groups.items() if n) / (192 * 576)

    assert size({b: widths.tolist().count(b) for b in (8, 3, 2)}) <= bits < size(paper_groups(len(widths) + 1))
    assert widths.tolist() == sorted(widths.tolist(), reverse=True)


def test_one_rank_of_two_bits_is_always_kept() -> None:
    assert paper_widths((192, 576), 192, 1e-6).tolist() == [2]


def test_more_bits_than_ranks() -> None:
    assert paper_widths((20, 20), 20, 100.0).tolist() == [8, 3] + [2] * 18


def program(count: int, rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Errors that fall with rank and bits as a fine-tune's do, and the bytes."""
    power = torch.linspace(0, -4, count).exp() * torch.rand(count, generator=torch.Generator().manual_seed(seed))
    rates = torch.tensor([1.0, *(4.0**-b for b in WIDTHS)]) * torch.tensor([1.0, 2.0, 1.9, 2.1, 2.0])
    sizes = [[0] * (count + 1)] + [[group_bytes(n, rows, cols, b, b) for n in range(count + 1)] for b in WIDTHS]
    return (power[:, None] * rates).double(), torch.tensor(sizes)


def spent(sizes: Tensor, choices: Tensor) -> Tensor:
    """int64 [...] of choices [..., k]"""
    return torch.stack([sizes[o][(choices == o).sum(-1)] for o in range(len(sizes))]).sum(0)


def total(errors: Tensor, choices: Tensor) -> Tensor:
    """float64 [...] of choices [..., k]"""
    return errors[torch.arange(len(errors)), choices].sum(-1)


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [40, 75, 110])
def test_the_program_against_every_choice_there_is(most: int, budget: int) -> None:
    errors, sizes = program(5, 12, 20, seed=budget)
    choice = allocate(errors, sizes, list(itertools.combinations(range(1, 5), most)), budget)
    assert spent(sizes, choice) <= budget
    assert len(set(choice.tolist()) - {0}) <= most
    every = torch.cartesian_prod(*[torch.arange(5)] * 5)  # [3125, 5]
    used = torch.stack([(every == o).any(1) for o in range(1, 5)], 1).sum(1)
    allowed = every[(used <= most) & (spent(sizes, every) <= budget)]
    assert total(errors, choice) <= 1.02 * total(errors, allowed).min()


def test_nothing_is_bought_for_nothing() -> None:
    errors, sizes = program(6, 12, 20)
    assert not allocate(errors, sizes, [(1, 2)], 0).any()
    assert not allocate(torch.zeros(6, 5, dtype=torch.float64), sizes, [(1, 2)], 10**6).any()
    assert (allocate(errors, sizes, [(1, 4)], 10**6) == 4).all()


def test_only_options_of_one_subset_are_mixed() -> None:
    errors, sizes = program(40, 64, 64)
    used = set(allocate(errors, sizes, [(1, 3), (2, 4)], 600).tolist()) - {0}
    assert used <= {1, 3} or used <= {2, 4}


def optimum(errors: Tensor, rows: int, cols: int, most: int, budget: int) -> Any:
    """HiGHS on the same program: x[i, o], whole bytes of a row of U by option and plane, z[o] for options in use."""
    count = len(errors)
    byte_planes = [(o, width) for o, bits in enumerate(WIDTHS, 1) for width in planes(bits)]
    free, first_byte = count * 5 + len(byte_planes) + 4, count * 5
    constraints: list[tuple[Tensor, float, float]] = []
    choices = torch.arange(first_byte).view(count, 5)
    paid = torch.zeros(free)
    for o in range(1, 5):
        paid[choices[:, o]] = group_bytes(1, 0, cols, WIDTHS[o - 1], WIDTHS[o - 1])
        used = torch.zeros(free)
        used[choices[:, o]], used[free - 5 + o] = 1, -count
        constraints.append((used, -torch.inf, 0))
    for index, (o, width) in enumerate(byte_planes):
        paid[first_byte + index] = rows
        whole = torch.zeros(free)
        whole[choices[:, o]], whole[first_byte + index] = width, -8
        constraints.append((whole, -torch.inf, 0))
    constraints.append((paid, -torch.inf, budget))
    constraints.append((torch.tensor([0.0] * (free - 4) + [1.0] * 4), 0, most))
    for i in range(count):
        one = torch.zeros(free)
        one[choices[i]] = 1
        constraints.append((one, 1, 1))
    matrix, low, high = (torch.stack([torch.as_tensor(c[part]) for c in constraints]).numpy() for part in range(3))
    upper = torch.ones(free)
    upper[first_byte : free - 4] = count
    return milp(
        torch.cat((errors.flatten(), torch.zeros(free - first_byte))).numpy(),
        constraints=LinearConstraint(matrix, low, high),
        bounds=Bounds(0, upper.numpy()),
        integrality=torch.ones(free).numpy(),
        options={"mip_rel_gap": 0},
    )


@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_program_is_solved_as_by_a_solver_for_ten_ranks(seed: int, most: int) -> None:
    errors, sizes = program(10, 12, 20, seed)
    subsets = list(itertools.combinations(range(1, 5), most))
    for budget in (60, 120):
        choice = allocate(errors, sizes, subsets, budget)
        assert spent(sizes, choice) <= budget
        assert float(total(errors, choice)) == pytest.approx(optimum(errors, 12, 20, most, budget).fun, rel=1e-6)


@pytest.mark.parametrize("budget", [1000, 4000])
def test_the_program_is_within_two_percent_of_a_solver_for_more(budget: int) -> None:
    errors, sizes = program(30, 96, 128)
    subsets = list(itertools.combinations(range(1, 5), 3))
    found = float(total(errors, allocate(errors, sizes, subsets, budget)))
    best = optimum(errors, 96, 128, 3, budget).fun
    assert best * (1 - 1e-6) <= found <= 1.02 * best
