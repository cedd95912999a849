"""16 requests × 64 tokens, greedy, bf16: served base-only and a served mix of base and three tenants, beside batched
transformers.generate on the base, in one run, interleaved; then where the time of a decode step goes.

Ratios of medians are the result; this machine's absolute tokens/s are not. Refuses to speak if the mix's answers differ
from those of the tenants alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.deltas.companions import load_tokenizer

import common
from step_profile import profile_decode

REQUESTS, TOKENS = 16, 64


def serve(url: str, jobs: list[tuple[str, str]], **options: Any) -> tuple[float, list[str]]:
    """(seconds, answers) of all jobs at once"""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)

    def one(job: tuple[str, str]) -> str:
        extra = {"ignore_eos": True}
        answer = client.completions.create(
            model=job[0], prompt=job[1], max_tokens=TOKENS, temperature=0, extra_body=extra, **options
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(len(jobs)) as pool:
        began = time.perf_counter()
        answers = list(pool.map(one, jobs))
        return time.perf_counter() - began, answers


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[str]) -> float:
    """Seconds of one padded batch."""
    ids = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    began = time.perf_counter()
    model.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return time.perf_counter() - began


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    base = common.open_base(args)
    models = [common.BASE_NAME, *common.TENANTS]
    rows = [row for trio in zip(*(common.rows(t, 6) for t in common.TENANTS), strict=True) for row in trio]
    tokenizer = load_tokenizer(base.directory, common.artifact("numwords").manifest)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows[:REQUESTS]]
    prompts = [str(tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False)) for c in chats]
    base_jobs = [(common.BASE_NAME, prompt) for prompt in prompts]
    mixed_jobs = [(models[i % len(models)], prompt) for i, prompt in enumerate(prompts)]
    plain = common.restored_model(base, None, torch.bfloat16)
    seconds: dict[str, list[float]] = {"transformers": [], "served_base": [], "served_mix": []}
    with common.served(base) as url:
        _gate(url, mixed_jobs)
        rounds: list[tuple[str, Callable[[], float]]] = [
            ("transformers", lambda: generate(plain, tokenizer, prompts)),
            ("served_base", lambda: serve(url, base_jobs)[0]),
            ("served_mix", lambda: serve(url, mixed_jobs)[0]),
        ]
        for number in range(args.rounds + 1):
            for name, run in rounds:
                took = run()
                if number:  # the first round warms up
                    seconds[name].append(took)
    rate = {name: [REQUESTS * TOKENS / s for s in own] for name, own in seconds.items()}
    median = {name: statistics.median(own) for name, own in rate.items()}
    figures = {
        "job": f"{REQUESTS} requests x {TOKENS} tokens, greedy, bf16, HTTP for the served ones",
        "mix": "4 requests each of base, numwords (bitdelta), chain (dare), debsec (delta-svd)",
        "rounds": args.rounds,
        "tokens_per_s_median": {name: round(value, 1) for name, value in median.items()},
        "tokens_per_s_range": {name: [round(min(own), 1), round(max(own), 1)] for name, own in rate.items()},
        "served_base_over_transformers": round(median["served_base"] / median["transformers"], 3),
        "served_mix_over_transformers": round(median["served_mix"] / median["transformers"], 3),
        "served_mix_over_served_base": round(median["served_mix"] / median["served_base"], 3),
        "decode_step_ms": {
            "base": profile_decode(base, [None] * REQUESTS),
            "mix": profile_decode(base, [None if m == common.BASE_NAME else m for m, _ in mixed_jobs]),
        },
    }
    common.report(args, figures)
    return 0


def _gate(url: str, jobs: list[tuple[str, str]]) -> None:
    """The first token of each job alone and in the mix must be the same (bf16: later ones may part by rounding)."""
    together = serve(url, jobs)[1]
    for job, answer in zip(jobs, together, strict=True):
        alone = serve(url, [job])[1][0]
        if alone[:1] != answer[:1]:
            sys.exit(f"gate: {job[0]} answers {alone[:40]!r} alone and {answer[:40]!r} in the mix: no figures")


if __name__ == "__main__":
    sys.exit(main())
