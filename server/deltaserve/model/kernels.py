"""Which kernels serve: the native ones on a CPU in bfloat16 where they were built, torch otherwise. Asked for by name,
they run, or the server does not start."""

from __future__ import annotations

import torch

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.resident import ServedTerm
from deltaserve.errors import BadRequest
from deltaserve_kernels.native.library import Library, NativeUnavailable, load
from deltaserve_kernels.native.parts import part_of
from deltaserve_kernels.terms import Term


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What config.json names, else the type of the first floating tensor."""
    named = getattr(torch, str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    return next(entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point)


def native_library(kernels: str, device: torch.device, dtype: torch.dtype) -> Library | None:
    """None: torch. Raises BadRequest for kernels that were asked for by name and cannot be had."""
    if kernels == "torch":
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


def served_form(term: Term, library: Library | None) -> ServedTerm:
    """The native part, where there is one; else the term's own serving form."""
    part = part_of(term) if library is not None else None
    return term.serving() if part is None else part
