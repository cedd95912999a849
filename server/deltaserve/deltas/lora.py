"""The former home of adapters/: import from there."""

from __future__ import annotations

from deltaserve.deltas.adapters import import_adapter as import_lora
from deltaserve.deltas.adapters import is_adapter

__all__ = ["import_lora", "is_adapter"]
