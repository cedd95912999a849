"""From how many rows on W + Δ is worth writing out, by three timings on the device at start.

threshold = ⌈(write + read) / packed⌉
    write     seconds for W + Δ of the largest layer
    read      seconds of the base's product for one row: whoever shares the step reads W once more
    packed    seconds that a row's delta takes, of a run of TOKENS
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from deltaserve_kernels import layout
from deltaserve_kernels.fused.bundle import make_bundle
from deltaserve_kernels.fused.parts import fused_term
from deltaserve_kernels.fused.site import FusedStep
from deltaserve_kernels.materialize.site import Scratch
from deltaserve_kernels.segments import Segments
from deltaserve_kernels.terms import Coded, LowRank, SeededMask, Term

TOKENS, RANK, GROUP = 256, 64, 16
ROUNDS = 5


def calibrated(scratch: Scratch, tokens: int = TOKENS) -> dict[str, int]:
    """Rows by kind, of one bit a weight, of one bit for one weight in GROUP, and of a rank of RANK."""
    device = scratch.kernels.device
    (rows, cols), matrix = max(scratch.matrices.items(), key=lambda item: item[1].nbytes)
    weight = torch.zeros_like(matrix)
    x = torch.ones(tokens, cols, dtype=matrix.dtype, device=device)
    y = torch.zeros(tokens, rows, dtype=matrix.dtype, device=device)
    read = _seconds(lambda: F.linear(x[:1], weight), device)
    found = {}
    for kind, term in _terms(rows, cols).items():
        form = fused_term(term)
        assert form is not None
        bundle = make_bundle([[(form, 1.0)]], scratch.kernels.numbers).to(device)
        step, plan = FusedStep(scratch.kernels, Segments.of([0] * tokens), {0: bundle}), bundle.plans[0]
        packed = _seconds(lambda step=step: step.add(0, x, y), device) / tokens  # type: ignore[misc]
        write = _seconds(lambda step=step, plan=plan: scratch.write(step.tables.slots, 0, 0, plan, weight), device)  # type: ignore[misc]
        found[kind] = math.ceil((write + read) / packed)
    return found


def _terms(rows: int, cols: int) -> dict[str, Term]:
    def random(height: int, count: int) -> torch.Tensor:
        return torch.randint(256, (height, layout.packed_bytes(count, 1)), dtype=torch.uint8)

    mask = SeededMask(GROUP, 0, 0)
    scale = torch.ones(())
    return {
        "codes": Coded(rows, cols, 1, "sign", random(rows, cols), row=scale),
        "gather": Coded(rows, cols, 1, "sign", random(rows, mask.num_survivors(cols)), row=scale, mask=mask),
        "factors": LowRank(
            Coded(rows, RANK, 16, "float", torch.ones(rows, RANK, dtype=torch.bfloat16)),
            torch.ones(RANK),
            Coded(RANK, cols, 16, "float", torch.ones(RANK, cols, dtype=torch.bfloat16)),
        ),
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 1):  # the first compiles
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])
