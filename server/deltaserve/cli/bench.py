"""deltaserve bench."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.bench.workload import Job, Lengths, at_once, parse_range, poisson, shares
from deltaserve.cli.console import report_error, write_table
from deltaserve.errors import BadRequest

if TYPE_CHECKING:
    from deltaserve.bench.targets import Sample

NUM_REQUESTS = 64  # where all come at once
DURATION_S = 30.0  # where they come at a rate
SHOWN_ERRORS = 5


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="load on an engine here or on a server, and what each model got of it",
        description="Asks an engine in this process (BASE and --delta) or a server (--url) for greedy answers to "
        "random prompts, and prints time to first token, time per token and throughput for each model.",
    )
    parser.add_argument("base", nargs="?", metavar="BASE", help="base model: its engine is run here, without HTTP")
    parser.add_argument(
        "--delta", action="append", default=[], metavar="NAME=FILE", help="an artifact; may be repeated"
    )
    parser.add_argument("--url", help="a server instead; its models are asked, or those of --models or --mix")
    parser.add_argument("--api-key", default="none", help="bearer key for --url")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="ask these, the most popular first (default: all)")
    parser.add_argument("--mix", metavar="NAME=RATE,...", help="requests a second of each model; instead of --rate")
    parser.add_argument("--rate", type=float, default=math.inf, help="requests a second (default: all at once)")
    parser.add_argument("--popularity", default="uniform", help="identical, uniform or zipf:S (default: uniform)")
    parser.add_argument("--requests", type=int, help="how many, where all come at once (default: 64)")
    parser.add_argument("--duration", type=float, metavar="S", help="seconds of arrivals (default: 30)")
    for what in ("prompt", "answer"):
        text = f"tokens of {what}s, drawn evenly (default: 64)"
        parser.add_argument(f"--{what}-tokens", type=parse_range, default=(64, 64), metavar="N|LEAST:MOST", help=text)
    parser.add_argument("--prefix-tokens", type=int, default=0, metavar="N", help="tokens that a model's prompts share")
    parser.add_argument("--vocab-size", type=int, default=256, metavar="N", help="prompts have token ids below this")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts (default: 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures and every request")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="time to first token as .png or .svg")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 if every request was answered."""
    from deltaserve.bench.report import by, draw, figures, table

    if (args.base is None) == (args.url is None):
        raise BadRequest("name a BASE or --url, and not both")
    is_at_once = args.mix is None and math.isinf(args.rate)
    if args.requests is not None and not is_at_once:
        raise BadRequest("--requests is for requests that come all at once; --rate and --mix take --duration")
    if args.duration is not None and is_at_once:
        raise BadRequest("--duration needs --rate or --mix")
    samples = _here(args) if args.url is None else _there(args)
    groups = by(samples, lambda sample: sample.model)
    shown = {name: figures(own) for name, own in groups.items()} | {"all": figures(samples)}
    write_table(table(shown))
    for message, num in Counter(sample.error for sample in samples if sample.error).most_common(SHOWN_ERRORS):
        report_error(f"{num} requests: {message}")
    if args.json:
        whole = {"arguments": _plain(args), "figures": shown, "samples": [vars(sample) for sample in samples]}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(groups, args.plot)
    return 0 if not shown["all"]["failed"] else 1


def _here(args: argparse.Namespace) -> list[Sample]:
    from deltaserve.bench.offline import caller, engine
    from deltaserve.bench.targets import EngineTarget, play

    artifacts = {name: Path(file) for name, file in _pairs(args.delta, "--delta").items()}
    with engine(args.base, artifacts, **_pairs(args.set, "--set")) as services:
        jobs = _jobs(args, [services.base_id, *artifacts])
        for name in {job.model for job in jobs} - {services.base_id}:
            services.store.models.find(caller(services), name)  # an unknown name is an error now
        return asyncio.run(play(jobs, EngineTarget(services)))


def _there(args: argparse.Namespace) -> list[Sample]:
    import httpx

    from deltaserve.bench.targets import HttpTarget, play

    headers = {"Authorization": f"Bearer {args.api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def measure() -> list[Sample]:
        async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=None, limits=limits) as client:
            listed = (await client.get("/v1/models")).raise_for_status().json()["data"]
            return await play(_jobs(args, [model["id"] for model in listed]), HttpTarget(client))

    try:
        return asyncio.run(measure())
    except httpx.HTTPError as error:
        raise BadRequest(f"{args.url}: {error}") from None


def _jobs(args: argparse.Namespace, known: list[str]) -> list[Job]:
    lengths = Lengths(args.prompt_tokens, args.answer_tokens, args.prefix_tokens, args.vocab_size)
    duration = DURATION_S if args.duration is None else args.duration
    if args.mix:
        rates = {name: float(rate) for name, rate in _pairs(args.mix.split(","), "--mix").items()}
        return poisson(rates, duration, lengths, args.seed)
    weights = shares(args.popularity, args.models or known)
    if math.isinf(args.rate):
        return at_once(weights, NUM_REQUESTS if args.requests is None else args.requests, lengths, args.seed)
    return poisson({m: args.rate * weight for m, weight in weights.items()}, duration, lengths, args.seed)


def _pairs(given: list[str], flag: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if bad := [name for name, separator, value in pairs if not (name and separator and value)]:
        raise BadRequest(f"{flag} {bad[0]}: NAME=VALUE is needed")
    return {name.strip(): value for name, _, value in pairs}


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("run", "api_key", "json", "plot")} | {
        "rate": None if math.isinf(args.rate) else args.rate
    }
