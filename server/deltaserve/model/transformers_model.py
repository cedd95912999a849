"""Any decoder of transformers, whose layers know about deltas and whose attention is paged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.resident import ResidentDelta, ServedTerm
from deltaserve.errors import CheckpointError
from deltaserve.model.delta_layers import DeltaEmbedding, DeltaHead, DeltaLinear, DeltaModule
from deltaserve.model.fused_delta import Site, bundled
from deltaserve.model.kernels import fused_step, served_form
from deltaserve.model.quantization import Quantization
from deltaserve.model.recording import GraphLimits, RecordingFailed
from deltaserve.model.served import ServedModel
from deltaserve.model.step import Step, StepContext
from deltaserve_kernels.native.library import Library
from deltaserve_kernels.terms import Term

if TYPE_CHECKING:
    from deltaserve.model.graphs import DecodeGraphs
    from deltaserve_kernels.fused.site import FusedKernels
    from deltaserve_kernels.materialize.site import Scratch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransformersModel(ServedModel):
    """Any decoder of transformers, with its own way from hidden states to logits."""

    causal: PreTrainedModel
    context: StepContext
    library: Library | None  # native kernels for terms
    fused: FusedKernels | None  # Triton's
    scratch: Scratch | None  # where weights of long runs are written out
    sites: Sequence[Site]
    outside: frozenset[str]  # tensors of the embedding and the head
    quantization: Quantization  # of the base's matrices
    graphs: DecodeGraphs | None = None  # decode steps that were recorded

    @property
    def runtime(self) -> dict[str, str]:
        kernels = "triton" if self.fused else self.library.instruction_set if self.library else "torch"
        whole = {"decoder": "transformers", "kernels": kernels}
        if self.quantization != "none":
            whole["quantization"] = self.quantization
        if self.fused is not None:
            whole["decode"] = "graphs" if self.graphs and self.graphs.work else "kernel by kernel"
        return whole

    @property
    def scratch_bytes(self) -> int:
        return 0 if self.scratch is None else self.scratch.nbytes

    @property
    def decode_steps(self) -> Mapping[str, int]:
        return {} if self.graphs is None else {"graph": self.graphs.replays, "kernels": self.graphs.misses}

    @property
    def num_paged_layers(self) -> int:
        return self.context.cache.num_layers

    @torch.inference_mode()
    def forward(self, step: Step, ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        try:
            return self._pass(step, ids, positions, logit_rows)
        except RecordingFailed as error:
            logger.warning("%s; such steps run kernel by kernel", error)
            return self._pass(step, ids, positions, logit_rows)

    def _pass(self, step: Step, ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        self.context.step = step
        try:
            if self.fused is not None:
                if self.graphs is None or (fused := self.graphs.prepare(step, positions)) is None:
                    fused = fused_step(self.fused, step, step.segments, self.scratch)
                same = step.head_segments == step.segments  # while all decode
                self.context.fused_head = fused if same else fused_step(self.fused, step, step.head_segments)
                self.context.fused = fused
            output = self.causal(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=logit_rows
            )
            logits: Tensor = output.logits[0].float()
            absent = self.context.absent
            return logits if absent is None else logits.masked_fill(absent, -torch.inf)  # a cap lifts what is −inf
        finally:
            self.context.step = self.context.fused = self.context.fused_head = self.context.absent = None
            if self.graphs is not None:
                self.graphs.end()

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
        made = bundled(delta, self.sites, self.fused.numbers, self.dtype, self.outside)
        assert made.bundle is not None
        self.fused.warm_up(made.bundle, self.dtype)
        return made


def recorded(
    model: TransformersModel,
    embedding: DeltaEmbedding,
    kernels: FusedKernels,
    limits: GraphLimits,
    block_size: int,
    check: Callable[[ServedModel], None],
) -> TransformersModel:
    """With decode steps that are recorded, the base's now, and used where `check` raises no CheckpointError.

    Raises CheckpointError where they must be and cannot."""
    from deltaserve.model.graphs import DecodeGraphs

    graphs = DecodeGraphs(
        model.causal,
        embedding,
        model.context,
        kernels,
        limits,
        num_sites=len(model.sites),
        block_size=block_size,
        unused_slot=model.kv_slots,
        long_runs=min(model.scratch.thresholds.values()) if model.scratch else None,
    )
    made = replace(model, graphs=graphs)
    try:
        with torch.inference_mode():
            graphs.record_all()
        check(made)
        if not graphs.replays:
            raise RecordingFailed("a decode step cannot be recorded: this model does not call its layers as one")
    except (RecordingFailed, CheckpointError) as error:
        if limits.required:
            raise CheckpointError(f"{error}; --cuda-graphs off serves it kernel by kernel") from error
        logger.warning("%s; all steps run kernel by kernel, slower", error)
        graphs.work = False
    return made


class Layers(NamedTuple):
    sites: Sequence[Site]  # in the order of their numbers
    other: Collection[str]  # tensors that take overrides
    outside: Collection[str]  # tensors of the embedding and the head
    embedding: DeltaEmbedding
    head: DeltaHead


def replace_layers(model: PreTrainedModel, context: StepContext, tied: bool, axes: Mapping[str, int]) -> Layers:
    """Puts delta-aware layers in place. `axes`: which axis of a module's input counts tokens."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise CheckpointError(f"{type(model).__name__}: its head is no linear layer")
    embedding_name = next(name for name, module in model.named_modules() if module is embedding)
    sites: list[Site] = []
    other: set[str] = set()
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        replacement: nn.Module | None
        if module is head:
            replacement = DeltaHead(head, name, len(sites), embedding_name, tied, context)
            sites.append(Site(f"{name}.weight", head.out_features, None))
            other.add(f"{name}.weight")
        elif type(module) is nn.Linear:
            replacement = DeltaLinear(module, name, len(sites), context)
            bias = torch.zeros(()).expand(module.out_features) if module.bias is None else module.bias.cpu()
            sites += [Site(f"{name}.weight", len(bias), None), Site(f"{name}.bias", len(bias), bias)]
            other.add(f"{name}.bias")
        elif type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
            replacement = DeltaEmbedding(module, name, context)
            other.add(f"{name}.weight")
        elif not any(module.children()) and all(parameter.dim() == 1 for parameter in own.values()):
            replacement = DeltaModule(module, name, axes.get(name, 1), context)
            other |= {f"{name}.{local}" for local in own}
            if replacement.takes_vectors():
                replacement.vector_sites = {local: len(sites) + at for at, local in enumerate(own)}
                sites += [Site(f"{name}.{local}", len(it), it.cpu()) for local, it in own.items()]
        else:
            kind = type(module).__name__
            logger.info("%s (%s) is served as in the base; a delta that changes it is refused", name, kind)
            continue
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, replacement)
    first, last = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(first, DeltaEmbedding)
    assert isinstance(last, DeltaHead)
    return Layers(sites, other, {f"{embedding_name}.weight", last.weight_name}, first, last)
