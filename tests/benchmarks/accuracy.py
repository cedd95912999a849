"""Exact match of each sample tenant through /v1/chat/completions, beside its restored checkpoint and its fine-tune."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch

sys.path.insert(0, str(Path(__file__).parent))
import transformers

from deltaserve.deltas.companions import load_tokenizer

import common

MAX_TOKENS = 64
CONCURRENCY = 24


def over_http(url: str, task: str, model: str, data: list[dict[str, str]]) -> list[bool]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)

    def hit(row: dict[str, str]) -> bool:
        message: Any = {"role": "user", "content": row["prompt"]}
        answer = client.chat.completions.create(model=model, messages=[message], max_tokens=MAX_TOKENS, temperature=0)
        return common.same(task, answer.choices[0].message.content or "", row["answer"])

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(hit, data))


@torch.inference_mode()
def generated(model: Any, tokenizer: Any, task: str, data: list[dict[str, str]], batch: int = 40) -> list[bool]:
    tokenizer.padding_side = "left"
    hits: list[bool] = []
    for start in range(0, len(data), batch):
        part = data[start : start + batch]
        chats = [[{"role": "user", "content": row["prompt"]}] for row in part]
        ids = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += [common.same(task, text, row["answer"]) for text, row in zip(texts, part, strict=True)]
    return hits


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--finetunes", type=Path, help="directory of the full fine-tunes (tests/tenants/make.py --work)"
    )
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    base = common.open_base(args)
    figures: dict[str, Any] = {}
    data = {tenant: common.rows(tenant, args.limit) for tenant in common.TENANTS}
    # All tenants at once: every batch is mixed.
    with common.served(base) as url, ThreadPoolExecutor(len(data)) as pool:
        asked = {tenant: pool.submit(over_http, url, tenant, tenant, own) for tenant, own in data.items()}
        hits = {tenant: future.result() for tenant, future in asked.items()}
    for tenant, own in data.items():
        opened = common.artifact(tenant)
        tokenizer = load_tokenizer(base.directory, opened.manifest)
        restored = generated(common.restored_model(base, opened, torch.bfloat16), tokenizer, tenant, own)
        figures[tenant] = {
            "codec": opened.manifest.codec,
            "bits_per_parameter": round(opened.bits_per_parameter, 4),
            "rows": len(own),
            "served": sum(hits[tenant]) / len(own),
            "restored": sum(restored) / len(own),
            "rows_that_differ": sum(a != b for a, b in zip(hits[tenant], restored, strict=True)),
        }
        if args.finetunes:
            whole = transformers.AutoModelForCausalLM.from_pretrained(args.finetunes / tenant, dtype=torch.bfloat16)
            figures[tenant]["finetune"] = sum(generated(whole.eval(), tokenizer, tenant, own)) / len(own)
    common.report(args, {"scoring": "exact match; chain: the final number", "tenants": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
