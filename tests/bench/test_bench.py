"""deltaserve bench: on an engine here and on a real server, what is printed and written is what happened."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.bench.report import figures
from deltaserve.bench.targets import Sample
from deltaserve.cli import main

if TYPE_CHECKING:
    from pathlib import Path

SHORT = ["--prompt-tokens", "4:20", "--answer-tokens", "3:5", "--requests", "12"]


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    whole = json.loads(file.read_text(encoding="utf-8"))
    return whole["figures"], whole["samples"]


def test_an_engine_here_with_two_tenants(
    tiny_base: Path, tenants: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(tiny_base), *SHORT, "--set", "dtype=float32", "--set", "served_model_name=tiny"]
    for name in ("sign", "sparse"):
        (tmp_path / name).write_bytes(tenants[name].artifact)
        words += ["--delta", f"{name}={tmp_path / name}"]
    assert main([*words, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]) == 0
    shown, samples = read(tmp_path / "out.json")
    assert {name: own["requests"] for name, own in shown.items()} == {"sign": 4, "sparse": 4, "tiny": 4, "all": 12}
    assert shown["all"]["failed"] == 0
    assert shown["all"]["tokens"] == sum(sample["num_tokens"] for sample in samples)
    assert {sample["state"] for sample in samples} == {None, "disk"}
    for sample in samples:
        assert 3 <= sample["num_tokens"] <= 5
        assert 0 < sample["first_s"] < sample["last_s"]
    printed = capsys.readouterr().out
    assert "TTFT p50" in printed
    assert "sparse" in printed
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_is_asked_for_all_its_models_and_shared_beginnings_are_cached(
    server: Any, tmp_path: Path, tenants: dict[str, Any]
) -> None:
    words = ["bench", "--url", server.url, "--prompt-tokens", "60", "--prefix-tokens", "48", "--answer-tokens", "3"]
    words += ["--rate", "40", "--duration", "1", "--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    shown, samples = read(tmp_path / "out.json")
    assert set(shown) == {*tenants, "all"}
    assert shown["all"]["requests"] == len(samples) > 15
    assert shown["all"]["cached_tokens"] > 0
    assert all(sample["num_tokens"] == 3 for sample in samples)


def test_a_mix_names_models_with_rates_and_a_failure_is_counted_and_told_by_the_exit_status(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--url", server.url, "--mix", "sign=10,nobody=10", "--duration", "1", "--answer-tokens", "2"]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 1
    shown, samples = read(tmp_path / "out.json")
    assert shown["nobody"]["failed"] == shown["nobody"]["requests"] > 0
    assert shown["sign"]["failed"] == 0
    printed = capsys.readouterr()
    assert "nobody " in printed.out and f"{shown['nobody']['failed']} requests: 404" in printed.err
    assert {sample["error"] for sample in samples if sample["model"] == "nobody"} == {"404"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a BASE or --url"),
        (["base", "--url", "http://localhost:1"], "and not both"),
        (["--url", "http://localhost:1"], "http://localhost:1"),
        (["base", "--rate", "2", "--requests", "8"], "--rate and --mix take --duration"),
        (["base", "--mix", "base=2", "--requests", "8"], "--rate and --mix take --duration"),
        (["base", "--duration", "8"], "--duration needs --rate or --mix"),
        (["base", "--delta", "nameless"], "--delta nameless: NAME=VALUE is needed"),
    ],
)
def test_wrong_usage_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_figures_are_of_what_was_answered() -> None:
    samples = [
        Sample("a", due_s=float(n), first_s=n + 0.1 * (n + 1), last_s=n + 2.0, num_tokens=11, num_cached=3)
        for n in range(4)
    ]
    shown = figures([*samples, Sample("a", due_s=0.0, error="429")])
    assert (shown["requests"], shown["failed"], shown["tokens"], shown["seconds"]) == (5, 1, 44, 5.0)
    assert (shown["tokens_per_s"], shown["cached_tokens"]) == (8.8, 12)
    assert shown["ttft_p50_ms"] == 250.0
    assert shown["tpot_p50_ms"] == 175.0
    assert figures([Sample("a", 0.0, error="429")])["ttft_p50_ms"] is None
