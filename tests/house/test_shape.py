"""The shape of the repository: short files, no generic packages, no hidden knobs, an error table that is true."""

from __future__ import annotations

import inspect
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from deltaserve import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "server/deltaserve", ROOT / "kernels/deltaserve_kernels", ROOT / "clients/python/deltaserve_client"]
CONTAINERS = ["server", "kernels", "clients", "tests", "docker"]
TOP = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", *CONTAINERS}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout")
    return done.stdout.splitlines()


def test_files_are_short() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): lines(path) for path in python_files(*SOURCES)}
    assert statistics.median(sizes.values()) <= 120
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_a_codec_fits_on_few_pages() -> None:
    sizes = {path.name: lines(path) for path in python_files(SOURCES[0] / "codecs")}
    assert {name: size for name, size in sizes.items() if size > 180} == {}


def test_the_container_folders_are_no_packages() -> None:
    assert [folder for folder in CONTAINERS if (ROOT / folder / "__init__.py").exists()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("name", ["server", "kernels", "clients"])
def test_no_regular_package_of_a_generic_name_is_ours(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util as u; spec = u.find_spec({name!r}); print(spec.origin if spec else None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = done.stdout.strip()
    assert found == "None" or not Path(found).is_relative_to(ROOT)


def test_the_top_level_holds_what_it_should() -> None:
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_kernels_import_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import deltaserve_kernels, deltaserve_kernels.apply, deltaserve_kernels.terms, deltaserve_kernels.segments"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_settings_and_command_line_read_the_environment() -> None:
    """The client and the command line read their own variables; a child process inherits an environment."""
    allowed = {"server/deltaserve/settings.py", "server/deltaserve/cli/connection.py"}
    knob = re.compile(r"os\.environ(?!,)|os\.getenv|os\.putenv")
    found = {path.relative_to(ROOT).as_posix() for path in python_files(*SOURCES[:2]) if knob.search(path.read_text())}
    assert found <= allowed


def error_classes() -> dict[str, type[errors.DeltaServeError]]:
    found = dict(inspect.getmembers(errors, inspect.isclass))
    return {name: cls for name, cls in found.items() if issubclass(cls, errors.DeltaServeError)}


def drawn_tree() -> dict[str, tuple[str, str, int]]:
    """Class → parent, code and status, as the docstring of errors.py draws them."""
    rows: dict[str, tuple[str, str, int]] = {}
    parents = ["DeltaServeError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]+)(\w+)\s+(\w+)\s+(\d{3})", line)
        if match is None:
            continue
        marks, name, code, status = match.groups()
        depth = len(marks) // 4
        del parents[depth:]
        rows[name] = (parents[-1], code, int(status))
        parents.append(name)
    return rows


def test_the_table_of_errors_is_true() -> None:
    classes = error_classes()
    real = {
        name: (cls.__mro__[1].__name__, cls.code, cls.http_status)
        for name, cls in classes.items()
        if cls is not errors.DeltaServeError
    }
    assert drawn_tree() == real


def test_the_table_of_errors_says_where_a_retry_is_told() -> None:
    told = {match[1] for match in re.finditer(r"(\w+)\s+\w+\s+\d{3}\s+\+ Retry-After", errors.__doc__ or "")}
    assert told == {name for name, cls in error_classes().items() if cls.retry_after_s is not None}


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in error_classes().values()]
    assert len(set(codes)) == len(codes)
