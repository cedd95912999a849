"""What a base's config.json says that decides whether, and by which decoder, it can be served exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaserve.errors import CheckpointError

# Rotary embeddings whose frequencies change once a sequence of the batch is longer than the model was first trained
# for: requests would disturb each other. Up to that length they are fixed.
GROWING_ROPE = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
LLAMA_FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
LANES, LARGEST_HEAD = 16, 256  # of the native decoder


def _rope_kinds(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters: the model's, or one a layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_type" in part]


def check_exact(name: str, config: Any) -> int:
    """Positions up to which the model answers as in transformers, whatever the company of a request. Raises
    CheckpointError where there are none."""
    if getattr(config, "attention_chunk_size", None) is not None:
        raise CheckpointError(f"{name}: config.json asks for attention_chunk_size, which is not served")
    positions = int(getattr(config, "max_position_embeddings", 2048))
    for part in _rope_kinds(config):
        if bound := GROWING_ROPE.get(part["rope_type"]):
            positions = min(positions, int(part.get(bound) or getattr(config, bound, None) or positions))
    return positions


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a decoder of the Llama family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int
    norm_eps: float
    head_norms: bool  # Qwen3's, of queries and keys
    windows: tuple[int, ...]  # of each layer's attention, 0: none
    tied: bool

    @classmethod
    def of(cls, config: Any) -> LlamaShape | None:
        """None for another architecture, or one of this that the native decoder cannot run."""
        if config.model_type not in LLAMA_FAMILY or config.hidden_act != "silu":
            return None
        heads = config.num_attention_heads
        shape = cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            head_norms=config.model_type == "qwen3",
            windows=_windows(config),
            tied=bool(config.tie_word_embeddings),
        )
        whole = all(size % LANES == 0 for size in (shape.hidden, shape.intermediate, shape.head_size))
        partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0
        growing = any(part["rope_type"] in GROWING_ROPE for part in _rope_kinds(config))
        return shape if whole and shape.head_size <= LARGEST_HEAD and not partial and not growing else None


def _windows(config: Any) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return tuple(window if config.model_type == "mistral" else 0 for _ in range(config.num_hidden_layers))
