"""What the commands show on a terminal, and an artifact in words: results on stdout, progress and errors on stderr.

Text from files (names in an artifact, messages about them) is shown without control characters.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.table import Table

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.manifest import LayerSpec

    Progress = Callable[[str, int, int], None]  # what is at work, steps done, steps in all

WIDTH_IN_A_PIPE = 200  # long names stay on one line
COMPANIONS = ("chat_template", "added_tokens", "special_tokens", "generation", "model_config_changes")
ERRORS = ("relative", "gain", "cosine")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without what a terminal would obey; line breaks and tabs stay."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def write(text: str) -> None:
    """A result, to stdout."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def report_error(message: str) -> None:
    """`error: message` to stderr, its first word red on a terminal."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:  # the bare client is installed
        sys.stderr.write(f"error: {printable(message)}\n")
        return
    line = Text.assemble(("error:", "bold red"), " ", printable(message))
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def size(num_bytes: float) -> str:
    """In powers of 1000: 7.2 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def plain_table(*headings: str) -> Table:
    """An empty table; the first column is text, the others are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    return table


def write_table(table: Table) -> None:
    """To stdout."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH_IN_A_PIPE
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)


@contextmanager
def progress_bar(
    *, quiet: bool = False, in_bytes: bool = False, speed_estimate_period: float = 30.0
) -> Iterator[Progress]:
    """Yields a function that moves a bar on stderr; it does nothing when quiet or where stderr is no terminal.

    The time left is by the mean speed of the last `speed_estimate_period` seconds.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _name, _done, _total: None
        return
    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    name_column = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    columns = (BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn(), name_column)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=speed_estimate_period) as bar:
        task = bar.add_task("", total=None)

        def report(name: str, done: int, total: int) -> None:
            bar.update(task, description=printable(name), completed=done, total=total)

        yield report


def described(artifact: Artifact) -> dict[str, Any]:
    """What `inspect --json` prints."""
    manifest, entries = artifact.manifest, artifact.entries
    with artifact.file.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def num_bytes(name: str) -> int:
        return sum(entries[key].nbytes for key in manifest.overrides[name].layout(name) if key in entries)

    return {
        "codec": manifest.codec,
        "config": manifest.config,
        "seed": manifest.seed,
        "format_version": manifest.version,
        "base": manifest.base.model_dump(),
        "bits_per_parameter": artifact.bits_per_parameter,
        "disk_bytes": artifact.file.num_bytes,
        "resident_bytes": artifact.resident_bytes,
        "covered_parameters": artifact.covered_parameters,
        "layers": {
            name: {
                "shape": layer.shape,
                "terms": [term.kind for term in layer.terms],
                "error": layer.error.model_dump() if layer.error else None,
            }
            for name, layer in manifest.layers.items()
        },
        "overrides": {
            name: {"kind": override.kind, "shape": override.shape, "bytes": num_bytes(name)}
            for name, override in manifest.overrides.items()
        },
        "chat_template": manifest.chat_template is not None,
        "added_tokens": len(manifest.added_tokens),
        "special_tokens": manifest.special_tokens,
        "generation": manifest.generation,
        "model_config_changes": manifest.model_config_changes,
        "digest": digest,
    }


def write_description(artifact: Artifact, *, every_layer: bool) -> None:
    """The same for people: facts, then the error of every layer or of every kind of layer."""
    fields = described(artifact)
    config = ", ".join(f"{name} {value}" for name, value in fields["config"].items() if value is not None)
    overrides = fields["overrides"]
    facts = {
        "codec": f"{fields['codec']} ({config})",
        "base": f"{fields['base']['name']}, fingerprint {fields['base']['fingerprint']}",
        "size": f"{size(fields['disk_bytes'])} on disk, {size(fields['resident_bytes'])} on the device",
        "bits": f"{fields['bits_per_parameter']:.3f} per parameter, of {fields['covered_parameters']:,} in layers",
        "overrides": f"{len(overrides)} tensors, {size(sum(override['bytes'] for override in overrides.values()))}",
        "companions": ", ".join(name for name in COMPANIONS if fields[name]) or "none",
        "sha256": fields["digest"],
    }
    write("".join(f"{name:<12}{value}\n" for name, value in facts.items()) + "\n")
    layers = artifact.manifest.layers
    if every_layer:
        table = plain_table("layer", "shape", *ERRORS)
        for name, layer in layers.items():
            table.add_row(printable(name), "×".join(map(str, layer.shape)), *_error_cells([layer]))
    else:
        table = plain_table("kind of layer", "layers", "parameters", *ERRORS)
        kinds: dict[str, list[LayerSpec]] = {}
        for name, layer in layers.items():
            kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(layer)
        for kind, same in kinds.items():
            parameters = sum(math.prod(layer.shape) for layer in same)
            table.add_row(printable(kind), str(len(same)), f"{parameters:,}", *_error_cells(same))
    write_table(table)


def _error_cells(layers: Iterable[LayerSpec]) -> list[str]:
    return [f"{error:.4f}" for error in mean_errors(layers)] or [""] * len(ERRORS)


def mean_errors(layers: Iterable[LayerSpec]) -> list[float]:
    """Mean relative error, gain and cosine of the layers that have them; [] where none has (LoRA is exact)."""
    known = [layer.error for layer in layers if layer.error]
    return [fmean(getattr(error, name) for error in known) for name in ERRORS] if known else []
