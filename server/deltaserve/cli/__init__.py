"""The command line: which command is in which module, and what an error becomes for the shell.

    0  done      1  failed: one `error: …` on stderr      2  wrong usage      130  interrupted
    doctor, too: 3  --repair would mend all that is wrong      4  something cannot be mended

Only the module of the command that was named is imported, so that the client's commands need no server libraries.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING

from deltaserve import __version__
from deltaserve.cli.console import report_error
from deltaserve.errors import BadRequest, DeltaServeError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {  # module → what its register(subparsers) adds
    "compression": ("compress",),
    "artifacts": ("inspect", "restore"),
    "comparison": ("evaluate", "compare"),
    "serving": ("serve", "demo"),
    "bench": ("bench",),
    "doctor": ("doctor",),
    "remote": ("push", "models", "complete", "delete"),
    "jobs": ("jobs",),
    "accounts": ("tenant", "key", "usage", "audit"),
}
CHATTY = ("torchao", "torch.utils._pytree")  # warn of themselves when transformers imports torchao
EXTRAS = {"rich": "cli", "matplotlib": "plot"}  # library → the extra it comes with; all others are the server's


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit status."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except BadRequest as error:
        report_error(error.message)
        return 2
    except DeltaServeError as error:
        report_error(error.message)
        return 1
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library.startswith("deltaserve"):
            raise
        extra = EXTRAS.get(library, "server")
        report_error(f"this command needs {library}, which is not installed: pip install 'deltaserve[{extra}]'")
        return 1
    except BrokenPipeError:  # `deltaserve inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:
        report_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="deltaserve", description="Serve many full fine-tunes from one resident base model."
    )
    parser.add_argument("--version", action="version", version=f"deltaserve {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    named = [module for module, commands in COMMANDS.items() if words and words[0] in commands]
    for module in named or COMMANDS:
        try:
            importlib.import_module(f"deltaserve.cli.{module}").register(subparsers)
        except ModuleNotFoundError:
            if named:
                raise
            for command in COMMANDS[module]:
                subparsers.add_parser(command, help="(not installed: pip install 'deltaserve[server]')")
    if not words:
        parser.print_help(sys.stderr)
        return 2
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # help and version, and wrong usage, which argparse has reported
        return stop.code if isinstance(stop.code, int) else 0
    status: int = args.run(args)
    return status
