"""Comparisons of several fine-tunes as one: every codec beside `auto` at each size, on all of them.

    python tests/benchmarks/tenants_table.py DIR … -o OUT        DIR: written by `deltaserve compare`

Retained: a fine-tune's share of its own exact match, and the mean over fine-tunes. Against auto: exact match of `auto`
at that budget less the codec's, in points, over the rows of all fine-tunes that have both (95 %, paired bootstrap). A
codec of one fixed rate stands beside the largest `auto` that is not larger. "<10": it kept less than 10 % at a larger
budget, and was not measured at this one. "×": it has no such size. Nothing: not measured. All of it is seed 0; other
seeds of codecs that draw stand below.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from deltaserve.evaluation.bootstrap import bootstrap_difference
from deltaserve.evaluation.picture import PANELS, draw_panel, separate
from deltaserve.evaluation.results import Missing, Result, Setup, read_lines
from deltaserve.evaluation.summary import Summary

AUTO = "auto"
GIVEN_UP = 0.1  # retained at a larger budget


class Tenant:
    """What one directory holds."""

    def __init__(self, directory: Path) -> None:
        lines = read_lines(directory / "comparison.jsonl")
        self.setup = next(line for line in lines if isinstance(line, Setup))
        self.name = self.setup.finetuned
        measured = sorted((line for line in lines if isinstance(line, Result)), key=lambda one: one.seed)
        self.results = {(one.codec, one.budget): one for one in measured if not one.seed}
        self.other_seeds = [one for one in measured if one.seed]
        self.unreachable = {(line.codec, line.budget) for line in lines if isinstance(line, Missing)}

    def of(self, codec: str, budget: float | None) -> Result | None:
        return self.results.get((codec, budget))

    def share(self, codec: str, budget: float | None) -> str:
        """What is retained, in per cent, or why nothing is known."""
        one = self.of(codec, budget)
        if one:
            return "" if one.retained is None else f"{100 * one.retained:.1f}"
        larger = (r for r in self.results.values() if r.codec == codec and budget and (r.budget or 0) > budget)
        if any(r.retained is not None and r.retained < GIVEN_UP for r in larger):
            return "<10"
        return "×" if (codec, budget) in self.unreachable else ""

    def auto_beside(self, other: Result) -> Result | None:
        if other.budget is not None:
            return self.of(AUTO, other.budget)
        smaller = [
            one
            for one in self.results.values()
            if one.codec == AUTO and one.bits_per_parameter <= 1.02 * other.bits_per_parameter
        ]
        return max(smaller, key=lambda one: one.bits_per_parameter, default=None)


def table(tenants: Sequence[Tenant]) -> str:
    measured = {(one.codec, one.budget) for tenant in tenants for one in tenant.results.values()}
    budgets = sorted({budget for _, budget in measured if budget is not None}, reverse=True)
    given_up = {
        (codec, budget)
        for codec, budget in itertools.product({codec for codec, _ in measured}, budgets)
        if any(tenant.share(codec, budget) == "<10" for tenant in tenants)
    }
    cells = measured | given_up
    head = ["codec", "bits", *(f"{tenant.name} %" for tenant in tenants), "mean %", "auto − it, points"]
    head += ["KL on", "KL off", "MB resident", "compress s"]
    lines = [_row(["budget", *head]), _row(["---:", "---", *["---:"] * (len(head) - 1)])]
    for budget in [*budgets, None]:
        names = sorted({codec for codec, bits in cells if bits == budget})
        rows = [(codec, [tenant.of(codec, budget) for tenant in tenants]) for codec in names]
        rows.sort(key=lambda row: -fmean([one.retained or 0 for one in row[1] if one] or [0]))
        for codec, results in rows:
            lines.append(_row(["fixed" if budget is None else f"{budget:g}", *_cells(codec, budget, results, tenants)]))
    return "\n".join(lines) + "\n"


def _cells(codec: str, budget: float | None, results: Sequence[Result | None], tenants: Sequence[Tenant]) -> list[str]:
    own = [one for one in results if one]
    shares = [tenant.share(codec, budget) for tenant in tenants]
    if not own:
        return [f"`{codec}`", "", *shares, *[""] * 6]
    is_whole = len(own) == len(tenants)
    over = " †" if any(one.is_over for one in own) else ""
    return [
        f"`{codec}`",
        f"{fmean(one.bits_per_parameter for one in own):.4g}{over}",
        *shares,
        f"{100 * fmean(one.retained or 0 for one in own):.1f}" if is_whole else "",
        "" if codec == AUTO else _against_auto(results, tenants),
        f"{fmean(one.kl or 0 for one in own):.2g}",
        f"{fmean(one.general_kl or 0 for one in own):.2g}",
        f"{fmean(one.resident_bytes for one in own) / 1e6:.3g}",
        f"{fmean(one.compress_s for one in own):.0f}",
    ]


def _against_auto(results: Sequence[Result | None], tenants: Sequence[Tenant]) -> str:
    pairs = [(tenant.auto_beside(one), one) for tenant, one in zip(tenants, results, strict=True) if one]
    both = [(ours, other) for ours, other in pairs if ours]
    if not both:
        return ""
    hits = ([float(hit) for pair in both for hit in pair[side].hits] for side in (0, 1))
    mean, low, high = (100 * value for value in bootstrap_difference(*hits))
    return f"{mean:+.1f} ({low:+.1f} … {high:+.1f})"


def spread(tenants: Sequence[Tenant]) -> str:
    """What was measured with several seeds, one after the other."""
    head = ["fine-tune", "budget", "codec", "retained %", "KL on", "KL off"]
    lines = []
    for tenant in tenants:
        for budget, codec in sorted({(one.budget or 0, one.codec) for one in tenant.other_seeds}, reverse=True):
            every = [*tenant.results.values(), *tenant.other_seeds]
            seeds = [one for one in every if (one.budget or 0, one.codec) == (budget, codec)]
            values = (
                " · ".join(f"{100 * (one.retained or 0):.1f}" for one in seeds),
                " · ".join(f"{one.kl or 0:.2g}" for one in seeds),
                " · ".join(f"{one.general_kl or 0:.2g}" for one in seeds),
            )
            lines.append(_row([tenant.name, f"{budget:g}", f"`{codec}`", *values]))
    return "\n".join(["", _row(head), _row(["---", "---:", *["---"] * (len(head) - 2)]), *lines, ""]) if lines else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(tenants: Sequence[Tenant], path: Path) -> None:
    """A column a fine-tune, a row a measure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(tenants), 3.4 * len(PANELS)), layout="constrained")
    grid = figure.subplots(len(PANELS), len(tenants), sharex=True, sharey="row", squeeze=False)
    grid[0][0].set_xscale("log")
    grid[0][0].invert_xaxis()
    codecs = sorted({one.codec for tenant in tenants for one in tenant.results.values()})
    labels = []
    for (row, panel), (column, tenant) in itertools.product(enumerate(PANELS), enumerate(tenants)):
        results = sorted(tenant.results.values(), key=lambda one: -one.bits_per_parameter)
        summaries = [Summary(one.codec, one.budget, [one]) for one in results]
        labels.append(draw_panel(grid[row][column], panel, summaries, codecs))
        grid[row][column].set_title(tenant.name if row == 0 else "")
        grid[row][0].set_ylabel(panel.title.partition(":")[0])
    grid[0][0].margins(x=0.12)
    for axes in grid[-1]:
        axes.set_xlabel("bits per parameter, every byte of the file counted")
    figure.draw_without_rendering()  # places are known from here on
    for own in labels:
        separate(own)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path)
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True)
    args = parser.parse_args()
    tenants = [Tenant(directory) for directory in args.directories]
    args.output.mkdir(parents=True, exist_ok=True)
    whole = table(tenants) + spread(tenants)
    (args.output / "tenants.md").write_text(whole, encoding="utf-8")
    draw(tenants, args.output / "tenants.png")
    sys.stdout.write(whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
