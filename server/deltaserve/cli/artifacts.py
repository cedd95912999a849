"""The commands on files: compress, inspect, restore. Owns their arguments and what they print.

torch and the rest of the server's libraries are imported when a command runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.cli import console
from deltaserve.cli.console import progress_bar, size, write
from deltaserve.errors import BadRequest, CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaserve.codecs.base import Codec
    from deltaserve.deltas.artifact import Artifact

DEFAULT_CODEC = "auto"
CODING = (
    "codec",
    "bits",
    "rank",
    "energy",
    "option",
    "seed",
    "calibration",
    "base_shift",
    "allocate",
)  # what an imported adapter has no use for


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands; each parser's `run` default takes the parsed arguments and returns the exit status."""
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--quiet", action="store_true", help="no progress bar")

    parser = subparsers.add_parser("compress", parents=[quiet], help="make a delta artifact of a fine-tune")
    parser.add_argument("base", metavar="BASE", help="directory, hub id or .gguf file")
    parser.add_argument("finetuned", metavar="FINETUNED", help="the same, or a PEFT LoRA adapter's directory")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    text = f"(default: {DEFAULT_CODEC}; delta-svd with --rank or --energy)"
    parser.add_argument("--codec", help=f"server/deltaserve/codecs/README.md has them all {text}")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=float, help="bits per parameter (auto: of the whole file; chosen if not given)")
    budget.add_argument("--rank", type=int, help="delta-svd, lora-svd: directions kept of each matrix")
    budget.add_argument("--energy", type=float, help="delta-svd: share of ‖Δ‖² kept, up to 1")
    parser.add_argument("--seed", type=whole(0, 2**64), help="of the codec's random choices (default: 0)")
    text = "texts for codecs that need activations: lines {text} or {prompt, answer} (default: those of the product)"
    parser.add_argument("--calibration", metavar="JSONL|builtin", help=text)
    text = "scale base and delta, once or by layer, fitted to the fine-tune's predictions on the calibration texts"
    parser.add_argument("--base-shift", choices=("none", "task", "layer"), help=text)
    text = "share out --bits among layers (server/decisions/0008-allocation.md has the ways; default: the codec's own)"
    parser.add_argument("--allocate", metavar="NAME", help=text)
    parser.add_argument("--option", metavar="KEY=VALUE", type=_option, action="append", help="a codec's own setting")
    parser.set_defaults(run=compress)

    parser = subparsers.add_parser("inspect", help="show what an artifact holds")
    parser.add_argument("artifact", metavar="FILE", type=Path)
    parser.add_argument("--layers", action="store_true", help="every layer, not only every kind of layer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=inspect)

    parser = subparsers.add_parser("restore", parents=[quiet], help="base + artifact → a full checkpoint again")
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("artifact", metavar="FILE", type=Path)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="auto: the fine-tune's")
    parser.set_defaults(run=restore)


def compress(args: argparse.Namespace) -> int:
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.lora import import_lora, is_adapter
    from deltaserve.deltas.prepare import make_delta

    adapter = is_adapter(Path(args.finetuned))
    given = [f"--{name.replace('_', '-')}" for name in CODING if getattr(args, name) is not None]
    if adapter and given:
        raise BadRequest(f"{args.finetuned} is a LoRA adapter and is kept as it is: {', '.join(given)} do not apply")
    codec = None if adapter else _codec(args)
    base, finetuned = Checkpoint.open(args.base), Checkpoint.open(args.finetuned)
    inputs = {entry.path.resolve() for checkpoint in (base, finetuned) for entry in checkpoint.entries.values()}
    if args.output.resolve() in inputs | {Path(args.base).resolve(), Path(args.finetuned).resolve()}:
        raise BadRequest(f"{args.output} is an input; it is not overwritten")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise BadRequest(f"{args.output}: {'a directory' if args.output.is_dir() else 'its directory does not exist'}")
    with progress_bar(quiet=args.quiet) as progress:
        if codec is None:
            artifact = import_lora(base, Path(args.finetuned), args.output, progress=progress)
        else:
            calibration, seed = args.calibration or "builtin", args.seed or 0
            artifact = make_delta(
                base,
                finetuned,
                codec,
                args.output,
                seed=seed,
                calibration=calibration,
                base_shift=args.base_shift,
                allocate=args.allocate,
                progress=progress,
            )
    _write_summary(args, artifact, base.num_bytes if adapter else finetuned.num_bytes)
    return 0


def inspect(args: argparse.Namespace) -> int:
    from deltaserve.deltas.artifact import Artifact

    artifact = Artifact.open(args.artifact)
    if args.json:
        write(json.dumps(console.described(artifact), indent=2) + "\n")
    else:
        console.write_description(artifact, every_layer=args.layers)
    return 0


def restore(args: argparse.Namespace) -> int:
    import torch

    from deltaserve.deltas import restore as restoration
    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.checkpoint import Checkpoint

    artifact, base = Artifact.open(args.artifact), Checkpoint.open(args.base)
    dtype = torch.float32 if args.dtype == "float32" else None
    with progress_bar(quiet=args.quiet) as progress:
        restoration.restore(base, artifact, args.output, dtype=dtype, progress=progress)
    write(f"{args.output}: a full checkpoint of {size(Checkpoint.open(args.output).num_bytes)}\n")
    return 0


def _codec(args: argparse.Namespace) -> Codec:
    from deltaserve.codecs.budget import Budget
    from deltaserve.codecs.registry import make_codec
    from deltaserve.deltas.allocate import check_allocatable

    options = dict(args.option or [])
    budget = Budget(bits=args.bits, rank=args.rank, energy=args.energy)
    try:
        implied = DEFAULT_CODEC if args.rank is None and args.energy is None else "delta-svd"
        codec = make_codec(args.codec or implied, budget, options)
        if args.allocate is not None:
            check_allocatable(codec, args.allocate)
        return codec
    except CodecError as error:  # the command line says what cannot be: wrong usage
        raise BadRequest(error.message) from None


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


def whole(least: int, below: int = 2**48) -> Callable[[str], int]:
    """A type of argument: a whole number from `least` on."""

    def parse(text: str) -> int:
        if not least <= int(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in {least} … {below - 1}")
        return int(text)

    return parse


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON where it is some: numbers are numbers."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
