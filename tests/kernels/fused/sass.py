"""A command: compiles the fused kernels for GPUs that need not be there, and tells what came out, as JSON.

    python tests/kernels/fused/sass.py          {"codes sm_90": {"registers": …, "local": …, "loops": {…}}, …}

Of each kernel: registers, instructions that touch local memory (spills), and of each innermost loop with matrix
products its instructions by name. Not in Triton's interpreter: in a process of its own.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltaserve_kernels.activation_prep.fused import activation_prep_kernel, variant_prep_kernel
from deltaserve_kernels.codebook_matmul.fused import grid_matmul_kernel
from deltaserve_kernels.fused.fused_rescale import rescale_kernel
from deltaserve_kernels.fused.fused_vectors import vectors_kernel
from deltaserve_kernels.fused.parts import LANES
from deltaserve_kernels.fused.site import (
    GATHER_ROWS,
    GRID_ROWS,
    PREP_BLOCK,
    ROWS_OF_A_SEGMENT,
    VECTOR_COLUMNS,
    WEIGHT_ROWS,
    WEIGHT_WARPS,
)
from deltaserve_kernels.grouped_matmul.fused import grouped_matmul_kernel
from deltaserve_kernels.grouped_matmul.fused_patches import patch_matmul_kernel
from deltaserve_kernels.materialize.fused import materialize_kernel
from deltaserve_kernels.materialize.site import COLS, RANKS, ROWS, WARPS
from deltaserve_kernels.paged_attention.fused import (
    GROUP_ROWS,
    paged_attention_kernel,
    paged_sum_kernel,
    tile_positions,
)
from deltaserve_kernels.paged_attention.fused import WARPS as ATTENTION_WARPS
from deltaserve_kernels.sparse_matmul.fused import gather_matmul_kernel

TARGETS = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "pool_byte": "*u8", "pool_word": "*i32", "pool_value": "*fp16", "pool_float": "*fp32", "pool_field": "*i64",
    "slots": "*i64", "segments": "*i32", "x": "*fp16", "source": "*fp16", "sums": "*fp32", "exponents": "*fp32",
    "columns": "*i32", "factors": "*fp32", "out": "*fp16", "bias": "*bf16", "y": "*bf16",
    "weight": "*bf16", "left": "*fp32", "right": "*fp32",
}  # fmt: skip
CODES = {"EACH": False, "LANES": LANES, "M": ROWS_OF_A_SEGMENT, "N": WEIGHT_ROWS, "PROGRAMS": 528}
PREP = {"LANES": LANES, "BLOCK": PREP_BLOCK}
GRID = {"EACH": False, "PADDED": 8, "SEGMENTS": 4, "M": ROWS_OF_A_SEGMENT, "N": GRID_ROWS, "PROGRAMS": 528}
WRITE = {"LANES": LANES, "N": ROWS, "C": COLS, "R": RANKS}
SIZES = {"HEADS": 32, "SIZE_V": 128, "DV": 128, "PART": 256}
ATTENTION = SIZES | {"KV_HEADS": 8, "SIZE": 128, "D": 128, "G": GROUP_ROWS, "N": tile_positions(128, 128), "BLOCK": 16}
ATTENTION |= {"CAPPED": False, "WIDEN": False}
SUM = SIZES | {"SINKS": False}
BFLOAT16 = {"q": "*bf16", "keys": "*bf16", "values": "*bf16", "y": "*bf16", "sinks": "*bf16"}
BFLOAT16 |= {"tables": "*i32", "lengths": "*i32", "partial": "*fp32", "peaks": "*fp32", "sums": "*fp32"}
BFLOAT16 |= {"scaling": "fp32", "softcap": "fp32"}
KERNELS: dict[str, tuple[Any, dict[str, Any], int, dict[str, str]]] = {  # name → kernel, constants, warps, other types
    "codes": (grouped_matmul_kernel, CODES | {"GROUP": 0}, WEIGHT_WARPS, {}),
    "codes g128": (grouped_matmul_kernel, CODES | {"GROUP": 128}, WEIGHT_WARPS, {}),
    "factors": (grouped_matmul_kernel, CODES | {"GROUP": 0, "EACH": True}, WEIGHT_WARPS, {"y": "*fp32"}),
    "gather": (gather_matmul_kernel, {"EACH": False, "N": GATHER_ROWS, "PROGRAMS": 528}, 4, {}),
    "grid": (grid_matmul_kernel, GRID | {"LENGTH": 8}, 4, {}),
    "patches": (patch_matmul_kernel, {"SIZE": 16, "M": ROWS_OF_A_SEGMENT, "PROGRAMS": 528}, 4, {"y": "*fp32"}),
    "prep": (activation_prep_kernel, PREP, 4, {"x": "*bf16"}),
    "variants": (variant_prep_kernel, PREP | {"PROGRAMS": 528}, 4, {"x": "*bf16"}),
    "materialize": (materialize_kernel, WRITE | {"PHASE": 1}, WARPS, {"out": "*bf16"}),
    "materialize factors": (materialize_kernel, WRITE | {"PHASE": 3}, WARPS, {"out": "*fp32"}),
    "attention": (paged_attention_kernel, ATTENTION, ATTENTION_WARPS, BFLOAT16),
    "attention, large heads": (
        paged_attention_kernel,
        ATTENTION | {"SIZE": 256, "SIZE_V": 256, "D": 256, "DV": 256, "N": tile_positions(256, 256)},
        ATTENTION_WARPS,
        BFLOAT16,
    ),
    "attention sum": (paged_sum_kernel, SUM, 1, BFLOAT16),
    "vectors": (vectors_kernel, {"N": VECTOR_COLUMNS}, 4, {"row_slots": "*i32", "own": "*bf16", "out": "*bf16"}),
    "rescale": (rescale_kernel, {"BIAS": True, "N": GATHER_ROWS, "PROGRAMS": 528}, 4, {}),
}


def compiled(kernel: Any, constants: dict[str, Any], warps: int, types: dict[str, str], target: int) -> bytes:
    """A cubin. Numbers are not specialised, as at the launch; pointers are aligned to 16 bytes."""
    known = POINTERS | types
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
    return bytes(made.asm["cubin"])


def described(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump, usage = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.findall(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(.*?);", dump)
    code = [(int(address, 16), text) for address, text in found]
    loops = []
    for address, text in code:
        target = re.match(r"BRA.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    counts = [collections.Counter(text.split()[0] for at, text in code if a <= at <= b) for a, b in innermost]
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    return {
        "registers": int(registers[1]),
        "local": sum(text.startswith(("LDL", "STL")) for _, text in code),
        "loops": [dict(count) for count in counts if any("MMA" in name for name in count)],
    }


if __name__ == "__main__":
    json.dump(
        {
            f"{name} sm_{target}": described(compiled(*case, target))
            for name, case in KERNELS.items()
            for target in TARGETS
        },
        sys.stdout,
    )
