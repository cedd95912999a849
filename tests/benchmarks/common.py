"""What the benchmarks share: the real server as a process, the sample tenants, the machine's description."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.restore import restored_tensor
from deltaserve.demo import BASE_NAME, SAMPLES, TENANTS, running_server
from deltaserve.demo_base import demo_base
from deltaserve_client import Client

__all__ = ["BASE_NAME", "SAMPLES", "TENANTS"]


def parser(text: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--base", help="directory or .gguf of the base (default: the demo's)")
    made.add_argument("--json", type=Path, help="write the figures here")
    return made


def open_base(args: argparse.Namespace) -> Checkpoint:
    return Checkpoint.open(demo_base(args.base))


def rows(task: str, limit: int | None = None) -> list[dict[str, str]]:
    lines = (SAMPLES / "data" / f"{task}.test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def same(task: str, got: str, want: str) -> bool:
    """chain: the final number; else the answer, case aside."""
    if task == "chain":
        return got.split("=")[-1].strip() == want.split("=")[-1].strip()
    return got.strip().lower() == want.strip().lower()


@contextmanager
def served(base: Checkpoint, *options: str) -> Iterator[str]:
    """URL of a server of its own with the sample tenants uploaded."""
    with tempfile.TemporaryDirectory() as directory, running_server(base.directory, Path(directory), *options) as url:
        with Client(url) as client:
            for tenant in TENANTS:
                client.upload(tenant, SAMPLES / f"{tenant}.safetensors")
        yield url


def restored_model(base: Checkpoint, artifact: Artifact | None, dtype: torch.dtype) -> Any:
    """transformers' model of a restored sample tenant (no new tokens, tied head), or of the base."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory, dtype=dtype)
    if artifact is not None:
        state = model.state_dict()
        with torch.no_grad():
            for name in base.names:
                state[name].copy_(restored_tensor(base, artifact, name, dtype))
    return model.eval()


def artifact(tenant: str) -> Artifact:
    return Artifact.open(SAMPLES / f"{tenant}.safetensors")


def copy_of(tenant: str | Path, number: int) -> bytes:
    """The bytes of an artifact with `number` · 8 spaces after its header: the same weights, another digest."""
    data = (tenant if isinstance(tenant, Path) else SAMPLES / f"{tenant}.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return (size + 8 * number).to_bytes(8, "little") + data[8 : 8 + size] + b" " * 8 * number + data[8 + size :]


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    whole = {"machine": machine(), **figures}
    sys.stdout.write(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def process_figures(pid: int) -> dict[str, Any]:
    """What a process of this machine holds now; MB resident."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return {
        "rss_mb": round(int(fields["VmRSS"].split()[0]) / 1000, 1),
        "open_files": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        "threads": int(fields["Threads"]),
        "processes": len(children),
    }
