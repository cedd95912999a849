"""A comparison as one picture: what is retained, and the distance on the task and off it, against bits per parameter.

PNG and SVG. matplotlib (the extra `plot`) is imported here and nowhere else.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaserve.deltas.tensorfile import atomic_file
from deltaserve.evaluation.summary import summaries

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    from deltaserve.evaluation.results import Reference, Results
    from deltaserve.evaluation.summary import Summary

# Okabe and Ito's colours, which the colour-blind tell apart, less the yellow, and three of Tol's; then other strokes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444", "#332288", "#882255", "#999933")
STROKES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Panel:
    field: str
    title: str
    scale: float = 1
    is_log: bool = True


PANELS = (
    Panel("retained", "Accuracy retained: % of the fine-tune's exact match", 100, is_log=False),
    Panel("kl", "Distance on the task: KL(fine-tune ‖ delta), nats per token; lower is better"),
    Panel("general_kl", "Distance off the task: the same on general text; lower is better"),
)


def draw(results: Results, directory: Path) -> list[Path]:
    """Writes comparison.png and comparison.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = summaries(results)
    panels = [panel for panel in PANELS if panel.field != "general_kl" or results.setup.general_digest]
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "svg.hashsalt": "deltaserve"}):
        figure = Figure(figsize=(9.5, 1.2 + 3.3 * len(panels)), layout="constrained")
        all_axes: list[Axes] = list(figure.subplots(len(panels), sharex=True))
        labels: list[list[Annotation]] = []
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw_references(axes, panel, results.references)
            labels.append(draw_panel(axes, panel, rows))
        _draw_sizes(all_axes[0], all_axes[-1], rows)
        setup = results.setup
        figure.suptitle(f"{setup.finetuned} as a delta on {setup.base}, {setup.rows} rows", x=0.01, ha="left", size=13)
        figure.draw_without_rendering()  # places are known from here on
        for own in labels:
            separate(own)
        written = []
        for suffix, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=160, metadata=metadata)
            written.append(directory / f"comparison.{suffix}")
            with atomic_file(written[-1]) as file:
                file.write(buffer.getvalue())
    return written


def draw_panel(axes: Axes, panel: Panel, rows: Sequence[Summary], codecs: Sequence[str] = ()) -> list[Annotation]:
    """A line for every codec, in the colour of its place among `codecs`; → their names, each at the smallest file."""
    from matplotlib.ticker import FuncFormatter

    labels = []
    axes.set_title(panel.title, pad=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for index, codec in enumerate(codecs or sorted({row.codec for row in rows})):
        # a delta that loses nothing has no place on a logarithmic axis
        own = [row for row in rows if row.codec == codec and (row.mean(panel.field) or not panel.is_log)]
        own = [row for row in own if row.values(panel.field)]
        if not own:
            continue
        x = [row.mean("bits_per_parameter") or 0 for row in own]
        y = [(row.mean(panel.field) or 0) * panel.scale for row in own]
        below = [mean - min(row.values(panel.field)) * panel.scale for row, mean in zip(own, y, strict=True)]
        above = [max(row.values(panel.field)) * panel.scale - mean for row, mean in zip(own, y, strict=True)]
        colour, stroke = COLOURS[index % len(COLOURS)], STROKES[index // len(COLOURS) % len(STROKES)]
        axes.errorbar(
            x, y, [below, above], color=colour, linestyle=stroke, marker=MARKERS[index % len(MARKERS)], ms=4.5, lw=1.6
        )
        labels.append(_label(axes, codec, (x[-1], y[-1]), colour))
    return labels


def _draw_references(axes: Axes, panel: Panel, references: dict[str, Reference]) -> None:
    finetuned, base = references.get("finetuned"), references.get("base")
    if panel.field != "retained":
        if base and (distance := getattr(base, panel.field)):
            _draw_level(axes, distance, ":", f"the base alone: {distance:.3g}", "left")
    elif finetuned and finetuned.exact_match:
        _draw_level(axes, 100, "-", f"the fine-tune itself: {finetuned.exact_match:.1%} exact match", "right")
        if base:
            share = 100 * base.exact_match / finetuned.exact_match
            _draw_level(axes, share, ":", f"the base alone: {base.exact_match:.1%}", "left")
    else:
        axes.text(0.5, 0.5, "the fine-tune scores 0 %: nothing to retain", transform=axes.transAxes, ha="center")


def _draw_level(axes: Axes, y: float, stroke: str, text: str, side: Literal["left", "right"]) -> None:
    axes.axhline(y, color="black", linestyle=stroke, linewidth=1, zorder=1)
    x, shift = (0, 3) if side == "left" else (1, -3)
    place = axes.get_yaxis_transform()
    axes.annotate(text, (x, y), (shift, 3), xycoords=place, textcoords="offset points", ha=side, size=8)


def _draw_sizes(top: Axes, bottom: Axes, rows: Sequence[Summary]) -> None:
    """Bits per parameter below, file size above; both fall to the right."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bottom.set_xscale("log")
    bottom.invert_xaxis()
    bottom.margins(x=0.12)
    ticks = [2.0**power for power in range(-12, 5)]
    low, high = sorted(bottom.get_xlim())
    bottom.set_xticks([tick for tick in ticks if low <= tick <= high])
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:.3g}"))
    bottom.xaxis.set_minor_formatter(NullFormatter())
    bottom.set_xlabel("bits per parameter, every byte of the file counted (smaller to the right)")
    if rows:
        result = rows[0].results[0]
        megabytes = result.file_bytes / result.bits_per_parameter / 1e6  # of one bit per parameter
        sizes = top.secondary_xaxis(
            "top", functions=(lambda x: np.multiply(x, megabytes), lambda x: np.divide(x, megabytes))
        )
        sizes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:.3g} MB"))
        sizes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, text: str, at: tuple[float, float], colour: str) -> Annotation:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    return axes.annotate(
        text, at, (7, 0), textcoords="offset points", va="center", color=colour, path_effects=halo, zorder=5
    )


def separate(labels: Sequence[Annotation]) -> None:
    """Moves labels up and down until none covers another."""
    boxes = [label.get_window_extent() for label in labels]
    shifts = [0.0] * len(labels)  # pixels, upward
    for _ in range(200):
        moved = False
        for i, j in itertools.combinations(range(len(labels)), 2):
            a, b = boxes[i], boxes[j]
            overlap = (a.height + b.height) / 2 - abs(a.y0 + shifts[i] - b.y0 - shifts[j])
            if overlap > 0.5 and a.x0 < b.x1 and b.x0 < a.x1:
                sign = 1 if (a.y0 + shifts[i], i) > (b.y0 + shifts[j], j) else -1
                shifts[i] += sign * overlap / 2
                shifts[j] -= sign * overlap / 2
                moved = True
        if not moved:
            break
    for label, shift in zip(labels, shifts, strict=True):
        label.set_position((7, shift * 72 / label.figure.dpi))
