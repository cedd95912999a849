"""Which kernels serve: Triton's on a GPU, the native ones on a CPU in bfloat16 where they were built, torch otherwise.
Asked for by name, they run, or the server does not start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.resident import ServedTerm
from deltaserve.errors import BadRequest
from deltaserve.model.step import Step
from deltaserve_kernels.fused.parts import fused_term
from deltaserve_kernels.native.library import Library, NativeUnavailable, load
from deltaserve_kernels.native.parts import part_of
from deltaserve_kernels.segments import Segments
from deltaserve_kernels.terms import Term

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deltaserve.model.recording import GraphLimits
    from deltaserve_kernels.fused.site import FusedKernels, FusedStep
    from deltaserve_kernels.materialize.site import Scratch
    from deltaserve_kernels.paged_attention.fused import PagedAttention

logger = logging.getLogger(__name__)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What config.json names, else the type of the first floating tensor."""
    named = getattr(torch, str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    return next(entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point)


def native_library(kernels: str, device: torch.device, dtype: torch.dtype) -> Library | None:
    """None: torch. Raises BadRequest for kernels that were asked for by name and cannot be had."""
    if kernels in ("torch", "triton"):
        return None
    fits = device.type == "cpu" and dtype == torch.bfloat16
    if kernels != "auto" and not fits:
        raise BadRequest(f"--kernels {kernels}: they serve bfloat16 on a CPU, not {dtype} on {device.type}")
    if not fits:
        return None
    try:
        library = load(None if kernels == "auto" else kernels)
    except NativeUnavailable as error:
        if kernels == "auto":
            return None
        raise BadRequest(f"--kernels {kernels}: {error}") from None
    library.set_threads(torch.get_num_threads())
    return library


def fused_kernels(kernels: str, device: torch.device) -> FusedKernels | None:
    """Triton's, on a GPU or in Triton's interpreter. Raises BadRequest where they were asked for and cannot be had."""
    if kernels != "triton" and not (kernels == "auto" and device.type == "cuda"):
        return None
    try:
        from deltaserve_kernels.fused.site import FusedKernels, FusedUnavailable
    except ImportError as error:
        if kernels == "auto":
            return None
        raise BadRequest(f"--kernels triton: {error}") from None
    try:
        return FusedKernels(device)
    except FusedUnavailable as error:
        raise BadRequest(f"--kernels triton: {error}") from None


def served_form(term: Term, library: Library | None, fused: FusedKernels | None = None) -> ServedTerm:
    """What the kernels read, where they read this form; else the term's own serving form."""
    form = fused_term(term) if fused is not None else part_of(term) if library is not None else None
    return term.serving() if form is None else form


def fused_step(kernels: FusedKernels, step: Step, segments: Segments, scratch: Scratch | None = None) -> FusedStep:
    """What Triton's kernels read of `segments`. Slots are looked up now: deltas come and go between steps. With
    `scratch`, layers write the weights of long runs out."""
    from deltaserve_kernels.fused.site import FusedStep
    from deltaserve_kernels.materialize.site import LongRuns

    bundles = {run.slot: step.delta(run).bundle for run in segments.runs}
    present = {slot: bundle for slot, bundle in bundles.items() if bundle is not None}
    if scratch is None:
        return FusedStep(kernels, segments, present, step.num_rows)
    return LongRuns(scratch, segments, present, step.num_rows)


def check_materialize(tokens: int | Literal["auto"], fused: FusedKernels | None, *, quantised: bool) -> None:
    """Raises BadRequest where weights of long runs cannot be written out, or their number not be timed."""
    if fused is None:
        reason = "Triton's kernels do that, on a GPU"
    elif quantised:
        reason = "not on a quantised base"
    elif tokens == "auto" and fused.device.type != "cuda":
        reason = "what is timed needs a GPU; give a number"
    else:
        return
    raise BadRequest(f"--materialize-tokens {tokens}: {reason}")


def check_graphs(limits: GraphLimits | None, fused: FusedKernels | None) -> GraphLimits | None:
    """None where nothing is recorded. Raises BadRequest where it must be and cannot."""
    if limits is None:
        return None
    if fused is not None and (fused.device.type == "cuda" or limits.record is not None):
        return limits
    if limits.required:
        raise BadRequest("--cuda-graphs on: they need Triton's kernels on a GPU")
    return None


def paged_kernel(positions: int, block_size: int) -> PagedAttention:
    from deltaserve_kernels.paged_attention.fused import PagedAttention

    return PagedAttention(positions, block_size)


def make_scratch(
    kernels: FusedKernels, tokens: int | Literal["auto"], shapes: Iterable[tuple[int, int]], dtype: torch.dtype
) -> Scratch:
    """Memory for the weights of long runs; `tokens` from which a run is long, or auto: timed now."""
    from deltaserve_kernels.materialize.calibrate import calibrated
    from deltaserve_kernels.materialize.site import KINDS, Scratch

    scratch = Scratch(kernels, shapes, dtype)
    scratch.thresholds = calibrated(scratch) if tokens == "auto" else dict.fromkeys(KINDS, tokens)
    scratch.warm_up()
    told = ", ".join(f"{kind} {rows}" for kind, rows in scratch.thresholds.items())
    logger.info("weights of long runs are written out, from these tokens on: %s; %d bytes", told, scratch.nbytes)
    return scratch
