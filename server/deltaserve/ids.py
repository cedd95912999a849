"""Identifiers, each a type of its own."""

from __future__ import annotations

from typing import NewType

DeltaDigest = NewType("DeltaDigest", str)  # SHA-256 hex of the artifact's bytes: what a delta *is*
RequestId = NewType("RequestId", str)
Slot = NewType("Slot", int)  # place of a delta on the device

BASE_SLOT = Slot(-1)
