"""The command compress: its arguments, and what it prints.

torch and the rest of the server's libraries are imported when it runs.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.cli import console
from deltaserve.cli.arguments import between, option, whole
from deltaserve.cli.console import progress_bar, size, write
from deltaserve.errors import BadRequest, CodecError

if TYPE_CHECKING:
    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.recipe import Recipe
    from deltaserve.evaluation.search import Tried

CODING = (
    "codec",
    "bits",
    "keep",
    "max_kl",
    "data",
    "scoring",
    "rank",
    "energy",
    "option",
    "seed",
    "calibration",
    "base_shift",
    "allocate",
)  # what an imported adapter has no use for


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command; its parser's `run` default takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser("compress", help="make a delta artifact of a fine-tune")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("base", metavar="BASE", help="directory, hub id or .gguf file")
    parser.add_argument("finetuned", metavar="FINETUNED", help="the same, or a PEFT adapter's directory: LoRA, (IA)³")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    text = "(default: auto; delta-svd with --rank or --energy)"
    parser.add_argument("--codec", help=f"server/deltaserve/codecs/README.md has them all {text}")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=float, help="bits per parameter (auto: of the whole file; probed if not given)")
    budget.add_argument("--rank", type=int, help="delta-svd, lora-svd: directions kept of each matrix")
    budget.add_argument("--energy", type=float, help="delta-svd: share of ‖Δ‖² kept, up to 1")
    budget.add_argument(
        "--keep",
        metavar="SHARE",
        type=between(0, 1),
        help="auto: the smallest that keeps so much of the fine-tune's exact match on --data, up to 1",
    )
    text = "auto: the smallest this near to the fine-tune, nats a token, on calibration and on general text"
    budget.add_argument("--max-kl", metavar="NATS", type=between(0, 100), help=text)
    parser.add_argument("--data", metavar="JSONL", type=Path, help='for --keep: lines {"prompt": …, "answer": …}')
    parser.add_argument("--scoring", choices=("exact", "last-number"), help="for --keep: when an answer is right")
    parser.add_argument("--seed", type=whole(0, 2**64), help="of the codec's random choices (default: 0)")
    text = "texts for codecs that need activations: lines {text} or {prompt, answer} (default: those of the product)"
    parser.add_argument("--calibration", metavar="JSONL|builtin", help=text)
    text = "scale base and delta, once or by layer, fitted to the fine-tune's predictions on the calibration texts"
    parser.add_argument("--base-shift", choices=("none", "task", "layer"), help=text)
    text = "share out --bits among layers (server/decisions/0008-allocation.md has the ways; default: the codec's own)"
    parser.add_argument("--allocate", metavar="NAME", help=text)
    parser.add_argument("--option", metavar="KEY=VALUE", type=option, action="append", help="a codec's own setting")
    parser.set_defaults(run=compress)


def compress(args: argparse.Namespace) -> int:
    from deltaserve.deltas.adapters import is_adapter
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.evaluation.recipes import make
    from deltaserve.evaluation.rows import load_rows

    adapter = is_adapter(Path(args.finetuned))
    given = [f"--{name.replace('_', '-')}" for name in CODING if getattr(args, name) is not None]
    if adapter and given:
        raise BadRequest(f"{args.finetuned} is an adapter and is kept as it is: {', '.join(given)} do not apply")
    recipe = _recipe(args)
    if (args.keep is None) != (args.data is None):
        raise BadRequest("--keep and --data need each other")
    if args.scoring and args.keep is None:
        raise BadRequest("--scoring says when --keep finds an answer right: it needs --keep")
    base, finetuned = Checkpoint.open(args.base), Checkpoint.open(args.finetuned)
    inputs = {entry.path.resolve() for checkpoint in (base, finetuned) for entry in checkpoint.entries.values()}
    if args.output.resolve() in inputs | {Path(args.base).resolve(), Path(args.finetuned).resolve()}:
        raise BadRequest(f"{args.output} is an input; it is not overwritten")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise BadRequest(f"{args.output}: {'a directory' if args.output.is_dir() else 'its directory does not exist'}")
    rows = load_rows(args.data) if args.data is not None else []
    with progress_bar(quiet=args.quiet) as progress:
        made = make(recipe, base, args.finetuned, args.output, rows=rows, progress=progress)
    _write_tried(args, made.tried)
    _write_summary(args, made.artifact, made.full_bytes)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    from deltaserve.deltas.recipe import Recipe

    given = {name: getattr(args, name) for name in CODING if name not in ("data", "option")}
    recipe = Recipe(
        options=dict(args.option or []), **{name: value for name, value in given.items() if value is not None}
    )
    try:
        recipe.make_codec()
    except CodecError as error:  # the command line says what cannot be: wrong usage
        raise BadRequest(error.message) from None
    return recipe


def _write_tried(args: argparse.Namespace, tried: list[Tried]) -> None:
    if not tried:
        return
    if args.keep is not None:
        what, form = "exact match kept", ".1%"
    else:
        what, form = "KL to the fine-tune, nats a token, calibration or general text", ".4f"
    table = console.plain_table("bits/parameter", what, "")
    for step in tried:
        table.add_row(f"{step.bits:.4f}", format(step.measured, form), "enough" if step.passed else "not enough")
    console.write_table(table)


def _write_summary(args: argparse.Namespace, artifact: Artifact, full_bytes: int) -> None:
    num_bytes = artifact.file.num_bytes
    write(
        f"{args.output}: {size(num_bytes)}, {full_bytes / num_bytes:.1f} times smaller than a full copy "
        f"({size(full_bytes)}), {artifact.bits_per_parameter:.3f} bits per parameter\n"
    )
    if errors := console.mean_errors(artifact.manifest.layers.values()):
        relative, gain, _ = errors
        write(f"mean of {len(artifact.manifest.layers)} layers: relative error {relative:.4f}, gain {gain:.4f}\n")
    config = artifact.manifest.config
    if "allocated_loss" in config:
        loss, bound = float(config["allocated_loss"] or 0), float(config["allocated_bound"] or 0)
        above = 100 * (loss - bound) / abs(bound) if bound else 0.0
        write(f"allocated by {args.allocate}: predicted loss {loss:.4g}, at most {above:.2f} % above its optimum\n")
    file, base = shlex.quote(str(args.output)), shlex.quote(args.base)
    write(f"next: deltaserve inspect {file}\n      deltaserve evaluate {base} {file} --data ROWS.jsonl\n")
    write(f"      deltaserve push {file}\n")
