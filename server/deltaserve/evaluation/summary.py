"""A comparison in words: one row for a codec at a budget, whatever the number of its seeds. Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from deltaserve.evaluation.bootstrap import bootstrap_difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaserve.evaluation.results import Reference, Result, Results

HEADINGS = (
    "bits/parameter",
    "codec",
    "budget",
    "file",
    "of a full copy",
    "exact match",
    "retained",
    "against the fine-tune, points",
    "KL, task",
    "top-1 agreement",
    "KL, general",
    "compress",
    "peak memory",
)
NOTES = (
    "Bits per parameter: every byte of the file, over the parameters of the compressed matrices. "
    "KL(fine-tune ‖ delta) in nats per token, on the task's answers and on general text. "
    "Intervals: 95 %, paired bootstrap over the rows. ± is half the range over seeds."
)


@dataclass(frozen=True)
class Summary:
    """A codec at a budget."""

    codec: str
    budget: float | None
    results: list[Result]  # one a seed

    def values(self, name: str) -> list[float]:
        """Of a field, one a seed; [] where it was not measured."""
        found = [getattr(result, name) for result in self.results]
        return [] if None in found else found

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return fmean(values) if values else None

    def text(self, name: str, form: str, scale: float = 1, unit: str = "") -> str:
        """The mean, ± half the range where seeds differ; n/a where it was not measured."""
        values = [value * scale for value in self.values(name)]
        if not values:
            return "n/a"
        half = (max(values) - min(values)) / 2
        return f"{fmean(values):{form}}{f' ± {half:{form}}' if half else ''}{unit}"

    @property
    def is_over(self) -> bool:
        return any(result.is_over for result in self.results)


def summaries(results: Results) -> list[Summary]:
    """Largest files first."""
    groups: dict[tuple[str, float | None], list[Result]] = {}
    for result in results.measured:
        groups.setdefault((result.codec, result.budget), []).append(result)
    found = [Summary(codec, budget, same) for (codec, budget), same in groups.items()]
    return sorted(found, key=lambda summary: (-(summary.mean("bits_per_parameter") or 0), summary.codec))


def markdown(results: Results) -> str:
    setup, rows = results.setup, summaries(results)
    finetuned, base = results.references.get("finetuned"), results.references.get("base")
    lines = [f"# {setup.finetuned} as a delta on {setup.base}", ""]
    lines.append(f"{setup.rows} rows, scored by {setup.scoring}, {setup.dtype}. {NOTES}")
    lines += ["", _row(HEADINGS), _row(["---:", "---", *["---:"] * (len(HEADINGS) - 2)])]
    if finetuned:
        lines.append(_reference_row("16", "the fine-tune itself", finetuned, f"{setup.finetuned_bytes / 1e6:.1f} MB"))
    lines += [_row(_cells(summary, setup.finetuned_bytes, finetuned)) for summary in rows]
    if base:
        lines.append(_reference_row("0", "the base alone", base, ""))
    if any(summary.is_over for summary in rows):
        lines += ["", "† over its budget: the codec cannot be asked for less."]
    if results.missing:
        lines += ["", "Not measured:", ""]
        lines += [f"- {line.cell}: {line.kind}: {' '.join(line.message.split())}" for line in results.missing]
    return "\n".join(lines) + "\n"


def _cells(summary: Summary, full_bytes: int, finetuned: Reference | None) -> list[str]:
    file_bytes = summary.mean("file_bytes") or 0
    budget = "" if summary.budget is None else f"{summary.budget:g}{' †' if summary.is_over else ''}"
    return [
        summary.text("bits_per_parameter", ".4g"),
        f"`{summary.codec}`",
        budget,
        f"{file_bytes / 1e6:.3g} MB",
        f"1/{full_bytes / file_bytes:.0f}",
        summary.text("exact_match", ".1f", 100, "%"),
        summary.text("retained", ".1f", 100, "%"),
        _difference(summary, finetuned),
        summary.text("kl", ".3g"),
        summary.text("top1_agreement", ".1f", 100, "%"),
        summary.text("general_kl", ".3g"),
        summary.text("compress_s", ".0f", unit=" s"),
        f"{(summary.mean('compress_peak_bytes') or 0) / 1e6:.0f} MB",
    ]


def _difference(summary: Summary, finetuned: Reference | None) -> str:
    if finetuned is None:
        return ""
    mean_hits = [fmean(hits) for hits in zip(*(result.hits for result in summary.results), strict=True)]
    mean, low, high = (100 * value for value in bootstrap_difference(mean_hits, finetuned.hits))
    return f"{mean:+.1f} ({low:+.1f} … {high:+.1f})"


def _reference_row(bits: str, name: str, reference: Reference, file: str) -> str:
    kl, agreement, general_kl = (
        "" if value is None else form.format(value)
        for value, form in (
            (reference.kl, "{:.3g}"),
            (reference.top1_agreement, "{:.1%}"),
            (reference.general_kl, "{:.3g}"),
        )
    )
    return _row([bits, name, "", file, "", f"{reference.exact_match:.1%}", "", "", kl, agreement, general_kl, "", ""])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
