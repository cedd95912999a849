"""What terms and masks have in common: tensors in the fields of a frozen dataclass, nested ones under dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Packed")
DERIVED = {"derived": True}  # metadata of a field that is made at load and never stored


@dataclass(frozen=True)
class Packed:
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def _parts(self, *, derived: bool) -> Iterator[tuple[str, Any]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Packed) and (derived or field.metadata != DERIVED):
                yield field.name, value

    def tensors(self, *, derived: bool = False) -> dict[str, Tensor]:
        """The stored tensors by local name; with `derived`, those made at load too."""
        named: dict[str, Tensor] = {}
        for name, value in self._parts(derived=derived):
            if isinstance(value, Tensor):
                named[name] = value
            else:
                named |= {f"{name}.{local}": tensor for local, tensor in value.tensors(derived=derived).items()}
        return named

    @property
    def nbytes(self) -> int:
        """Bytes held, summed from the real tensors, those made at load included."""
        return sum(tensor.nbytes for tensor in self.tensors(derived=True).values())

    def to(self: Self, device: torch.device | str, *, copy: bool = False) -> Self:
        """The same with its tensors on `device`; `copy` even where they are there already."""
        return replace(self, **{name: value.to(device, copy=copy) for name, value in self._parts(derived=True)})

    def problems(self) -> list[str]:
        """What is wrong with the tensors beyond their shapes and types; [] where a kernel may read them."""
        nested = ((name, value) for name, value in self._parts(derived=False) if isinstance(value, Packed))
        return [f"{name}: {problem}" for name, value in nested for problem in value.problems()]
