"""What a tenant's terms cost on a CPU, as a share of the base's own time.

    cost = (time of base and parts − time of the base) / (tenants · time of the base)      median of interleaved rounds

One batch of rows goes through a stack of sites, the base in bfloat16 tiles, its rows shared out evenly among the
tenants. Every site and every tenant has memory of its own, so that caches help nobody; their values are the same.
Beside each kind: a bfloat16 copy of the weights for each tenant, and torch's plain kernels on the packed terms (one
tenant, all rows). Each kind is checked against `decode` in float64 first: a wrong one ends the run.

    python kernels/benchmarks/cpu_terms.py [--stack smollm2|wide] [--kind NAME …] [--quick] [--json FILE]
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deltaserve.codecs.seeded_vq import HADAMARD, LEVELS_FROM, SeededVq
from deltaserve_kernels import layout
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.native.library import Library, load, processor_flags
from deltaserve_kernels.native.parts import Part, part_of
from deltaserve_kernels.native.site import PackedSite, PartList, apply_part, runs_of
from deltaserve_kernels.terms import Book, Codebook, Coded, LowRank, Rotated, Rotation, SeededMask, Term

Shape = tuple[int, int]  # rows, cols
TOLERANCE = 8e-3  # relative RMS: "rounded" of tests/kernels/tolerances.py
SHARED = ("signs", "dct_in", "dct_in_tail", "dct_out", "dct_out_tail")  # tensors of a part that all tenants share


def codes(*shape: int, bits: int) -> Tensor:
    return layout.pack(torch.randint(2**bits, shape), bits)


def coded(rows: int, cols: int, bits: int) -> Term:
    return Coded(rows, cols, bits, "sign" if bits == 1 else "odd", codes(rows, cols, bits=bits), row=torch.tensor(0.01))


def seeded_vq(rows: int, cols: int, bits: float) -> Term:
    """As the codec lays it out for a matrix of this shape."""
    codec = SeededVq(bits)
    tile, length, stages = codec.block(rows, cols)
    count = stages * -(-rows // tile) * -(-cols // length)
    term = Codebook(
        rows, cols, codec.code_bits, length, Book("seeded"), codes(count, bits=codec.code_bits), torch.tensor(0.01),
        tile=tile, gains=torch.rand(stages) + 0.5 if stages > 1 else None,
        levels=codes(rows, bits=4) if bits >= LEVELS_FROM else None, turns=codec.turns(cols, tile, length, stages),
    )  # fmt: skip
    return term if bits >= LEVELS_FROM else Rotated(term, t_out=Rotation("hadamard", HADAMARD))


def sparse(rows: int, cols: int, tile: int = 1) -> Term:
    mask = SeededMask(16, seed=7, site=1, tile=tile)
    return Coded(rows, cols, 1, "sign", codes(rows, mask.num_survivors(cols), bits=1), torch.tensor(0.01), mask=mask)


def low_rank(rows: int, cols: int, rank: int) -> Term:
    left, right = torch.randn(rows, rank).bfloat16(), torch.randn(rank, cols).bfloat16()
    return LowRank(Coded(rows, rank, 16, "float", left), torch.ones(rank), Coded(rank, cols, 16, "float", right))


def grid(rows: int, cols: int) -> Term:
    """8 bits for 8 weights, as `higgs` has them."""
    found = codes(rows * -(-cols // 8), bits=8)
    term = Codebook(rows, cols, 8, 8, Book("gaussian"), found, torch.full((rows, 1), 0.01), signed=False)
    return Rotated(term, t_in=Rotation("hadamard", 1024))


KINDS: dict[str, Callable[[int, int], Term]] = {
    "coded 1 bit": lambda rows, cols: coded(rows, cols, 1),
    "coded 4 bits": lambda rows, cols: coded(rows, cols, 4),
    "seeded-vq 0.015": lambda rows, cols: seeded_vq(rows, cols, 0.015),
    "seeded-vq 0.03": lambda rows, cols: seeded_vq(rows, cols, 0.03),
    "seeded-vq 0.125": lambda rows, cols: seeded_vq(rows, cols, 0.125),
    "seeded-vq 0.5": lambda rows, cols: seeded_vq(rows, cols, 0.5),
    "seeded-vq 1": lambda rows, cols: seeded_vq(rows, cols, 1),
    "sparse 1/16 1 bit": sparse,
    "… shared by 64": lambda rows, cols: sparse(rows, cols, 64),
    "low rank 16": lambda rows, cols: low_rank(rows, cols, 16),
    "low rank 64": lambda rows, cols: low_rank(rows, cols, 64),
    "grid 8 bits of 8": grid,
}
STACKS: dict[str, list[Shape]] = {
    "smollm2": [(960, 576), (576, 576), (3072, 576), (576, 1536)],  # q k v, o, gate up, down of one layer
    "wide": [(4096, 4096)],
}
LAYERS = {"smollm2": 30, "wide": 8}


def whole(n: int) -> int:
    return -(-n // 32) * 32


def own(part: Part) -> Part:
    """The same values in other memory."""
    tensors = {name: tensor if name in SHARED else tensor.clone() for name, tensor in part.tensors.items()}
    return replace(part, tensors=tensors, before=None if part.before is None else own(part.before))


@dataclass
class Stack:
    """Sites in the order in which they are read, and for each shape an input and an output."""

    library: Library
    shapes: list[Shape]
    sites: list[PackedSite]
    weights: dict[Shape, Tensor]
    x: dict[Shape, Tensor]
    y: dict[Shape, Tensor]
    rows: int

    @classmethod
    def of(cls, library: Library, layer: list[Shape], layers: int, rows: int) -> Stack:
        weights = {shape: (torch.randn(shape) / shape[1] ** 0.5).bfloat16() for shape in layer}
        shapes = layer * layers
        sites = [PackedSite(*shape, weights[shape]) for shape in shapes]
        x = {shape: torch.zeros(rows, whole(shape[1]), dtype=torch.bfloat16) for shape in layer}
        for shape, values in x.items():
            values[:, : shape[1]] = torch.randn(rows, shape[1])
        y = {shape: torch.zeros(rows, whole(shape[0])) for shape in layer}
        return cls(library, shapes, sites, weights, x, y, rows)

    @property
    def nbytes(self) -> int:
        return sum(site.nbytes for site in self.sites)

    def spans(self, tenants: int) -> list[tuple[int, int]]:
        """(first row, rows) of each tenant."""
        ends = [self.rows * tenant // tenants for tenant in range(tenants + 1)]
        return [(start, stop - start) for start, stop in zip(ends, ends[1:], strict=False)]

    def base(self) -> Callable[[], None]:
        return self.with_parts([], 0)

    def with_parts(self, lists: Sequence[Sequence[PartList]], tenants: int) -> Callable[[], None]:
        """`lists`: of each tenant, of each site."""
        spans, calls = self.spans(tenants) if tenants else [], []
        for index, (shape, site) in enumerate(zip(self.shapes, self.sites, strict=True)):
            runs = runs_of([(*span, lists[tenant][index]) for tenant, span in enumerate(spans)])
            calls.append((site, self.x[shape], self.y[shape], runs))

        def step() -> None:
            for site, x, y, runs in calls:
                site.run(self.library, x, y, runs, tenants)

        return step

    def with_copies(self, copies: Sequence[Sequence[PackedSite]], tenants: int) -> Callable[[], None]:
        """The weights of each tenant in place of the base's."""
        runs, calls = runs_of([]), []
        for index, shape in enumerate(self.shapes):
            for tenant, (start, count) in enumerate(self.spans(tenants)):
                rows = slice(start, start + count)
                calls.append((copies[tenant][index], self.x[shape][rows], self.y[shape][rows]))

        def step() -> None:
            for site, x, y in calls:
                site.run(self.library, x, y, runs, 0)

        return step


clock: Callable[[], float] = time.perf_counter


def seconds(step: Callable[[], object]) -> float:
    start = clock()
    step()
    return clock() - start


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def check(stack: Stack, name: str, terms: dict[Shape, Term], parts: dict[Shape, Part]) -> None:
    """Each shape alone, and the first site of the stack with all rows a tenant's."""
    for shape, term in terms.items():
        x = stack.x[shape][:, : shape[1]]
        added = x.double() @ term.decode().double().T
        found = error(apply_part(stack.library, x, parts[shape]), added)
        y, site = torch.full_like(stack.y[shape], torch.nan), stack.sites[stack.shapes.index(shape)]
        alone = PartList([(parts[shape], 0, 1.0)])
        site.run(stack.library, stack.x[shape], y, runs_of([(0, stack.rows, alone)]), 1)
        both = error(y[:, : shape[0]], x.double() @ stack.weights[shape].double().T + added)
        if not (found < TOLERANCE and both < TOLERANCE):
            raise SystemExit(
                f"{name} {shape}: wrong by {found:.1e} alone, {both:.1e} with the base; nothing is reported"
            )


def shares(base: Callable[[], None], steps: dict[int, Callable[[], None]], rounds: int) -> dict[int, float]:
    """Of one tenant, by how many there are."""
    found: dict[int, list[float]] = {tenants: [] for tenants in steps}
    for number in range(rounds + 1):
        before = seconds(base)
        for tenants, step in steps.items():
            took, after = seconds(step), seconds(base)
            if number:  # the first round warms up
                middle = (before + after) / 2
                found[tenants].append((took - middle) / middle / tenants)
            before = after
    return {tenants: median(values) for tenants, values in found.items()}


def in_torch(stack: Stack, terms: dict[Shape, Term], layer: list[Shape], base_s: float, rounds: int) -> float:
    """Plain kernels, one tenant with all rows; over one layer, and scaled to the stack."""
    served = {shape: term.serving() for shape, term in terms.items()}

    def step() -> None:
        for shape in layer:
            apply_term(stack.x[shape][:, : shape[1]], served[shape])

    step()
    took = median(seconds(step) for _ in range(rounds))
    return took * len(stack.shapes) / len(layer) / base_s


def bandwidth(nbytes: int) -> float:
    """Bytes a second that one thread reads of memory: the best of two plain reductions."""
    values = torch.ones(nbytes // 4)
    best = min(seconds(step) for step in (values.sum, lambda: torch.dot(values, values)) * 5)
    return values.nbytes / best


def machine(library: Library) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = sorted(flag for flag in processor_flags() if flag.startswith(("amx", "avx", "fma")))
    return {
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "flags": flags,
        "instruction set": library.instruction_set,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def measure(library: Library, name: str, args: argparse.Namespace) -> dict[str, Any]:
    layer, layers = STACKS[name], 2 if args.quick else LAYERS[name]
    stack, rounds = Stack.of(library, layer, layers, args.rows), 2 if args.quick else args.rounds
    base = stack.base()
    base()
    base_s = median(seconds(base) for _ in range(rounds + 1))
    floor_s = stack.nbytes / bandwidth(stack.nbytes)
    print(
        f"\n{name}: {len(stack.sites)} sites, {stack.nbytes / 1e6:.0f} MB, {args.rows} rows, {args.threads} thread(s)"
    )
    print(f"base {base_s * 1e3:.2f} ms; reading it once {floor_s * 1e3:.2f} ms: {base_s / floor_s:.2f} of that floor")
    print(f"{'share of the base, a tenant of':<30}" + "".join(f"{count:>9}" for count in args.tenants) + "    torch")

    def row(kind: str, found: dict[int, float], bits: float, plain: float | None) -> dict[str, Any]:
        figures = "".join(f"{found[tenants]:>9.1%}" for tenants in args.tenants)
        print(f"{kind:<18}{bits:>7.3f} bits {figures}" + ("" if plain is None else f"{plain:>9.0%}"), flush=True)
        return {"kind": kind, "bits": bits, "share": found, "torch": plain}

    rows, most = [], max(args.tenants)
    for kind in args.kind or KINDS:
        torch.manual_seed(0)
        terms = {shape: KINDS[kind](*shape) for shape in layer}
        parts: dict[Shape, Part] = {}
        for shape, term in terms.items():
            part = part_of(term)
            if part is None:
                raise SystemExit(f"{kind} {shape}: not served natively")
            parts[shape] = part
        check(stack, kind, terms, parts)
        lists = [[PartList([(own(parts[shape]), 0, 1.0)]) for shape in stack.shapes] for _ in range(most)]
        found = shares(base, {count: stack.with_parts(lists, count) for count in args.tenants}, rounds)
        bits = 8 * sum(part.nbytes for part in parts.values()) / sum(rows * cols for rows, cols in layer)
        rows.append(row(kind, found, bits, in_torch(stack, terms, layer, base_s, rounds)))
    copies = [[PackedSite(*shape, stack.weights[shape]) for shape in stack.shapes] for _ in range(most)]
    found = shares(base, {count: stack.with_copies(copies, count) for count in args.tenants}, rounds)
    # all rows are the tenants' here: the base is not read, and its time is part of what they take
    rows.append(row("bfloat16 copies", {count: share + 1 / count for count, share in found.items()}, 16.0, None))
    return {"stack": name, "bytes": stack.nbytes, "base_s": base_s, "floor_s": floor_s, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--kind", nargs="+", choices=KINDS)
    parser.add_argument("--tenants", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--rows", type=int, default=16, help="of the batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--instruction-set", help="amx, avx512bf16, avx512 or avx2 (default: the best)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread, not what a clock on the wall says: shared machines"
    )
    parser.add_argument("--quick", action="store_true", help="two layers, two rounds: does it run?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if max(args.tenants) > args.rows:
        parser.error("a tenant has at least one row: --tenants is at most --rows")
    if args.cpu_time and args.threads > 1:
        parser.error("--cpu-time is for one thread")
    if args.cpu_time:
        global clock
        clock = time.thread_time
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    library = load(args.instruction_set)
    library.set_threads(args.threads)
    about = machine(library)
    print(json.dumps(about))
    options = {
        "rows": args.rows,
        "threads": args.threads,
        "rounds": args.rounds,
        "quick": args.quick,
        "cpu_time": args.cpu_time,
    }
    figures = {"machine": about, **options, "stacks": [measure(library, name, args) for name in args.stack]}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
