"""The base as it is served: by the own decoder, or a transformers decoder."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint
from deltaserve.errors import CheckpointError
from deltaserve.model.attention import NAME, KvCache, make_attention
from deltaserve.model.delta_layers import DeltaLinear
from deltaserve.model.kernels import (
    check_graphs,
    check_materialize,
    fused_kernels,
    make_scratch,
    native_library,
    paged_kernel,
    stored_dtype,
)
from deltaserve.model.native import NativeModel, native_fits
from deltaserve.model.probe import DECODES, Reference
from deltaserve.model.quantization import Quantization, check_stored_whole, quantise
from deltaserve.model.served import ServedModel
from deltaserve.model.shape import check_exact
from deltaserve.model.step import StepContext
from deltaserve.model.transformers_model import TransformersModel, recorded, replace_layers

if TYPE_CHECKING:
    from deltaserve.model.recording import GraphLimits

logger = logging.getLogger(__name__)
_serial = itertools.count()


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    kv_slots: int,
    block_size: int = 1,
    kernels: str = "auto",
    quantization: Quantization = "none",
    materialize_tokens: int | Literal["auto"] = 0,
    graphs: GraphLimits | None = None,
) -> ServedModel:
    """`kernels`: auto, torch, triton, or a native instruction set. A quantised base runs in transformers.
    `materialize_tokens`: rows of one delta in a step from which Triton's kernels write its weights out, 0: never.
    `graphs`: decode steps of how many rows are recorded where Triton's kernels run on a GPU; None: of none.
    Raises CheckpointError for what is no decoder-only model that can be served exactly, BadRequest for kernels, a
    quantization, written weights or graphs that cannot be had."""
    check_stored_whole(checkpoint)
    dtype = dtype or stored_dtype(checkpoint)
    fused = fused_kernels(kernels, device)
    if materialize_tokens:
        check_materialize(materialize_tokens, fused, quantised=quantization != "none")
    limits = check_graphs(graphs, fused)
    library = native_library(kernels, device, dtype)
    if library is not None and quantization == "none" and native_fits(checkpoint, block_size):
        return NativeModel.load(checkpoint, library, kv_slots)
    if device.type == "cpu":
        logger.warning(
            "%s runs in transformers, slower than the own decoder for Llama, Mistral, Qwen2 and Qwen3 in bfloat16",
            checkpoint.name if quantization == "none" else f"{checkpoint.name} in {quantization}",
        )
    unused = 1 if limits else 0  # a slot for rows of a recording that the step lacks
    context = StepContext(KvCache(kv_slots + unused))
    model, reference, max_positions = _load_base(checkpoint, context, device, dtype, quantization)
    config = model.config.get_text_config()
    if fused is not None:
        longest = limits.positions if limits else min(max_positions, kv_slots)
        context.paged = paged_kernel(longest, block_size)
    tied = bool(config.tie_word_embeddings)
    layers = replace_layers(model, context, tied, reference.axes)
    shapes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, DeltaLinear)}
    made = TransformersModel(
        causal=model,
        context=context,
        device=device,
        dtype=model.dtype,
        vocab_size=layers.head.weight.shape[0],
        max_positions=max_positions,
        num_layers=int(config.num_hidden_layers),
        kv_slots=kv_slots,
        linear=frozenset(site.name for site in layers.sites if site.own is None),
        other=frozenset({*layers.other, LM_HEAD} if tied else layers.other),
        library=library,
        fused=fused,
        scratch=make_scratch(fused, materialize_tokens, shapes, model.dtype) if fused and materialize_tokens else None,
        sites=tuple(layers.sites),
        outside=frozenset({*layers.outside, LM_HEAD}),
        quantization=quantization,
    )
    reference.check(made, block_size)
    if fused is None or limits is None:
        return made
    check = partial(reference.check, block_size=block_size, cuts=DECODES)
    return recorded(made, layers.embedding, fused, limits, block_size, check)


def _load_base(
    checkpoint: Checkpoint, context: StepContext, device: torch.device, dtype: torch.dtype, quantization: Quantization
) -> tuple[PreTrainedModel, Reference, int]:
    """The base with our attention, what it answered with its own, and up to which position it is exact."""
    attention = f"{NAME}_{next(_serial)}"  # transformers' table of them is global, the cache is this model's
    AttentionInterface.register(attention, make_attention(context))
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory, dtype=dtype, attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{checkpoint.directory}: does not load as a decoder-only model: {error}") from None
    nn.Module.requires_grad_(nn.Module.eval(nn.Module.to(model, device)), False)
    config = model.config.get_text_config()
    max_positions = check_exact(checkpoint.name, config)
    quantise(model, model.get_output_embeddings(), quantization)  # type: ignore[no-untyped-call]
    reference = Reference.of(model, int(config.vocab_size), device)
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        kind = type(model).__name__
        raise CheckpointError(f"{checkpoint.name}: {kind} has attention of its own, which is not served")
    return model, reference, max_positions
