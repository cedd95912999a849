"""The command line as a whole: exit statuses, what goes to which stream, what is imported for which command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import deltaserve
from deltaserve import cli
from deltaserve.errors import BadRequest, CheckpointError, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS = [
    *("compress", "inspect", "restore", "evaluate", "compare"),
    *("serve", "demo", "push", "models", "complete", "delete"),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """`deltaserve inspect x`, where the command raises."""

    def run(error: BaseException) -> int:
        def inspect(_args: Any) -> int:
            raise error

        monkeypatch.setattr("deltaserve.cli.artifacts.inspect", inspect)
        return cli.main(["inspect", "x"])

    return run


def test_without_a_command_the_help_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    for command in COMMANDS:
        assert f"\n    {command} " in shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"usage: deltaserve {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"deltaserve {deltaserve.__version__}\n"


def test_the_console_script_is_main() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="deltaserve")
    assert script.load() is cli.main


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "--nonsense",
        "inspect",
        "inspect a b",
        "compress a b",
        "compress a b -o c --bits 1 --rank 2",
        "compress a b -o c --seed -1",
        "compress a b -o c --option x",
        "restore a b -o c --dtype int8",
        "evaluate a b --data c --batch 0",
        "evaluate a b --data c --limit 0",
        "evaluate a b --data c --scoring bleu",
        "compare a b --data c",
        "compare a b --data c -o d --budgets 1,-1",
    ],
)
def test_wrong_usage_is_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "usage: deltaserve" in shown.err
    assert "error: " in shown.err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (CheckpointError("base: no such file"), 1, "error: base: no such file\n"),
        (NotFound("gone"), 1, "error: gone\n"),
        (BadRequest("--x does not go with --y"), 2, "error: --x does not go with --y\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "error: x: No such file or directory\n"),
        (ModuleNotFoundError(name="torch"), 1, "pip install 'deltaserve[server]'"),
        (ModuleNotFoundError(name="rich.console"), 1, "pip install 'deltaserve[cli]'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_one_line_and_a_status(
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    assert failing(error) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert line in shown.err
    assert shown.err.count("\n") == (1 if line else 0)


def test_a_missing_module_of_ours_is_a_bug_and_not_hidden(failing: Callable[[BaseException], int]) -> None:
    with pytest.raises(ModuleNotFoundError):
        failing(ModuleNotFoundError(name="deltaserve.nowhere"))


def test_a_message_cannot_command_the_terminal(
    failing: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(CheckpointError("tensor \x1b[2J\u202e[bold]x\r\n  y: wrong"))
    assert capsys.readouterr().err == "error: tensor �[2J�[bold]x�\n  y: wrong\n"


def in_a_fresh_interpreter(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("line", ["push --help", "models --help", "compress --help", "compare --help", "--version"])
def test_help_loads_no_torch(line: str) -> None:
    program = (
        f"import json, sys; from deltaserve.cli import main; status = main({line.split()!r}); "
        "json.dump(sorted({name.split('.')[0] for name in sys.modules}), sys.stderr); sys.exit(status)"
    )
    done = in_a_fresh_interpreter(program)
    assert done.returncode == 0
    assert not {"torch", "transformers", "fastapi", "deltaserve_kernels"} & set(json.loads(done.stderr))


def test_where_only_the_client_is_installed_the_rest_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'pydantic', 'pydantic_settings', 'rich', 'transformers'): sys.modules[name] = None\n"
        "from deltaserve.cli import main\n"
        "statuses = [main(['push', '--help']), main([]), main(['inspect', 'x']), main(['serve', 'x'])]\n"
        "sys.exit(0 if statuses == [0, 2, 1, 1] else repr(statuses))"
    )
    done = in_a_fresh_interpreter(program)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("which is not installed: pip install 'deltaserve[server]'\n") == 2
