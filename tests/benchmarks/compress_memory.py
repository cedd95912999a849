"""Memory and time of compressing, by codec: what is allocated above the checkpoints, which are mapped from their files.

    python tests/benchmarks/compress_memory.py BASE FINETUNED [--bits B] [--codecs NAME,…] [-o FILE.json]

Each codec in a process of its own, which has imported everything and opened both checkpoints before it begins. Memory
is the anonymous part of what is resident (Linux, /proc/PID/smaps_rollup), every 20 ms: its most less that at the
beginning. A layer: the largest matrix of the model in float32. A codec that cannot reach the size is asked for none.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import CODECS, make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import make_manifest
from deltaserve.deltas.prepare import make_delta
from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

EVERY_S = 0.02
MB = 2**20


def work(told: Connection, base: str, finetuned: str, name: str, bits: float) -> None:
    import deltaserve.deltas.calibration
    import deltaserve.deltas.reference_model  # noqa: F401 (imported, not measured)

    checkpoints = Checkpoint.open(base), Checkpoint.open(finetuned)
    make_manifest(*checkpoints, name, {})  # its tokenizer
    try:
        codec = make_codec(name, Budget(bits=bits))
    except CodecError:
        codec = make_codec(name, Budget())
    told.send("ready")
    told.recv()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        artifact = make_delta(*checkpoints, codec, Path(directory) / "delta.safetensors")
        told.send((time.perf_counter() - start, artifact.bits_per_parameter))


def anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def measure(base: str, finetuned: str, name: str, bits: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, base, finetuned, name, bits), daemon=True)
    process.start()
    theirs.close()
    ours.recv()
    assert process.pid is not None
    before = most = anonymous(process.pid)
    ours.send("go")
    while not ours.poll(EVERY_S):
        most = max(most, anonymous(process.pid))
    seconds, size = ours.recv()
    process.join()
    return {"codec": name, "bits": round(size, 4), "seconds": round(seconds, 1), "mb": round((most - before) / MB, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("finetuned")
    parser.add_argument("--bits", type=float, default=1.2)
    parser.add_argument("--codecs", default=",".join(sorted(CODECS)))
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.finetuned)
    matrices = [entry for entry in checkpoint.entries.values() if len(entry.shape) == 2]
    linears = [entry for name, entry in checkpoint.entries.items() if len(entry.shape) == 2 and "embed" not in name]
    largest = max(entry.shape[0] * entry.shape[1] for entry in linears) * 4
    about = {
        "model_mb": round(checkpoint.num_bytes / MB, 1),
        "layer_mb": round(largest / MB, 1),
        "matrices": len(matrices),
    }
    print(about)
    rows = []
    for name in args.codecs.split(","):
        rows.append(measure(args.base, args.finetuned, name, args.bits))
        print(rows[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps({**about, "codecs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
