"""deltaserve doctor: is a store whole, and what mends it?"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.cli.console import progress_bar, size, write
from deltaserve.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaserve.deltas.doctor import Census, Doctor, Finding

ROUNDS = 2
HEALTHY, MENDABLE, BEYOND_REPAIR = 0, 3, 4
DESCRIPTION = """Looks for whatever is not as it should be: damaged, missing and superfluous files, rows that point to
nothing, who else can read the store, room on the disk. Changes nothing without --repair; says what --repair would do.
Exit status: 0 healthy, 3 --repair would mend all that is wrong, 4 some of it cannot be mended, 1 it did not look."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("doctor", help="is a store whole? what mends it", description=DESCRIPTION)
    parser.add_argument(
        "--store", metavar="DIR", help="as for serve: a directory (default: deltaserve-store), or s3://…"
    )
    parser.add_argument("--registry", metavar="URL", help="as for serve: postgresql://… of a store in S3")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--repair", action="store_true", help="mend what can be mended without losing anything")
    how.add_argument("--online", action="store_true", help="beside a running server: look only")
    parser.add_argument("--quick", action="store_true", help="do not read the files: sizes, and no digests")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Raises StoreInUse where a server runs, NotFound, IncompatibleStore."""
    from deltaserve.deltas.doctor import Doctor
    from deltaserve.deltas.files import Files, LocalFiles
    from deltaserve.deltas.places import IN_BUCKET, open_places
    from deltaserve.settings import Settings
    from deltaserve.tenants.registry import Registry
    from deltaserve.tenants.sqlite import SqliteRegistry

    root: Path | None
    registry: Registry
    files: Files
    settings = Settings.build(base="-", store=args.store, registry=args.registry)
    with contextlib.ExitStack() as opened:
        if settings.registry is not None or settings.store.startswith(IN_BUCKET):
            cache = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            registry, files = open_places(settings.store, settings.registry, cache, 0)
            opened.callback(files.close)
            root = None
        else:
            root = Path(settings.store)
            if not (root / "registry.sqlite").is_file():
                raise NotFound(f"{root}: there is no store here (no registry.sqlite)")
            registry = SqliteRegistry(root, is_alone=not args.online, changes=args.repair)
            files = LocalFiles(root, clears=False)
        opened.callback(registry.close)
        examiner = Doctor(registry, files, root, is_alone=not args.online and not registry.is_shared)
        with progress_bar(quiet=args.quiet, in_bytes=True) as progress:
            found = examiner.examine(progress, digests=not args.quick)
        left, mended = _repair(examiner, found) if args.repair else (found, [])
    if args.json:
        told = {"mended": [one.as_json() for one in mended], "findings": [one.as_json() for one in left]}
        write(json.dumps({"store": settings.store, "looked_at": vars(examiner.census), **told}, indent=2) + "\n")
    else:
        _tell(settings.store, examiner.census, mended, left)
    return _status(left)


def _repair(examiner: Doctor, found: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """(what is wrong still, what was done); what one change brings to light is mended too."""
    left, done = list(found), []
    for _ in range(ROUNDS):
        for finding in left:
            if finding.mend is not None:
                finding.mend()
                done.append(finding)
        seen = examiner.examine(lambda *step: None, digests=False)
        left = seen + [finding for finding in left if finding.mend is None and finding not in seen]
    return left, done


def _status(left: Sequence[Finding]) -> int:
    wrong = [finding for finding in left if finding.severity != "note"]
    if not all(finding.heals for finding in wrong):
        return BEYOND_REPAIR
    return MENDABLE if wrong else HEALTHY


def _tell(store: str, census: Census, mended: Sequence[Finding], left: Sequence[Finding]) -> None:
    room = "" if census.free_bytes is None else f"; {size(census.free_bytes)} free"
    write(
        f"{store}: {census.tenants} tenants, {census.models} models, {census.versions} versions; {census.objects} "
        f"files of {size(census.object_bytes)}, {census.parts} parts, {census.files} files for jobs{room}\n"
    )
    for finding in mended:
        write(f"\nmended   {finding.subject}\n         {finding.message}\n         done: {finding.mends}\n")
    for finding in left:
        write(f"\n{finding.severity:<8} {finding.subject}\n         {finding.message}\n")
        write(f"         {finding.advice}\n" if finding.advice else "")
        write(f"         --repair: {finding.mends}\n" if finding.mend else "")
    wrong = [finding for finding in left if finding.severity != "note"]
    if not wrong:
        write("\nhealthy\n")
        return
    write(f"\n{len(wrong)} findings; --repair would heal {sum(finding.heals for finding in wrong) or 'none'} of them\n")
