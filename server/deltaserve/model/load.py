"""The base as it is served: a transformers decoder whose layers know about deltas and whose attention is paged."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from deltaserve.deltas.artifact import Artifact, term_shape
from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint
from deltaserve.errors import ArtifactMismatch, CheckpointError
from deltaserve.model.attention import NAME, KvCache, make_attention
from deltaserve.model.delta_layers import DeltaEmbedding, DeltaHead, DeltaLinear, DeltaModule
from deltaserve.model.step import Step, StepContext

logger = logging.getLogger(__name__)
_serial = itertools.count()
# Rotary embeddings whose frequencies depend on the longest sequence of the batch: requests would disturb each other.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# What a model does to scores or logits beyond attention and head: served without it, it would answer wrongly.
UNSUPPORTED = (
    "attention_chunk_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
)


@dataclass(frozen=True)
class ServedModel:
    """`decoder` gives hidden states, `head` logits; `linear` and `other` name what a delta may change."""

    decoder: nn.Module
    head: DeltaHead
    context: StepContext
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_positions: int
    num_layers: int
    linear: frozenset[str]  # weights that take terms
    other: frozenset[str]  # tensors that take overrides

    @torch.inference_mode()
    def forward(self, step: Step, ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """ids, positions int64 [T] → logits float32 [R, vocabulary] of the rows `logit_rows` int64 [R]."""
        self.context.step = step
        try:
            output = self.decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
            hidden: Tensor = output.last_hidden_state[0]
            logits: Tensor = self.head(hidden[logit_rows]).float()
            return logits
        finally:
            self.context.step = None

    def check_servable(self, artifact: Artifact) -> None:
        """Raises ArtifactMismatch listing what this model cannot apply."""
        manifest = artifact.manifest
        problems = [
            f"{name}: no linear layer of this model ({'×'.join(map(str, layer.shape))})"
            for name, layer in manifest.layers.items()
            if name not in self.linear or len(layer.shape) != 2 or 0 in term_shape(layer)
        ]
        problems += [
            f"{name}: no tensor that can be overridden" for name in manifest.overrides if name not in self.other
        ]
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ArtifactMismatch(f"{len(problems)} tensors cannot be served on this base:\n{listed}")


def load_model(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None, kv_slots: int
) -> ServedModel:
    """Raises CheckpointError for what is no decoder-only model that can be served exactly."""
    context = StepContext(KvCache(kv_slots))
    attention = f"{NAME}_{next(_serial)}"  # transformers' table of them is global, the cache is this model's
    AttentionInterface.register(attention, make_attention(context))
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory, dtype=dtype or "auto", attn_implementation=attention
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{checkpoint.directory}: does not load as a decoder-only model: {error}") from None
    nn.Module.requires_grad_(nn.Module.eval(nn.Module.to(model, device)), False)
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}  # or one a layer type
    if dependent := kinds & BATCH_DEPENDENT_ROPE:
        raise CheckpointError(f"{checkpoint.name}: rope type {dependent.pop()!r} makes requests depend on each other")
    if changed := [name for name in UNSUPPORTED if getattr(config, name, None) not in (None, 1)]:
        raise CheckpointError(f"{checkpoint.name}: config.json asks for {', '.join(changed)}, which is not served")
    tied = bool(config.tie_word_embeddings)
    linear, other = _replace_layers(model, context, tied)
    head = next(module for module in model.modules() if isinstance(module, DeltaHead))
    if tied:
        other = other | {LM_HEAD}
    return ServedModel(
        decoder=model.base_model,
        head=head,
        context=context,
        device=device,
        dtype=model.dtype,
        vocab_size=head.weight.shape[0],
        max_positions=int(getattr(config, "max_position_embeddings", 2048)),
        num_layers=int(config.num_hidden_layers),
        linear=frozenset(linear),
        other=frozenset(other),
    )


def _replace_layers(model: PreTrainedModel, context: StepContext, tied: bool) -> tuple[set[str], set[str]]:
    """Puts delta-aware layers in place; → names that take terms, names that take overrides."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise CheckpointError(f"{type(model).__name__}: its head is no linear layer")
    embedding_name = next(name for name, module in model.named_modules() if module is embedding)
    linear: set[str] = set()
    other: set[str] = set()
    for name, module in list(model.named_modules()):
        own = {f"{name}.{local}" for local, _ in module.named_parameters(recurse=False)}
        if not own:
            continue
        replacement: nn.Module | None
        if module is head:
            replacement = DeltaHead(head, name, embedding_name, tied, context)
            linear.add(f"{name}.weight")
            other.add(f"{name}.weight")
        elif type(module) is nn.Linear:
            replacement = DeltaLinear(module, name, context)
            linear.add(f"{name}.weight")
            other.add(f"{name}.bias")
        elif type(module) is nn.Embedding:
            replacement = DeltaEmbedding(module, name, context)
            other.add(f"{name}.weight")
        elif not any(module.children()) and all(p.dim() == 1 for p in module.parameters()):
            replacement = DeltaModule(module, name, context)
            other |= own
        else:
            kind = type(module).__name__
            logger.info("%s (%s) is served as in the base; a delta that changes it is refused", name, kind)
            continue
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, replacement)
    return linear, other
