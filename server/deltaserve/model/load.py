"""The base as it is served: a transformers decoder whose layers know about deltas and whose attention is paged."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint
from deltaserve.deltas.resident import ResidentDelta, ServedTerm
from deltaserve.errors import CheckpointError
from deltaserve.model.attention import NAME, KvCache, make_attention
from deltaserve.model.delta_layers import DeltaEmbedding, DeltaHead, DeltaLinear, DeltaModule
from deltaserve.model.fused_delta import bundled
from deltaserve.model.kernels import (
    check_materialize,
    fused_kernels,
    fused_step,
    make_scratch,
    native_library,
    served_form,
    stored_dtype,
)
from deltaserve.model.native import NativeModel, native_fits
from deltaserve.model.probe import Reference
from deltaserve.model.quantization import Quantization, check_stored_whole, quantise
from deltaserve.model.served import ServedModel
from deltaserve.model.shape import check_exact
from deltaserve.model.step import Step, StepContext
from deltaserve_kernels.native.library import Library
from deltaserve_kernels.terms import Term

if TYPE_CHECKING:
    from deltaserve_kernels.fused.site import FusedKernels
    from deltaserve_kernels.materialize.site import Scratch

logger = logging.getLogger(__name__)
_serial = itertools.count()


@dataclass(frozen=True)
class TransformersModel(ServedModel):
    """Any decoder of transformers, with its own way from hidden states to logits."""

    causal: nn.Module
    context: StepContext
    library: Library | None  # native kernels for terms
    fused: FusedKernels | None  # Triton's
    scratch: Scratch | None  # where weights of long runs are written out
    sites: tuple[tuple[str, int], ...]  # weights that take terms, and their rows
    quantization: Quantization  # of the base's matrices

    @property
    def runtime(self) -> dict[str, str]:
        kernels = "triton" if self.fused else self.library.instruction_set if self.library else "torch"
        whole = {"decoder": "transformers", "kernels": kernels}
        return whole if self.quantization == "none" else {**whole, "quantization": self.quantization}

    @property
    def scratch_bytes(self) -> int:
        return 0 if self.scratch is None else self.scratch.nbytes

    @property
    def num_paged_layers(self) -> int:
        return self.context.cache.num_layers

    @torch.inference_mode()
    def forward(self, step: Step, ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        self.context.step = step
        if self.fused is not None:
            self.context.fused = fused_step(self.fused, step, step.segments, self.scratch)
            same = step.head_segments == step.segments  # while all decode
            self.context.fused_head = self.context.fused if same else fused_step(self.fused, step, step.head_segments)
        try:
            output = self.causal(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=logit_rows
            )
            logits: Tensor = output.logits[0].float()
            absent = self.context.absent
            return logits if absent is None else logits.masked_fill(absent, -torch.inf)  # a cap lifts what is −inf
        finally:
            self.context.step = self.context.fused = self.context.fused_head = self.context.absent = None

    def watch_compiles(self, told: Callable[[str], None]) -> Callable[[], None]:
        if self.fused is None:
            return super().watch_compiles(told)
        from deltaserve_kernels.fused.compiles import watch

        return watch(told)

    def serve(self, term: Term) -> ServedTerm:
        return served_form(term, self.library, self.fused)

    def load_delta(self, artifact: Artifact) -> ResidentDelta:
        delta = super().load_delta(artifact)
        if self.fused is None:
            return delta
        made = bundled(delta, self.sites, self.fused.numbers)
        assert made.bundle is not None
        self.fused.warm_up(made.bundle, self.dtype)
        return made


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
) -> ServedModel:
    """`kernels`: auto, torch, triton, or a native instruction set. A quantised base runs in transformers.
    `materialize_tokens`: rows of one delta in a step from which Triton's kernels write its weights out, 0: never.
    Raises CheckpointError for what is no decoder-only model that can be served exactly, BadRequest for kernels, a
    quantization or written weights that cannot be had."""
    check_stored_whole(checkpoint)
    dtype = dtype or stored_dtype(checkpoint)
    fused = fused_kernels(kernels, device)
    if materialize_tokens:
        check_materialize(materialize_tokens, fused, quantised=quantization != "none")
    library = native_library(kernels, device, dtype)
    if library is not None and quantization == "none" and native_fits(checkpoint, block_size):
        return NativeModel.load(checkpoint, library, kv_slots)
    if device.type == "cpu":
        logger.warning(
            "%s runs in transformers, slower than the own decoder for Llama, Mistral, Qwen2 and Qwen3 in bfloat16",
            checkpoint.name if quantization == "none" else f"{checkpoint.name} in {quantization}",
        )
    return _load_transformers(
        checkpoint, device, dtype, kv_slots, block_size, library, fused, quantization, materialize_tokens
    )


def _load_transformers(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    kv_slots: int,
    block_size: int,
    library: Library | None,
    fused: FusedKernels | None,
    quantization: Quantization,
    materialize_tokens: int | Literal["auto"],
) -> TransformersModel:
    context = StepContext(KvCache(kv_slots))
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
    tied = bool(config.tie_word_embeddings)
    sites, other = _replace_layers(model, context, tied, reference.axes)
    head = next(module for module in model.modules() if isinstance(module, DeltaHead))
    if tied:
        other = other | {LM_HEAD}
    shapes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, DeltaLinear)}
    scratch = make_scratch(fused, materialize_tokens, shapes, model.dtype) if fused and materialize_tokens else None
    made = TransformersModel(
        causal=model,
        context=context,
        device=device,
        dtype=model.dtype,
        vocab_size=head.weight.shape[0],
        max_positions=max_positions,
        num_layers=int(config.num_hidden_layers),
        kv_slots=kv_slots,
        linear=frozenset(sites),
        other=frozenset(other),
        library=library,
        fused=fused,
        scratch=scratch,
        sites=tuple(sites.items()),
        quantization=quantization,
    )
    reference.check(made, block_size)
    return made


def _replace_layers(
    model: PreTrainedModel, context: StepContext, tied: bool, axes: Mapping[str, int]
) -> tuple[dict[str, int], set[str]]:
    """Puts delta-aware layers in place; → rows of the weights that take terms, in the order of their site numbers, and
    names that take overrides. `axes`: which axis of a module's input counts tokens."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise CheckpointError(f"{type(model).__name__}: its head is no linear layer")
    embedding_name = next(name for name, module in model.named_modules() if module is embedding)
    sites: dict[str, int] = {}
    other: set[str] = set()
    for name, module in list(model.named_modules()):
        own = {f"{name}.{local}" for local, _ in module.named_parameters(recurse=False)}
        if not own:
            continue
        replacement: nn.Module | None
        if module is head:
            replacement = DeltaHead(head, name, len(sites), embedding_name, tied, context)
            sites[f"{name}.weight"] = head.out_features
            other.add(f"{name}.weight")
        elif type(module) is nn.Linear:
            replacement = DeltaLinear(module, name, len(sites), context)
            sites[f"{name}.weight"] = module.out_features
            other.add(f"{name}.bias")
        elif type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
            replacement = DeltaEmbedding(module, name, context)
            other.add(f"{name}.weight")
        elif not any(module.children()) and all(p.dim() == 1 for p in module.parameters()):
            replacement = DeltaModule(module, name, axes.get(name, 1), context)
            other |= own
        else:
            kind = type(module).__name__
            logger.info("%s (%s) is served as in the base; a delta that changes it is refused", name, kind)
            continue
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, replacement)
    return sites, other
