"""The commands that judge deltas: evaluate one, compare all codecs. Owns their arguments and what they print.

torch and the rest of the server's libraries are imported when a command runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.cli import console
from deltaserve.cli.arguments import between, whole
from deltaserve.cli.console import progress_bar, write
from deltaserve.errors import BadRequest, CheckpointError

if TYPE_CHECKING:
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.evaluation.results import Results

BUDGETS = "2,1,0.5,0.25,0.125,0.0625,0.03,0.015,0.0075"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands; each parser's `run` default takes the parsed arguments and returns the exit status."""
    task = argparse.ArgumentParser(add_help=False)
    task.add_argument("--quiet", action="store_true", help="no progress bar")
    task.add_argument("--data", metavar="JSONL", type=Path, required=True, help='lines {"prompt": …, "answer": …}')
    task.add_argument("--limit", metavar="N", type=whole(1), help="only the first N rows")
    task.add_argument("--batch", type=whole(1), default=64, help="rows at once (default: %(default)s)")
    task.add_argument("--scoring", choices=("exact", "last-number"), default="exact", help="when an answer is right")
    task.add_argument(
        "--general-tokens", metavar="N", type=whole(1), default=8192, help="of general text (default: %(default)s)"
    )
    task.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: the fine-tune's")
    general = 'text off the task: a file of lines {"text": …}, builtin or none (default: %(default)s)'

    parser = subparsers.add_parser("evaluate", parents=[task], help="measure an artifact on a task")
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("artifact", metavar="FILE", type=Path)
    parser.add_argument("--finetuned", metavar="DIR", help="compare with the full fine-tune")
    parser.add_argument("--general", metavar="FILE", default="none", help=general)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=evaluate)

    parser = subparsers.add_parser("compare", parents=[task], help="measure every codec at every size on a task")
    parser.add_argument("base", metavar="BASE", help="directory, hub id or .gguf file")
    parser.add_argument("finetuned", metavar="FINETUNED", help="the same: a full fine-tune of BASE")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="goes on with what it holds")
    parser.add_argument(
        "--budgets", metavar="B,B,…", type=_budgets, default=BUDGETS, help="bits per parameter (default: %(default)s)"
    )
    parser.add_argument("--codecs", metavar="NAME,NAME,…", type=_names, help="default: all")
    parser.add_argument("--seeds", metavar="N", type=whole(1), default=1, help="of codecs that draw at random")
    parser.add_argument(
        "--give-up-below",
        metavar="SHARE",
        type=between(0, 1),
        default=0.0,
        help="a codec that retains less at one budget is not measured at smaller ones (default: measure all)",
    )
    parser.add_argument("--general", metavar="FILE", default="builtin", help=general)
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        default="builtin",
        help="texts for codecs that need activations, as for compress (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="measure again what DIR holds")
    parser.add_argument("--no-plot", action="store_true", help="no picture: needs no matplotlib")
    parser.set_defaults(run=compare)


def evaluate(args: argparse.Namespace) -> int:
    import torch

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.evaluation import evaluate as evaluation
    from deltaserve.evaluation.rows import load_rows

    if args.general != "none" and not args.finetuned:
        raise BadRequest("--general measures the distance from the fine-tune: it needs --finetuned")
    _silence_transformers()
    rows, texts = load_rows(args.data, args.limit), _general_texts(args.general)
    artifact, base = Artifact.open(args.artifact), Checkpoint.open(args.base)
    finetuned = _open_finetuned(args.finetuned) if args.finetuned else None
    with progress_bar(quiet=args.quiet) as progress:
        result = evaluation.evaluate(
            base,
            artifact,
            rows,
            finetuned=finetuned,
            general=texts,
            general_tokens=args.general_tokens,
            batch=args.batch,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            scoring=args.scoring,
            progress=progress,
        )
    if args.json:
        write(json.dumps(vars(result), indent=2) + "\n")
        return 0
    table = console.plain_table(f"{result.rows} rows", "restored", *(["fine-tune"] if finetuned else []))
    for name, form in (("exact_match", ".1%"), ("nats_per_token", ".4f")):
        values = [getattr(result, name), getattr(result, f"finetuned_{name}")]
        table.add_row(name.replace("_", " "), *(format(value, form) for value in values if value is not None))
    console.write_table(table)
    if result.kl is not None:
        write(f"KL(fine-tune ‖ restored) {result.kl:.4f} nats per token, top-1 agreement {result.top1_agreement:.1%}\n")
    if result.general_kl is not None:
        write(f"the same KL on general text {result.general_kl:.4f} nats per token\n")
    return 0


def compare(args: argparse.Namespace) -> int:
    if not args.no_plot:
        try:
            importlib.import_module("matplotlib")
        except ModuleNotFoundError:
            raise BadRequest("the picture needs matplotlib: pip install 'deltaserve[plot]', or --no-plot") from None
    if args.output.exists() and not args.output.is_dir():
        raise BadRequest(f"{args.output}: not a directory")

    import torch

    from deltaserve.codecs.registry import CODECS
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.evaluation.compare import Task, plan, setup_of
    from deltaserve.evaluation.compare import compare as fill
    from deltaserve.evaluation.results import Results
    from deltaserve.evaluation.rows import load_rows

    _silence_transformers()
    cells = plan(args.codecs or sorted(CODECS), args.budgets, args.seeds)
    rows, texts = load_rows(args.data, args.limit), _general_texts(args.general)
    base, finetuned = Checkpoint.open(args.base), _open_finetuned(args.finetuned)
    usual = max(finetuned.entries.values(), key=lambda entry: entry.nbytes).dtype
    dtype = usual if args.dtype == "auto" else getattr(torch, args.dtype)
    task = Task(rows, texts, args.general_tokens, args.scoring, dtype, args.batch)
    setup = setup_of(base, finetuned, task, args.calibration)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "comparison.jsonl"
    results = Results.open(file, setup, again=cells if args.force else ())
    try:
        with progress_bar(quiet=args.quiet, speed_estimate_period=math.inf) as progress:

            def step(name: str, what: str, done: int, total: int) -> None:
                progress(f"{name}: {what}" if name else "", done, total)

            fill(
                base,
                finetuned,
                task,
                cells,
                results,
                calibration=args.calibration,
                give_up_below=args.give_up_below,
                step=step,
            )
    finally:  # an interruption leaves a report too, of what there is
        written = _write_report(results, picture=not args.no_plot) if results.cells else []
    _write_table(results)
    write(f"written: {', '.join(map(str, [file, *written]))}\n")
    failed = [line for line in results.missing if line.kind == "failed"]
    for line in failed:
        console.report_error(f"{line.cell}: {line.message}")
    return 1 if failed else 0


def _write_report(results: Results, *, picture: bool) -> list[Path]:
    from deltaserve.deltas.tensorfile import atomic_file
    from deltaserve.evaluation.summary import markdown

    table = results.directory / "comparison.md"
    with atomic_file(table) as file:
        file.write(markdown(results).encode())
    if not picture:
        return [table]
    from deltaserve.evaluation.picture import draw

    return [table, *draw(results, results.directory)]


def _write_table(results: Results) -> None:
    from deltaserve.evaluation.summary import summaries

    table = console.plain_table("codec", "bits/parameter", "exact match", "retained", "KL, task", "KL, general")
    for row in summaries(results):
        shares = [row.text(name, ".1f", 100, "%") for name in ("exact_match", "retained")]
        distances = [row.text(name, ".3g") for name in ("kl", "general_kl")]
        table.add_row(row.codec, row.text("bits_per_parameter", ".4g"), *shares, *distances)
    console.write_table(table)


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _open_finetuned(reference: str) -> Checkpoint:
    from deltaserve.deltas.adapters import is_adapter
    from deltaserve.deltas.checkpoint import Checkpoint

    if is_adapter(Path(reference)):
        raise CheckpointError(f"{reference} is a LoRA adapter; a full checkpoint is needed")
    return Checkpoint.open(reference)


def _general_texts(source: str) -> list[str]:
    from deltaserve.evaluation.general import builtin_texts, load_texts

    if source == "none":
        return []
    return builtin_texts() if source == "builtin" else load_texts(Path(source))


def _budgets(text: str) -> list[float]:
    budgets = [float(word) for word in text.split(",")]
    if wrong := [budget for budget in budgets if not 0 < budget < math.inf]:
        raise argparse.ArgumentTypeError(f"{wrong[0]:g} is no number of bits per parameter")
    return sorted(set(budgets), reverse=True)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))
