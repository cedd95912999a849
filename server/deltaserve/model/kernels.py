"""Which kernels serve: Triton's on a GPU, the native ones on a CPU in bfloat16 where they were built, torch otherwise.
Asked for by name, they run, or the server does not start."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from deltaserve_kernels.fused.site import FusedKernels, FusedStep


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


def fused_step(kernels: FusedKernels, step: Step, segments: Segments) -> FusedStep:
    """What Triton's kernels read of `segments`. Slots are looked up now: deltas come and go between steps."""
    from deltaserve_kernels.fused.site import FusedStep

    bundles = {run.slot: step.delta(run).bundle for run in segments.runs}
    return FusedStep(kernels, segments, {slot: bundle for slot, bundle in bundles.items() if bundle is not None})
