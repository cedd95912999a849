"""Samples → figures → a table or a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from deltaserve.bench.targets import Sample

COLUMNS = {
    "requests": "asked",
    "failed": "failed",
    "tokens_per_s": "tok/s",
    "ttft_p50_ms": "TTFT p50",
    "ttft_p90_ms": "p90",
    "ttft_p99_ms": "p99",
    "tpot_p50_ms": "TPOT p50",
    "tpot_p99_ms": "p99",
    "cached_tokens": "cached",
}


def by(samples: Iterable[Sample], key: Callable[[Sample], str]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    return dict(sorted(groups.items()))


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Of the requests that were answered; None where there is none."""
    good = [sample for sample in samples if sample.error is None]
    first = min((sample.due_s for sample in good), default=0.0)
    last = max((sample.last_s for sample in good if sample.last_s is not None), default=0.0)
    tokens = sum(sample.num_tokens for sample in good)
    ttft, tpot = [s.ttft_s for s in good], [s.tpot_s for s in good]
    return {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "tokens": tokens,
        "seconds": round(last - first, 3),
        "tokens_per_s": round(tokens / (last - first), 1) if last > first else None,
        **{f"ttft_p{p}_ms": _percentile(ttft, p) for p in (50, 90, 99)},
        **{f"tpot_p{p}_ms": _percentile(tpot, p) for p in (50, 99)},
        "cached_tokens": sum(sample.num_cached for sample in good),
    }


def table(groups: dict[str, dict[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption="times in ms")
    made.add_column("", overflow="fold")
    for title in COLUMNS.values():
        made.add_column(title, justify="right", no_wrap=True)
    for name, own in groups.items():
        made.add_row(name, *("" if own[field] is None else str(own[field]) for field in COLUMNS))
    return made


def draw(groups: dict[str, list[Sample]], file: Path) -> None:
    """Time to first token of each group: the share of its requests that had one by then. PNG or SVG, by the name."""
    from matplotlib.figure import Figure  # the extra `plot`

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    for name, samples in groups.items():
        times = sorted(sample.ttft_s * 1e3 for sample in samples if sample.ttft_s is not None)
        axes.step(times, [(place + 1) / len(samples) for place in range(len(times))], where="post", label=name)
    axes.set(xlabel="time to first token, ms", ylabel="share of requests", xscale="log", ylim=(0, 1))
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    picture.savefig(file)


def _percentile(values: Iterable[float | None], percent: int) -> float | None:
    found = [value for value in values if value is not None]
    return round(float(np.percentile(found, percent)) * 1e3, 1) if found else None
