"""What every spec is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Positive: TypeAlias = Annotated[int, Field(ge=1, lt=2**48)]
Layout: TypeAlias = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # local name → shape, allowed types
Read: TypeAlias = Callable[[str], Tensor]  # local tensor name → tensor; raises KeyError

BYTES = (torch.uint8,)
VECTOR_FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # the first is canonical
SINGLE_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_GROUP = 2**12  # columns that a group may have in rows that are shorter
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class Strict(BaseModel):
    model_config = STRICT


def oversized(what: str, size: int, cols: int) -> list[str]:
    """Groups and blocks of columns may be larger than a small matrix, but not without end: they take memory."""
    limit = max(cols, MAX_GROUP)
    return [f"{what} of {size} columns, at most {limit}"] if size > limit else []


def nested(prefix: str, named: Layout) -> Layout:
    return {f"{prefix}.{name}": what for name, what in named.items()}


def within(prefix: str, read: Read) -> Read:
    return lambda name: read(f"{prefix}.{name}")
