"""How many bits each rank of a low-rank product gets: Delta-CoMe's fixed groups, DeltaMix' 0/1 program.

    min Σ_i E[i, o_i]    s.t.  Σ_o bytes(o, number of ranks at o) ≤ budget,  the options in use within one of `subsets`

Option 0 drops a rank. Were bytes linear in ranks, this would be a multiple-choice knapsack: for a multiplier λ every
rank chooses by itself, min_o E[i, o] + λ · bytes(o), and Σ of these minima − λ · budget is a bound on what can be had.
So: λ by bisection, for all subsets at once and on true bytes; then a local search, subset by subset in the order of
their bounds, until a bound is above what was found. Ours; DeltaMix' authors use a solver, which the tests compare.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels import layout

PAPER_RANKS = {8: 2, 3: 32, 2: 968}  # Delta-CoMe's ranks by bits, for 4096 × 4096
TOGETHER = 4  # ranks of one move; as many of 2 bits as a byte holds
STEPS = 40  # of the bisection, between the multiplier that drops all and 2^-60 of it


def group_bytes(ranks: int, rows: int, cols: int, u_bits: int, v_bits: int, group: int | None = None) -> int:
    """Of the term of `ranks` ranks: levels, s, and the steps of groups."""
    levels = rows * layout.packed_bytes(ranks, u_bits) + ranks * layout.packed_bytes(cols, v_bits)
    steps = 2 * (rows * -(-ranks // group) + ranks * -(-cols // group)) if group else 0
    return levels + steps + 4 * ranks


def paper_groups(ranks: int) -> dict[int, int]:
    """Ranks by bits, the widest first: Delta-CoMe's shares of `ranks`, rounded up but for the last."""
    rest, groups = ranks, {}
    for bits, number in PAPER_RANKS.items():
        groups[bits] = rest if bits == 2 else min(rest, -(-number * ranks // sum(PAPER_RANKS.values())))
        rest -= groups[bits]
    return groups


def paper_widths(shape: Sequence[int], ranks: int, bits: float, group: int | None = None) -> Tensor:
    """int64 [n], n ≤ ranks: bits by rank, as many ranks as `bits` per parameter pay for; one of 2 bits at least."""
    rows, cols = shape

    def affordable(number: int) -> bool:
        size = sum(group_bytes(n, rows, cols, b, b, group) for b, n in paper_groups(number).items() if n)
        return 8 * size <= bits * rows * cols

    low, high = 0, ranks
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle - 1)
    groups = paper_groups(low) if low else {2: 1}
    return torch.tensor([b for b, number in groups.items() for _ in range(number)])


def allocate(errors: Tensor, sizes: Tensor, subsets: Sequence[Sequence[int]], budget: int) -> Tensor:
    """int64 [k], the option of each rank.

    errors float64 [k, 1 + O]; sizes int64 [1 + O, k + 1]: bytes of an option by its number of ranks, 0 for option 0;
    subsets of 1 … O, all of one length.
    """
    count = len(errors)
    options = torch.tensor([(0, *subset) for subset in subsets])  # [S, 1 + w]
    error = errors[:, options].transpose(0, 1)  # [S, k, 1 + w]
    size = sizes[options]  # [S, 1 + w, k + 1]
    slope = (size[:, :, 1:] / torch.arange(1.0, count + 1, dtype=torch.float64)).amin(2)[:, None]  # [S, 1, 1 + w]
    high = 2 * errors[:, 0].max() / slope[:, :, 1:].amin((1, 2))  # [S]: drops all
    low = high * 2.0**-60
    choice = torch.zeros(error.shape[:2], dtype=torch.int64)
    for _ in range(STEPS):
        middle = (low * high).sqrt()
        picked = (error + middle[:, None, None] * slope).argmin(2)  # [S, k]
        numbers = torch.nn.functional.one_hot(picked, options.shape[1]).sum(1)  # [S, 1 + w]
        fits = size.gather(2, numbers[..., None]).sum((1, 2)) <= budget
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        choice[fits] = picked[fits]
    bounds = (error + high[:, None, None] * slope).amin(2).sum(1) - high * budget
    best, least = choice[0], math.inf
    for subset in bounds.argsort().tolist():
        if float(bounds[subset]) >= least:
            break
        found = improve(error[subset], size[subset], choice[subset], budget)
        total = float(error[subset].gather(1, found[:, None]).sum())
        if total < least:
            best, least = options[subset][found], total
    return best


def improve(errors: Tensor, sizes: Tensor, choice: Tensor, budget: int) -> Tensor:
    """Local search: up to TOGETHER ranks of one option to another, alone or along with another such move, as long as
    the bytes fit and the error falls. Rows of U are whole bytes, so that single ranks often do not pay."""
    count, options = errors.shape
    choice = choice.clone()
    enough = 1e-12 * float(errors[:, 0].sum())
    while True:
        gains = errors.gather(1, choice[:, None]) - errors  # [k, to]
        moves = [(torch.empty(0, dtype=torch.int64), 0)]  # ranks, their new option; the first moves nothing
        gained, shifts = [0.0], [[0] * options]
        for source, target in itertools.permutations(range(options), 2):
            members = (choice == source).nonzero()[:, 0]
            top = gains[members, target].topk(min(TOGETHER, len(members)))
            for number, gain in enumerate(top.values.cumsum(0).tolist(), 1):
                moves.append((members[top.indices[:number]], target))
                gained.append(gain)
                shifts.append([number * ((option == target) - (option == source)) for option in range(options)])
        shift, gain = torch.tensor(shifts), torch.tensor(gained, dtype=torch.float64)
        numbers = torch.bincount(choice, minlength=options) + shift[:, None] + shift  # [moves, moves, options]
        bytes_ = sizes.gather(1, numbers.flatten(0, 1).T.clamp(0, count)).sum(0).view(len(moves), -1)
        touched = torch.zeros(len(moves), count)
        for row, (ranks, _) in zip(touched, moves, strict=True):
            row[ranks] = 1
        allowed = (touched @ touched.T == 0) & (bytes_ <= budget)
        total = torch.where(allowed, gain[:, None] + gain, 0)
        if float(total.max()) <= enough:
            return choice
        for move in divmod(int(total.argmax()), len(moves)):
            ranks, target = moves[move]
            choice[ranks] = target
