"""Served greedy tokens against transformers.generate on each tenant's restored checkpoint, float32, batches mixed.

Token equality alone cannot show that a delta is applied, so the answers are also compared with the base's own.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.deltas.companions import load_tokenizer

import common

MAX_TOKENS = 32


def ask(client: openai.OpenAI, model: str, prompt: str) -> tuple[list[str], float]:
    """(tokens, log-probability of the first)"""
    message: Any = {"role": "user", "content": prompt}
    choice = client.chat.completions.create(
        model=model, messages=[message], max_tokens=MAX_TOKENS, temperature=0, logprobs=True
    ).choices[0]
    assert choice.logprobs and choice.logprobs.content
    return [token.token for token in choice.logprobs.content], choice.logprobs.content[0].logprob


@torch.inference_mode()
def reference(model: Any, tokenizer: Any, prompt: str) -> tuple[list[str], float]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **ids, max_new_tokens=MAX_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = out.sequences[0, ids["input_ids"].shape[1] :].tolist()
    return [tokenizer.decode([token]) for token in new], float(out.logits[0][0].log_softmax(-1)[new[0]])


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=20, help="for each model")
    args = parser.parse_args()
    base = common.open_base(args)
    models = (common.BASE_NAME, *common.TENANTS)
    prompts = {tenant: [row["prompt"] for row in common.rows(tenant, args.prompts)] for tenant in common.TENANTS}
    mixed = [prompt for trio in zip(*prompts.values(), strict=True) for prompt in trio]
    prompts[common.BASE_NAME] = mixed[: args.prompts]
    jobs = [(model, prompts[model][i]) for i in range(args.prompts) for model in models]
    with common.served(base, "--dtype", "float32") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600, max_retries=0)
        with ThreadPoolExecutor(len(jobs)) as pool:
            got = dict(zip(jobs, pool.map(lambda job: ask(client, *job), jobs), strict=True))
    figures: dict[str, Any] = {}
    plain = common.restored_model(base, None, torch.float32)
    for model in models:
        own = None if model == common.BASE_NAME else common.artifact(model)
        tokenizer = load_tokenizer(base.directory, own.manifest if own else None)
        restored = common.restored_model(base, own, torch.float32) if own else plain
        equal, as_base, worst = 0, 0, 0.0
        for prompt in prompts[model]:
            tokens, logprob = reference(restored, tokenizer, prompt)
            served_tokens, served_logprob = got[model, prompt]
            equal += tokens == served_tokens
            worst = max(worst, abs(logprob - served_logprob))
            as_base += reference(plain, tokenizer, prompt)[0] == served_tokens
        figures[model] = {
            "prompts": args.prompts,
            "equal_to_restored": equal,
            "largest_first_token_logprob_difference": worst,
            "equal_to_base": as_base,
        }
    common.report(args, {"concurrent_requests": len(jobs), "models": figures})
    return 0 if all(entry["equal_to_restored"] == args.prompts for entry in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
