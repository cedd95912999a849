"""What tenants cost on a GPU: decoder layers in a CUDA graph, base only and with T different tenants, one row each.

    slowdown(T) = time of base and deltas / time of the base          medians of interleaved replays

Each layer is its four products (q k v, o, gate up, down) in bfloat16, every site and tenant in memory of its own:
caches help nobody. Beside each kind: T copies of the weights (one model a tenant), and a loop over tenants of plain
low-rank products, as PEFT's layers do them; and W + Δ of one tenant written out. Checked first: a site of each kind
against `decode` in float64, which float16 subnormals in tensor cores are part of, and the same bits from 20 replays. A
wrong result ends the run.

PREDICTED, before any run on a GPU (H100, 7B, at 1, 4, 8, 16 tenants): one bit 1.14, 1.37, 1.67, 2.3; half a bit 1.10,
1.23, 1.39, 1.72; seeded-vq at 0.03 within 1.1 at 16 and 1.3 at 64; rank 16 1.11, 1.14, 1.19, 1.27. W + Δ
written out, one bit: 1.8.

    python kernels/benchmarks/gpu_terms.py [--model 7b|8b|tiny] [--tenants T …] [--kind NAME …] [--json FILE]

Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1), on --model tiny, without graphs: it shows that the
kernels run and are right, and reports no figures.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import triton
from cpu_terms import KINDS, error
from torch import Tensor

from deltaserve_kernels.fused.bundle import Bundle, make_bundle
from deltaserve_kernels.fused.parts import FusedTerm, fused_term
from deltaserve_kernels.fused.site import FusedKernels, FusedStep
from deltaserve_kernels.materialize.site import Scratch
from deltaserve_kernels.segments import Segments
from deltaserve_kernels.terms import LowRank

Shape = tuple[int, int]
MODELS: dict[str, list[Shape]] = {
    "7b": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "tiny": [(192, 128), (128, 128), (256, 128), (128, 256)],
}
TOLERANCE = 1e-3


class Layers:
    """`count` times the sites of a model's layer, their activations, and T tenants on them."""

    def __init__(self, kernels: FusedKernels, layer: list[Shape], count: int) -> None:
        self.kernels, self.shapes = kernels, layer * count
        device = kernels.device
        self.weights = [(torch.randn(shape, device=device) / shape[1] ** 0.5).bfloat16() for shape in self.shapes]

    def inputs(self, rows: int) -> list[Tensor]:
        return [torch.randn(rows, cols, device=self.kernels.device).bfloat16() for _, cols in self.shapes]

    def bundles(self, terms: dict[Shape, FusedTerm], tenants: int) -> list[Bundle]:
        one = make_bundle([[(terms[shape], 1.0)] for shape in self.shapes], self.kernels.numbers).to(
            self.kernels.device
        )
        return [one, *(Bundle(one.memory.clone(), one.plans) for _ in range(tenants - 1))]

    def base(self, rows: int) -> Callable[[], object]:
        x = self.inputs(rows)
        return lambda: [F.linear(own, weight) for own, weight in zip(x, self.weights, strict=True)]

    def mixed(self, bundles: list[Bundle]) -> Callable[[], list[Tensor]]:
        """One row of each tenant."""
        x = self.inputs(len(bundles))
        step = FusedStep(self.kernels, Segments.of(range(len(bundles))), dict(enumerate(bundles)))

        def run() -> list[Tensor]:
            out = []
            for site, (own, weight) in enumerate(zip(x, self.weights, strict=True)):
                out.append(F.linear(own, weight))
                step.add(site, own, out[-1])
            return out

        return run

    def written(self, bundle: Bundle) -> Callable[[], object]:
        """W + Δ of every layer, without a product."""
        scratch, step = (
            Scratch(self.kernels, self.shapes, torch.bfloat16),
            FusedStep(self.kernels, Segments(), {0: bundle}),
        )
        return lambda: [
            scratch.write(step.tables.slots, 0, site, bundle.plans[site], weight)
            for site, weight in enumerate(self.weights)
            if bundle.plans[site].written
        ]

    def copies(self, tenants: int) -> Callable[[], object]:
        """A model for each tenant: its weights are read for its one row. The same weights, over and over: the sum of
        several tenants' is more than any cache."""
        x = self.inputs(1)
        return lambda: [
            F.linear(own, weight) for own, weight in zip(x, self.weights, strict=True) for _ in range(tenants)
        ]

    def loops(self, term: LowRank, tenants: int) -> Callable[[], object]:
        """Two products a tenant and site, as adapters are applied one by one."""
        x = self.inputs(tenants)
        factors = {
            shape: (torch.randn(len(term.s), shape[1]), torch.randn(shape[0], len(term.s)))
            for shape in set(self.shapes)
        }
        moved = {shape: [f.bfloat16().to(self.kernels.device) for f in pair] for shape, pair in factors.items()}

        def run() -> None:
            for shape, own, weight in zip(self.shapes, x, self.weights, strict=True):
                y, (right, left) = F.linear(own, weight), moved[shape]
                for row in range(tenants):
                    y[row : row + 1] += F.linear(F.linear(own[row : row + 1], right), left)

        return run


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """As a CUDA graph; itself where there is no GPU."""
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # type: ignore[no-untyped-call]
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()  # type: ignore[no-untyped-call]
    run()
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3  # type: ignore[no-untyped-call]


def slowdowns(base: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Each against the base before and after it."""
    found: dict[str, list[float]] = {name: [] for name in others}
    for number in range(rounds + 1):
        before = seconds(base)
        for name, run in others.items():
            took, after = seconds(run), seconds(base)
            if number:
                found[name].append(2 * took / (before + after))
            before = after
    return {name: median(values) for name, values in found.items()}


def check(kernels: FusedKernels, kind: str, shape: Shape) -> FusedTerm:
    """The kind's term at this shape, after its kernels were compared with what it decodes to."""
    torch.manual_seed(0)
    term = KINDS[kind](*shape)
    made = fused_term(term)
    if made is None:
        raise SystemExit(f"{kind}: no kernel reads it")
    x = torch.randn(3, shape[1]).bfloat16()
    bundle = make_bundle([[(made, 1.0)]], kernels.numbers).to(kernels.device)
    step, y = FusedStep(kernels, Segments.of([0, 0, 0]), {0: bundle}), torch.zeros(3, shape[0], device=kernels.device)
    step.add(0, x.to(kernels.device), y)
    found = error(y.cpu(), x.double() @ term.decode().double().T)
    if not found < TOLERANCE:
        raise SystemExit(f"{kind} {shape}: wrong by {found:.1e}; nothing is reported")
    if (plan := bundle.plans[0]).written:
        zero = torch.zeros(shape, device=kernels.device)
        whole = Scratch(kernels, [shape], zero.dtype).write(step.tables.slots, 0, 0, plan, zero)
        if not (found := error(whole.cpu(), term.decode().double())) < TOLERANCE:
            raise SystemExit(f"{kind} {shape}: written out, wrong by {found:.1e}; nothing is reported")
    return made


def check_replays(run: Callable[[], list[Tensor]]) -> None:
    """The same bits, 20 times."""
    first = [y.clone() for y in run()]
    if not all(torch.equal(a, b) for _ in range(20) for a, b in zip(first, run(), strict=True)):
        raise SystemExit("a step that runs again gives other bits; nothing is reported")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--layers", type=int, default=8 if torch.cuda.is_available() else 1)
    parser.add_argument("--tenants", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    about = {
        "device": torch.cuda.get_device_name() if on_gpu else "none: Triton's interpreter, no figures",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(about))
    kernels, layer = FusedKernels(device), MODELS[args.model]
    layers = Layers(kernels, layer, args.layers)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for kind in args.kind:
            terms = {shape: check(kernels, kind, shape) for shape in layer}
            bundles = layers.bundles(terms, max(args.tenants))
            check_replays(layers.mixed(bundles[:2]))
            bits = 8 * sum(bundle.nbytes for bundle in bundles[:1]) / sum(a * b for a, b in layers.shapes)
            if not on_gpu:
                print(f"{kind:<20}{bits:>8.3f} bits  right")
                continue
            found = {}
            for count in args.tenants:
                others = {kind: captured(layers.mixed(bundles[:count])), "copies": captured(layers.copies(count))}
                term = KINDS[kind](*layer[0])
                if isinstance(term, LowRank):
                    others["loop"] = captured(layers.loops(term, count))
                if count == 1 and bundles[0].plans[0].written:
                    others["written"] = captured(layers.written(bundles[0]))
                found[count] = slowdowns(captured(layers.base(count)), others, args.rounds)
            rows.append({"kind": kind, "bits": bits, "slowdown": found})
            print(
                f"{kind:<20}{bits:>8.3f} bits  " + "  ".join(f"{n}: {found[n][kind]:.2f}" for n in args.tenants),
                flush=True,
            )
    if args.json:
        args.json.write_text(
            json.dumps({**about, "model": args.model, "layers": args.layers, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
