"""What tenants cost: tokens/s and time a token with 1 to 32 of them in the mix, over the base's own.

One engine with 32 tenants resident; every run is the same 32 requests at once but for the models they name. Popularity:
identical (all ask one), uniform and zipf-1.5 over N tenants, and all different (32 of 32). Runs alternate with base's.
`--crowd N`: that many tenants registered, as many resident as fit, each asked once: memory, and that all answer.
The tenants are the samples in turn, each copy a delta of its own to the engine. The engine alone, no HTTP.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.bench.offline import engine, register
from deltaserve.bench.report import figures
from deltaserve.bench.targets import EngineTarget, play
from deltaserve.bench.workload import Lengths, at_once, shares

import common

MOST = 32
MIXES = {"base": ("base", 0), "identical": ("identical", 1)}
MIXES |= {f"uniform over {n}": ("uniform", n) for n in (2, 4, 8, 16)}
MIXES |= {f"zipf-1.5 over {n}": ("zipf:1.5", n) for n in (8, 32)}
MIXES |= {"all different": ("uniform", MOST)}
KEPT = ("tokens_per_s", "tpot_p50_ms", "tpot_p99_ms")


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--deltas", type=Path, nargs="+", help="artifacts (default: the samples)")
    parser.add_argument("--crowd", type=int, default=0)
    parser.add_argument("--resident", type=int, default=300, help="of the crowd, on the device")
    args = parser.parse_args()
    base = common.open_base(args)
    files = args.deltas or [common.SAMPLES / f"{tenant}.safetensors" for tenant in common.TENANTS]
    arguments = {"rounds": args.rounds, "requests": MOST, "answer_tokens": args.answer_tokens, "threads": args.threads}
    shown = {"arguments": {**arguments, "deltas": [file.name for file in files]}}
    measure = crowd if args.crowd else mixes
    common.report(args, {**shown, **measure(str(base.directory), files, args)})
    return 0


def mixes(base: str, files: list[Path], args: Any) -> dict[str, Any]:
    lengths = Lengths((32, 32), (args.answer_tokens, args.answer_tokens))
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in MIXES}
    with engine(base, {}, max_deltas=MOST, num_threads=args.threads, prefix_caching=False) as services:
        names = [f"t{number}" for number in range(MOST)]
        for number, name in enumerate(names):
            register(services, name, common.copy_of(files[number % len(files)], number))
        target = EngineTarget(services)
        asyncio.run(play(at_once(dict.fromkeys(names, 1.0), MOST, lengths, -1), target))  # all resident from here on
        for number in range(args.rounds):
            for mix, (popularity, count) in MIXES.items():
                weights = shares(popularity, names[:count]) if count else {services.base_id: 1.0}
                own = figures(asyncio.run(play(at_once(weights, MOST, lengths, number), target)))
                assert not own["failed"]
                seen[mix].append({name: own[name] for name in KEPT})
    medians = {mix: {name: statistics.median(run[name] for run in runs) for name in KEPT} for mix, runs in seen.items()}
    for mix, runs in seen.items():
        shares_of_base = [
            run["tokens_per_s"] / alone["tokens_per_s"] for run, alone in zip(runs, seen["base"], strict=True)
        ]
        medians[mix]["throughput_over_base"] = round(statistics.median(shares_of_base), 3)
    return {"mixes": medians}


def crowd(base: str, files: list[Path], args: Any) -> dict[str, Any]:
    lengths = Lengths((16, 16), (4, 4))
    settings = {"max_deltas": args.resident, "max_cpu_deltas": args.crowd, "num_threads": args.threads}
    with engine(base, {}, max_num_queued_reqs=args.crowd, **settings) as services:
        alone, began = memory(), time.perf_counter()
        names = [f"t{number}" for number in range(args.crowd)]
        for number, name in enumerate(names):
            register(services, name, common.copy_of(files[number % len(files)], number))
        registered, target = time.perf_counter() - began, EngineTarget(services)
        runs = []
        for asked in (names[: args.resident], names):
            own = figures(asyncio.run(play(at_once(dict.fromkeys(asked, 1.0), len(asked), lengths, 0), target)))
            assert not own["failed"]
            runs.append({"asked": len(asked), "tokens_per_s": own["tokens_per_s"], "memory_mb": memory() - alone})
    return {"crowd": args.crowd, "resident": args.resident, "registered_s": round(registered, 1), "runs": runs}


def memory() -> int:
    """Resident, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) // 1024


if __name__ == "__main__":
    sys.exit(main())
