"""What the compiler makes of the kernels, for GPUs that need not be there: registers, spills, instructions a weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deltaserve_kernels.fused.parts import LANES
from deltaserve_kernels.fused.site import WEIGHT_ROWS, WEIGHT_WARPS

KERNELS = ["codes", "codes g128", "factors", "gather", "grid", "patches", "prep", "variants", "rescale"]
KERNELS += ["materialize", "materialize factors", "attention", "attention, large heads", "attention sum", "vectors"]
BUDGETS = {"codes": {1: 1.1, 2: 1.3, 4: 1.6}, "codes g128": {1: 1.4, 2: 1.55, 4: 1.9}}  # instructions for a weight
PRODUCTS = {1: 64, 2: 32, 4: 16}  # of m16n8k16 in a superblock and warp of 32 rows, by bits
COPIED = "LDGSTS.E.BYPASS.128"  # 16 bytes of codes into shared memory, past the first cache


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    script = Path(__file__).with_name("sass.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills(found: dict[str, Any], name: str, target: str) -> None:
    kernel = found[f"{name} {target}"]
    assert kernel["local"] == 0
    assert kernel["registers"] <= (128 if target == "sm_90" else 168)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bits", PRODUCTS)
@pytest.mark.parametrize("name", BUDGETS)
def test_instructions_for_a_weight(found: dict[str, Any], name: str, bits: int, target: str) -> None:
    loops = found[f"{name} {target}"]["loops"]
    loop = next(loop for loop in loops if _count(loop, "HMMA.16816") == PRODUCTS[bits])
    weights = WEIGHT_ROWS * LANES * 16 // bits
    assert sum(loop.values()) * 32 * WEIGHT_WARPS / weights <= BUDGETS[name][bits]
    assert _count(loop, COPIED) == 4, "codes come 16 bytes at a time"
    assert _count(loop, "STS") <= 4, "weights do not pass through shared memory"
    assert not _count(loop, "I2F"), "no weight is converted"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["attention", "attention, large heads"])
def test_keys_and_values_come_16_bytes_at_a_time(found: dict[str, Any], name: str, target: str) -> None:
    (loop,) = found[f"{name} {target}"]["loops"]
    assert _count(loop, COPIED) == 8, "tiles of K and V of 32 positions × 128, or 16 × 256"
    assert not _count(loop, "LDG.E"), "and nothing in smaller pieces"


def _count(loop: dict[str, int], name: str) -> int:
    return sum(count for instruction, count in loop.items() if instruction.startswith(name))
