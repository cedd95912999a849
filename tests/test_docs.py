"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltaserve.api.openapi import errors_table
from deltaserve.deltas.artifact import Artifact
from deltaserve.demo import SAMPLES, TENANTS
from deltaserve.demo_base import FINGERPRINT
from deltaserve.settings import Settings

ROOT = Path(__file__).parents[1]


def test_the_settings_table_of_the_server_readme_is_complete_and_right() -> None:
    text = (ROOT / "server" / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(?:--)?([\w-]+)` \| (.*) \|$", text, re.MULTILINE))
    expected = {}
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
        expected["BASE" if name == "base" else name.replace("_", "-")] = f"{default} | {field.description}"
    assert table == expected


def test_the_errors_table_of_the_server_readme_is_generated() -> None:
    text = (ROOT / "server" / "README.md").read_text(encoding="utf-8")
    assert errors_table() in text, "paste what python -m deltaserve.api.openapi prints"


def test_every_command_that_the_readme_shows_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from deltaserve.cli import main

    shown = set(re.findall(r"deltaserve (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    commands = {"compress", "inspect", "restore", "evaluate", "compare"}
    commands |= {"serve", "demo", "push", "models", "complete", "delete"}
    commands |= {"tenant", "key", "usage", "audit", "doctor"}
    for command in sorted(shown & commands):
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith("usage: deltaserve")
    assert {"compress", "serve", "demo", "push"} <= shown


def test_every_folder_has_a_readme() -> None:
    for folder in ("server", "kernels", "clients", "tests", "docker", "tests/tenants", "tests/benchmarks"):
        assert (ROOT / folder / "README.md").is_file(), folder


def test_sample_tenants_are_whole_small_and_made_for_the_demo_base() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) <= 20e6
    codecs = set()
    for tenant in TENANTS:
        artifact = Artifact.open(SAMPLES / f"{tenant}.safetensors")
        assert artifact.manifest.base.fingerprint == FINGERPRINT
        assert len(artifact.manifest.layers) == 210
        assert artifact.manifest.chat_template
        codecs.add(artifact.manifest.codec)
        assert len((SAMPLES / "data" / f"{tenant}.test.jsonl").read_text(encoding="utf-8").splitlines()) == 200
    assert codecs == {"bitdelta", "dare", "delta-svd"}
