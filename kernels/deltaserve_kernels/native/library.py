"""Finding and loading the native library: the best instruction set that was built and that this processor has."""

from __future__ import annotations

import ctypes
import logging
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
LAYOUT = 4  # of the structures that C and Python both spell out; terms.h has the same number
logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "ds_set_threads": [_INT],
    "ds_site": [_POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT, _POINTER, _INT],
    "ds_add_norm": [_POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT, _FLOAT, _POINTER, _INT, _INT],
    "ds_embed": [_POINTER, _POINTER, _INT, _INT, _POINTER],
    "ds_rotary": [_POINTER],
    "ds_attention": [_POINTER],
    "ds_silu_mul": [_POINTER],
    "ds_huge_pages": [_POINTER, _LONG],
}
NEEDS = {
    "amx": AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512bf16": AVX512 | {"avx512_bf16"},
    "avx512": AVX512,
    "avx2": {"avx2", "fma"},
}  # best first


class NativeUnavailable(RuntimeError):
    """The native kernels, or the instruction set that was asked for, cannot be had here."""


@dataclass(frozen=True)
class Library:
    instruction_set: str
    functions: ctypes.CDLL

    def set_threads(self, threads: int) -> None:
        """Threads that a call may use, the caller's among them; of the whole process."""
        self.functions.ds_set_threads(threads)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Uninitialised, in huge pages where the system gives them: for what every step reads."""
        size = math.prod(shape)
        bytes_ = size * dtype.itemsize
        memory = torch.empty(bytes_ + HUGE_PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE
        self.functions.ds_huge_pages(memory.data_ptr() + start, bytes_)
        return memory[start : start + bytes_].view(dtype).view(shape)


class Arena:
    """Tensors one after the other in one piece of memory in huge pages."""

    def __init__(self, library: Library, nbytes: int) -> None:
        self._memory, self._used = library.empty(nbytes, dtype=torch.uint8), 0

    def take(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor`, at a multiple of 64 bytes."""
        start = -(-self._used // 64) * 64
        self._used = start + tensor.nbytes
        copy = self._memory[start : self._used].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


@cache
def processor_flags() -> frozenset[str]:
    """Of the first processor, as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def available() -> tuple[str, ...]:
    """Instruction sets that were built and that this processor has, the best first."""
    return tuple(
        name for name, flags in NEEDS.items() if (FOLDER / f"lib{name}.so").exists() and flags <= processor_flags()
    )


@cache
def load(instruction_set: str | None = None) -> Library:
    """The best there is, or the one asked for. Raises NativeUnavailable; RuntimeError for one of other sources."""
    found = available()
    if instruction_set is not None and instruction_set not in found:
        raise NativeUnavailable(
            f"no native kernels for {instruction_set} here; there are: {', '.join(found) or 'none'}"
        )
    for name in found if instruction_set is None else (instruction_set,):
        library = ctypes.CDLL(str(FOLDER / f"lib{name}.so"))
        if getattr(library, "ds_layout", int)() != LAYOUT:
            raise RuntimeError(f"lib{name}.so was built from other sources: python kernels/build_native.py")
        for function, arguments in _ARGUMENTS.items():
            getattr(library, function).argtypes = arguments
            getattr(library, function).restype = None
        if library.ds_allowed():  # the system may keep AMX to itself
            return Library(name, library)
        logger.warning("the system does not grant the state of %s", name)
    raise NativeUnavailable("no native kernels were built for this processor")
