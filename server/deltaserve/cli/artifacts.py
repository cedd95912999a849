"""The commands on artifacts: inspect, restore. Owns their arguments and what they print.

torch and the rest of the server's libraries are imported when a command runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deltaserve.cli import console
from deltaserve.cli.console import progress_bar, size, write


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands; each parser's `run` default takes the parsed arguments and returns the exit status."""
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--quiet", action="store_true", help="no progress bar")

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
