"""Nine tenants ask now and then; a tenth sends fifty times the load of one of them. What do the nine notice?

Each tenant has a delta of its own, all of them resident. The nine's arrivals and prompts are the same in every run.
Runs alternate: without the flood, with it, and with it under caps for each tenant. The engine alone, without HTTP.
The nine must ask for less than their share, a tenth each, or they queue behind themselves: see --rate.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.bench.offline import engine, register
from deltaserve.bench.report import figures
from deltaserve.bench.targets import EngineTarget, Sample, play
from deltaserve.bench.workload import Lengths, at_once, poisson

import common

CALM = [f"calm{number}" for number in range(9)]
LENGTHS = Lengths(prompt=(16, 48), answer=(8, 24))


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=40.0)
    parser.add_argument("--rate", type=float, default=0.2, help="requests a second of each of the nine")
    parser.add_argument("--seats", type=int, default=32)
    parser.add_argument("--cap", type=int, default=8, help="seats of one tenant in the third kind of run")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of one step and tenant in the third kind of run")
    args = parser.parse_args()
    base = common.open_base(args)
    runs: dict[str, list[Sample]] = {"without": [], "flood": [], "flood, capped": []}
    flood: list[Sample] = []
    for number in range(args.rounds):
        for kind, samples in runs.items():
            rates = dict.fromkeys(CALM, args.rate) | ({} if kind == "without" else {"flood": 50 * args.rate})
            caps = {"max_num_seqs_per_tenant": args.cap, "max_num_batched_tokens_per_tenant": args.tokens}
            options = caps if kind == "flood, capped" else {}
            found = run(base, rates, args, number, options)
            samples += [sample for sample in found if sample.model != "flood"]
            flood += [sample for sample in found if sample.model == "flood" and kind == "flood"]
    own = {kind: figures(samples) for kind, samples in runs.items()}
    ratios = {
        f"{kind}: p{p} of the nine over without": round(own[kind][f"ttft_p{p}_ms"] / own["without"][f"ttft_p{p}_ms"], 2)
        for kind in ("flood", "flood, capped")
        for p in (50, 99)
    }
    common.report(args, {"arguments": options_of(args), "nine": own, "the flood": figures(flood), **ratios})
    return 0


def run(base: Any, rates: dict[str, float], args: Any, seed: int, options: dict[str, Any]) -> list[Sample]:
    settings = {"max_num_seqs": args.seats, "max_num_queued_reqs_per_tenant": 32, "num_threads": 1, "max_deltas": 16}
    with engine(str(base.directory), {}, **settings, **options) as services:
        for number, name in enumerate([*CALM, "flood"]):
            register(services, name, common.copy_of("debsec", number))
        target = EngineTarget(services)
        warm = dict.fromkeys([*CALM, "flood"], 1.0)
        asyncio.run(play(at_once(warm, len(warm), LENGTHS, -1), target))
        return asyncio.run(play(poisson(rates, args.duration, LENGTHS, seed), target))


def options_of(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("rounds", "duration", "rate", "seats", "cap", "tokens")}


if __name__ == "__main__":
    sys.exit(main())
