"""The commands that talk to a running server: push, models, complete, delete.

Owns their arguments and what they print. Everything about HTTP is `deltaserve_client`'s; no torch is needed here.
Results go to stdout, progress and errors to stderr; an error is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.cli.connection import client_of, connection_arguments, elsewhere, reports_errors
from deltaserve.cli.console import size, write
from deltaserve.cli.jobs import add_recipe, push_directory

if TYPE_CHECKING:
    from deltaserve_client import Delta, Model


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands; each parser's `run` default takes the parsed arguments and returns the exit status."""
    common = connection_arguments()

    parser = subparsers.add_parser("push", parents=[common], help="upload an artifact, or a fine-tune to compress")
    text = "a delta artifact; or the directory of a checkpoint or adapter, which the server compresses"
    parser.add_argument("file", metavar="FILE", type=Path, help=text)
    parser.add_argument("--name", help="the model name to serve it under (default: FILE without its suffix)")
    add_recipe(parser)
    parser.set_defaults(run=push)

    parser = subparsers.add_parser("models", parents=[common], help="list what the server can answer as")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=models)

    parser = subparsers.add_parser("complete", parents=[common], help="complete a prompt")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument(
        "--chat", action="store_true", help="send PROMPT as a user's message, through the chat template"
    )
    parser.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    parser.add_argument("--json", action="store_true", help="print the server's whole reply (implies --no-stream)")
    parser.set_defaults(run=complete)

    parser = subparsers.add_parser("delete", parents=[common], help="delete a delta")
    parser.add_argument("name", metavar="NAME")
    parser.set_defaults(run=delete)


@reports_errors
def push(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    if args.file.is_dir():
        with client_of(args) as client:
            return push_directory(args, client, args.name or args.file.resolve().name)
    name = args.name or args.file.stem
    with client_of(args) as client, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        delta = client.upload(
            name, args.file, progress=lambda sent, total: bar.update(task, completed=sent, total=total)
        )
    write(
        f"{delta.id} version {delta.version}: {delta.codec}, {delta.bits_per_parameter:.2f} bits per parameter, "
        f"{size(delta.disk_bytes)}\n"
        f"next: deltaserve complete {shlex.quote(delta.id)} 'Hello'{elsewhere(args)}\n"
    )


@reports_errors
def models(args: argparse.Namespace) -> None:
    with client_of(args) as client:
        served = client.models()
        deltas = {delta.id: delta for delta in client.deltas()}
    if args.json:
        rows = [{**model.raw, "delta": deltas[model.id].raw if model.id in deltas else None} for model in served]
        write(json.dumps(rows, indent=2) + "\n")
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("id", overflow="fold")
    for heading in ("version", "codec", "bits/param", "disk", "resident", "state"):
        table.add_column(heading, justify="left" if heading in ("codec", "state") else "right")
    for model in served:
        table.add_row(model.id, *_cells(model, deltas.get(model.id)))
    Console(markup=False, emoji=False, highlight=False).print(table)


@reports_errors
def complete(args: argparse.Namespace) -> None:
    asked = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    messages = [{"role": "user", "content": args.prompt}]
    with client_of(args) as client:
        if args.json or args.no_stream:
            reply = (
                client.chat(args.model, messages, **options)
                if args.chat
                else client.complete(args.model, args.prompt, **options)
            )
            write((json.dumps(reply.raw, indent=2) if args.json else reply.text) + "\n")
            return
        pieces = (
            client.stream_chat(args.model, messages, **options)
            if args.chat
            else client.stream(args.model, args.prompt, **options)
        )
        has_begun = False
        try:
            for piece in pieces:
                write(piece)
                has_begun = True
        finally:
            if has_begun:
                write("\n")  # an error's line starts at the left edge too


@reports_errors
def delete(args: argparse.Namespace) -> None:
    with client_of(args) as client:
        client.delete(args.name)
    write(f"deleted {args.name}\n")


def _cells(model: Model, delta: Delta | None) -> tuple[str, ...]:
    if delta is None:
        return ("", "base" if model.parent is None else "", "", "", "", "")
    return (
        str(delta.version),
        delta.codec,
        f"{delta.bits_per_parameter:.2f}",
        size(delta.disk_bytes),
        size(delta.resident_bytes),
        delta.state,
    )
