"""More tenants than places on the device: 0.5, 1, 2 and 4 times as many. When does the first token come?

Every tenant has a delta of its own, the load is the same in every run and spread evenly. The host holds twice what the
device does, so that up to 2× nothing is read from disk again; at 4× half of it is. Runs alternate. The engine alone.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.bench.offline import engine, register
from deltaserve.bench.report import by, figures
from deltaserve.bench.targets import EngineTarget, Sample, play
from deltaserve.bench.workload import Lengths, at_once, poisson

import common

TIMES = (0.5, 1, 2, 4)
LENGTHS = Lengths(prompt=(16, 48), answer=(8, 24))
TIERS = {"device": "hot", "host": "host-warm", "disk": "disk-cold"}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second, all tenants together")
    parser.add_argument("--places", type=int, default=8, help="deltas that fit on the device")
    args = parser.parse_args()
    base = common.open_base(args)
    samples: dict[float, list[Sample]] = {times: [] for times in TIMES}
    reads: dict[float, list[float]] = {times: [] for times in TIMES}
    for number in range(args.rounds):
        for times in TIMES:
            found, count = run(base, round(times * args.places), args, number)
            samples[times] += found
            reads[times].append(count / max(len(found), 1))
    shown = {}
    for times, own in samples.items():
        tiers = by(own, lambda sample: TIERS[sample.state or "disk"])
        shown[f"{times}x"] = {
            **figures(own),
            "reads_from_disk_per_request": round(statistics.mean(reads[times]), 3),
            **{tier: figures(part) for tier, part in tiers.items()},
        }
    ratio = shown["2x"]["ttft_p50_ms"] / shown["0.5x"]["ttft_p50_ms"]
    arguments = {name: getattr(args, name) for name in ("rounds", "duration", "rate", "places")}
    common.report(args, {"arguments": arguments, "tenants": shown, "median_at_2x_over_half": round(ratio, 2)})
    return 0


def run(base: Any, tenants: int, args: Any, seed: int) -> tuple[list[Sample], float]:
    """(samples, reads from disk after the warm-up)"""
    settings = {"max_deltas": args.places, "max_cpu_deltas": 2 * args.places, "num_threads": 1}
    with engine(str(base.directory), {}, **settings) as services:
        names = [f"t{number}" for number in range(tenants)]
        for number, name in enumerate(names):
            register(services, name, common.copy_of("debsec", number))
        target = EngineTarget(services)
        asyncio.run(play(at_once(dict.fromkeys(names, 1.0), tenants, LENGTHS, -1), target))
        before = reads_of(services)
        rates = dict.fromkeys(names, args.rate / tenants)
        found = asyncio.run(play(poisson(rates, args.duration, LENGTHS, seed), target))
        return found, reads_of(services) - before


def reads_of(services: Any) -> float:
    labels = {"model_name": services.metrics.model_name, "tier": "disk"}
    found = services.metrics.registry.get_sample_value("deltaserve:delta_load_seconds_count", labels)
    return float(found or 0)


if __name__ == "__main__":
    sys.exit(main())
