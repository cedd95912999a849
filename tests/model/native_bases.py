"""Tiny bases in bfloat16 that the native decoder runs, and steps of a model without scheduler or runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.model.attention import Span
from deltaserve.model.load import load_model
from deltaserve.model.native import NativeModel
from deltaserve.model.step import Step
from deltaserve_kernels.native.library import NEEDS, available
from deltaserve_kernels.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaserve.deltas.resident import ResidentDelta
    from deltaserve.model.served import ServedModel

BLOCK = 16
SMALL: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **fields})


# Sites of llama-wide are fused: its rows begin at multiples of 64. In the others q, k, v, gate and up are alone.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
CONFIGS: dict[str, Any] = {
    "llama": llama(),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-biases": llama(attention_bias=True, mlp_bias=True),
    "llama-wide": llama(**WIDE, attention_bias=True),
    "llama-head-64": llama(head_dim=64, num_attention_heads=2, num_key_value_heads=1),
    "llama-head-48": llama(head_dim=48, num_attention_heads=2),
    "llama-group-1": llama(num_key_value_heads=4),
    "llama-group-3": llama(num_attention_heads=6, hidden_size=96),
    "llama-group-4": llama(num_key_value_heads=1),
    "llama-group-5": llama(num_attention_heads=5, num_key_value_heads=1, hidden_size=80),
    "llama3-rope": llama(rope_parameters=ROPE),
    "mistral-window": MistralConfig(**SMALL, sliding_window=5),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL),
}


@pytest.fixture(params=list(NEEDS))
def kernels(request: pytest.FixtureRequest) -> str:
    """Each instruction set that there is."""
    name: str = request.param
    if name not in available():
        pytest.skip(f"{name}: not built, or not an instruction set of this processor")
    return name


def save(config: Any, out: Path, change: float = 0.0) -> Path:
    """Random weights from a fixed seed, norms and biases too; `change`: noise of another seed times it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of one and biases of zero would hide mistakes
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for parameter in model.parameters():
            parameter += change * torch.randn(parameter.shape, generator=generator)
    model.to(torch.bfloat16).save_pretrained(out)
    return out


def load_native(base: Path, kernels: str = "auto", kv_slots: int = 512) -> NativeModel:
    model = load_model(
        Checkpoint.open(base),
        device=torch.device("cpu"),
        dtype=None,
        kv_slots=kv_slots,
        block_size=BLOCK,
        kernels=kernels,
    )
    assert isinstance(model, NativeModel)
    return model


def reference(directory: Path, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """float32 [T, V]: logits of transformers, all positions at once."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return logits


def relative_rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@dataclass
class Text:
    """A sequence of slot `slot` whose KV lies in `blocks`; `logits` holds those of its tokens so far."""

    tokens: list[int]
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # float32 [V] each

    @property
    def stacked(self) -> torch.Tensor:
        """[T, V]; V: what none of them has at −inf."""
        rows = torch.stack([row[: min(map(len, self.logits))] for row in self.logits])
        return rows[:, rows.isfinite().all(0)]


def advance(
    model: ServedModel, chunks: Sequence[tuple[Text, int]], deltas: Sequence[ResidentDelta | None] = ()
) -> None:
    """One step: the next tokens of each text, as many as said; their logits are added to it. In order of slots."""
    chunks = sorted(chunks, key=lambda chunk: chunk[0].slot)
    ids, positions, slots, spans = [], [], [], []
    for text, count in chunks:
        done = len(text.logits)
        spans.append(Span(len(ids), len(ids) + count, done + count, text.blocks))
        ids += text.tokens[done : done + count]
        positions += range(done, done + count)
        slots += [text.slot] * count
    segments = Segments.of(slots)
    step = Step(len(ids), segments, segments, deltas, spans, BLOCK, model.device)
    given = (torch.tensor(ids), torch.tensor(positions), torch.arange(len(ids)))
    logits = model.forward(step, *(tensor.to(model.device) for tensor in given)).cpu()
    for (text, _), span in zip(chunks, spans, strict=True):
        text.logits += logits[span.start : span.stop].clone()


def decode(model: ServedModel, texts: Sequence[Text], count: int, deltas: Sequence[ResidentDelta | None] = ()) -> None:
    """`count` greedy tokens more for each text, all of them in the same steps; then their logits as well."""
    for _ in range(count):
        advance(model, [(text, len(text.tokens) - len(text.logits)) for text in texts], deltas)
        for text in texts:
            text.tokens.append(int(text.logits[-1].argmax()))
    advance(model, [(text, 1) for text in texts], deltas)
