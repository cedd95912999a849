"""Which server a command talks to, with which key, and what an error of it becomes for the shell."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
from typing import TYPE_CHECKING

from deltaserve.cli.console import report_error
from deltaserve_client import DEFAULT_URL, Client, DeltaServeClientError

if TYPE_CHECKING:
    from collections.abc import Callable


def connection_arguments() -> argparse.ArgumentParser:
    """A parent parser: which server, and the key for it."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", default=default_url(), help="the server (DELTASERVE_URL; now %(default)s)")
    common.add_argument("--api-key", help="the server's key (default: DELTASERVE_API_KEY)")
    return common


def reports_errors(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    @functools.wraps(command)
    def run(args: argparse.Namespace) -> int:
        try:
            command(args)
        except DeltaServeClientError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        else:
            return 0
        report_error(message)
        return 1

    return run


def client_of(args: argparse.Namespace) -> Client:
    return Client(args.url, args.api_key)


def default_url() -> str:
    return os.environ.get("DELTASERVE_URL") or DEFAULT_URL


def elsewhere(args: argparse.Namespace) -> str:
    """What the next command needs to find the same server."""
    return "" if args.url == default_url() else f" --url {shlex.quote(args.url)}"
