"""A fine-tune's directory that the server compresses: what push does with one, and the command jobs. No torch."""

from __future__ import annotations

import argparse
import json
import shlex
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deltaserve.cli.arguments import between, whole
from deltaserve.cli.connection import client_of, connection_arguments, elsewhere, reports_errors
from deltaserve.cli.console import plain_table, printable, size, write, write_table
from deltaserve_client import DeltaServeClientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deltaserve_client import Client, Compression


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command; its parser's `run` default takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "jobs", parents=[connection_arguments()], help="what the server compresses: list, look, wait, cancel"
    )
    parser.add_argument("id", metavar="JOB", nargs="?", help="one of them (default: all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--wait", action="store_true", help="until JOB has ended")
    what.add_argument("--cancel", action="store_true")
    what.add_argument("--log", action="store_true", help="what has happened to JOB")
    parser.add_argument("--json", action="store_true", help="print the server's replies")
    parser.set_defaults(run=jobs)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how a directory is compressed."""
    group = parser.add_argument_group("for a directory, as of deltaserve compress")
    group.add_argument("--codec")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=float)
    budget.add_argument("--rank", type=whole(1))
    budget.add_argument("--energy", type=between(0, 1))
    budget.add_argument("--max-kl", type=between(0, 100))
    budget.add_argument("--keep", type=between(0, 1))
    group.add_argument("--data", metavar="JSONL", help="for --keep")
    group.add_argument("--seed", type=whole(0))
    group.add_argument("--calibration", metavar="JSONL")
    group.add_argument("--no-wait", action="store_true", help="print the job and leave")


def push_directory(args: argparse.Namespace, client: Client, name: str) -> None:
    """Uploads it, and waits for the model unless told otherwise. Raises DeltaServeClientError where the job fails."""
    recipe = ("codec", "bits", "rank", "energy", "max_kl", "keep", "data", "seed", "calibration")
    options = {key: getattr(args, key) for key in recipe}
    with _bar(f"upload {name}", in_bytes=True) as show:
        job = client.compress(name, args.file, progress=lambda sent, total: show(sent, total, ""), **options)
    write(f"{job.id}\n")
    if args.no_wait:
        return write(f"next: deltaserve jobs {job.id} --wait{elsewhere(args)}\n")
    _wait(args, client, job)


@reports_errors
def jobs(args: argparse.Namespace) -> None:
    with client_of(args) as client:
        if args.id is None:
            if args.wait or args.cancel or args.log:
                raise DeltaServeClientError("which job? `deltaserve jobs` lists them")
            return _list(client.compressions(), as_json=args.json)
        if args.log:
            events = client.compression_events(args.id)
            lines = [f"{event['level']:<8} {printable(str(event['message']))}" for event in events]
            return write(json.dumps(events, indent=2) + "\n" if args.json else "".join(f"{line}\n" for line in lines))
        if args.wait:
            return _wait(args, client, client.compression(args.id))
        job = client.cancel_compression(args.id) if args.cancel else client.compression(args.id)
        return _list([job], as_json=args.json)


def _wait(args: argparse.Namespace, client: Client, job: Compression) -> None:
    with _bar(f"compress {job.name}", in_bytes=False) as show:
        job = client.wait(job, progress=lambda now: show(round(1000 * now.progress), 1000, now.step or now.status))
    if job.model is None:
        raise DeltaServeClientError(f"job {job.id} has {job.status}{f': {job.error}' if job.error else ''}")
    result = job.raw["result"]
    smaller = result["full_bytes"] / result["bytes"]
    write(
        f"{job.model}: {result['codec']}, {result['bits_per_parameter']:.3f} bits per parameter, "
        f"{size(result['bytes'])}, {smaller:.0f} times smaller than a full copy, in {result['seconds']:.0f} s\n"
        f"next: deltaserve complete {shlex.quote(job.name)} 'Hello' --chat{elsewhere(args)}\n"
    )


def _list(found: list[Compression], *, as_json: bool) -> None:
    if as_json:
        return write(json.dumps([job.raw for job in found], indent=2) + "\n")
    table = plain_table("job", "model", "status", "done", "")
    for job in found:
        said = job.error or job.step
        table.add_row(job.id, job.model or job.name, job.status, f"{job.progress:.0%}" if job.is_open else "", said)
    return write_table(table)


@contextmanager
def _bar(what: str, *, in_bytes: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Yields show(done, total, step), a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    count = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[step]}", markup=False), console=Console(stderr=True)) as bar:
        task = bar.add_task(printable(what), total=None, step="")
        yield lambda done, total, step: bar.update(task, completed=done, total=total, step=printable(step))
