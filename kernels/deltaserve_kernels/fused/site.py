"""One linear layer of a step: what a batch of tenants adds to the base's product, in a few launches for all of them.

    0 variants of the input, the base's own product rescaled
    1 whatever adds to y directly        codes · gather · grid · patches
    2 x · Rᵀ of every low-rank term      into t float32 [rows, ranks], each delta's ranks on columns of its own
    3 t · Lᵀ                             added to y

Which deltas there are, where they lie and which rows are theirs is read by the kernels from `slots` and `segments`;
only the kinds of launches depend on the mix. A step without deltas launches nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import knobs

from deltaserve_kernels.activation_prep.fused import activation_prep_kernel, variant_prep_kernel
from deltaserve_kernels.activation_prep.naive import COPIES
from deltaserve_kernels.codebook_matmul.fused import grid_matmul_kernel
from deltaserve_kernels.codebook_matmul.project import project
from deltaserve_kernels.fused.bundle import Bundle, LaunchNumbers, SitePlan, merged
from deltaserve_kernels.fused.compiles import expected
from deltaserve_kernels.fused.fields import IN_UNIT, UNIT, Launch
from deltaserve_kernels.fused.fused_rescale import rescale_kernel
from deltaserve_kernels.fused.fused_vectors import vectors_kernel
from deltaserve_kernels.fused.parts import LANES, BookForm, grid_padding
from deltaserve_kernels.fused.slots import padded, superblock
from deltaserve_kernels.fused.tables import ROWS_OF_A_SEGMENT, Tables
from deltaserve_kernels.grouped_matmul.fused import grouped_matmul_kernel
from deltaserve_kernels.grouped_matmul.fused_patches import patch_matmul_kernel
from deltaserve_kernels.segments import Segments
from deltaserve_kernels.sparse_matmul.fused import gather_matmul_kernel
from deltaserve_kernels.terms import Rotation

WEIGHT_ROWS, GATHER_ROWS, GRID_ROWS = 64, 128, 64  # of a tile
WEIGHT_WARPS = 2  # too few for wgmma, whose fences cost more than they save at 8 columns
PREP_BLOCK = 1024
VECTOR_COLUMNS = 1024
WIDTH = superblock(1, LANES)  # activations are padded to it
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class Pool:
    """One small tensor of the device, as every type that deltas are read as; deltas lie at distances from it."""

    byte: Tensor
    word: Tensor
    value: Tensor
    float: Tensor
    field: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Pool:
        byte = torch.zeros(UNIT * 16, dtype=torch.uint8, device=device)
        return cls(byte, *(byte.view(kind) for kind in (torch.int32, torch.float16, torch.float32, torch.int64)))

    def distance(self, memory: Tensor) -> int:
        """In units of 16 bytes."""
        bytes_, rest = divmod(memory.data_ptr() - self.byte.data_ptr(), UNIT)
        assert not rest, "a delta's memory is aligned to 16 bytes"
        return bytes_


class FusedKernels:
    """Of one device. `numbers` are those its bundles are made with."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.numbers = LaunchNumbers()
        self.pool = Pool.on(device)
        interpreted = bool(knobs.runtime.interpret)
        if device.type != "cuda" and not interpreted:
            raise FusedUnavailable(f"Triton's kernels need a CUDA device, not {device.type}")
        processors = 1 if interpreted else torch.cuda.get_device_properties(device).multi_processor_count
        self.programs = PROGRAMS_PER_PROCESSOR * processors
        self._warm: set[Launch] = set()
        self._lock = threading.Lock()
        self._merged: dict[tuple[int, frozenset[int]], tuple[SitePlan, list[Launch]]] = {}

    def warm_up(self, bundle: Bundle, dtype: torch.dtype) -> None:
        """Compiles what a delta needs and no other has needed, by launches without rows; activations are of
        `dtype`, layers have a bias or none.

        Called where the delta is loaded, so that no step waits for a compiler. Thread-safe.
        """
        step = FusedStep(self, Segments(), {0: bundle}, 1)
        x, y = torch.zeros(2, 1, WIDTH, dtype=dtype, device=self.device)
        for plan in set(bundle.plans):
            with self._lock:
                fresh = sorted(plan.launches - self._warm, key=lambda launch: launch.order)
                self._warm.update(fresh)
            if not fresh:
                continue
            with expected():
                if any(launch.kind == "vector" for launch in fresh):
                    step.vectors(bundle.plans.index(plan), x[0])
                    continue
                _SiteCall(step, 0, plan, x, y, None, WIDTH).run(fresh)
                biased = [launch for launch in fresh if launch.kind == "rescale"]
                _SiteCall(step, 0, plan, x, y, y[0], WIDTH).run(biased)

    def places(self, bundles: Mapping[int, Bundle]) -> dict[int, int]:
        """Where deltas lie, by slot."""
        return {slot: self.pool.distance(bundle.memory) for slot, bundle in bundles.items()}

    def plan(self, site: int, mix: frozenset[int], bundles: Sequence[Bundle]) -> tuple[SitePlan, list[Launch]]:
        """What a mix of bundles with these numbers needs at a site, and its launches in order; remembered."""
        key = (site, mix)
        if key not in self._merged:
            if len(self._merged) > 2**14:
                self._merged.clear()
            plan = merged([bundle.plans[site] for bundle in bundles])
            self._merged[key] = plan, sorted(plan.launches, key=lambda launch: launch.order)
        return self._merged[key]


class FusedUnavailable(Exception):
    """The kernels cannot run here."""


class FusedStep:
    """The rows of one step, as the kernels read them; made once, for all layers."""

    def __init__(
        self, kernels: FusedKernels, segments: Segments, bundles: Mapping[int, Bundle], num_rows: int | None = None
    ) -> None:
        """`bundles` by slot: of runs whose delta has one. `num_rows`, where `vectors` is asked for."""
        rows = max((run.stop for run in segments.runs), default=0) if num_rows is None else num_rows
        self.kernels = kernels
        self.tables = Tables.of(segments, kernels.places(bundles), rows).to(kernels.device)
        self._bundles = list(bundles.values())
        self._mix = frozenset(bundle.number for bundle in self._bundles)
        self._input: tuple[Tensor, Activations] | None = None  # x, and what was made of it

    def plan(self, site: int) -> tuple[SitePlan, Sequence[Launch]]:
        """What is launched at a site."""
        return self.kernels.plan(site, self._mix, self._bundles)

    def add(self, site: int, x: Tensor, y: Tensor, bias: Tensor | None = None, rows: int | None = None) -> None:
        """Adds to y [T, out], contiguous, what each row's delta adds at a site to x [..., in] of T rows; changes y.

        `rows`: those of the site's weight, where y has more columns."""
        plan, launches = self.plan(site)
        if launches:
            _SiteCall(self, site, plan, x, y, bias, y.shape[1] if rows is None else rows).run(launches)

    def replaces(self, site: int) -> bool:
        """Has any delta a vector there?"""
        return bool(self.plan(site)[1])

    def vectors(self, site: int, own: Tensor) -> Tensor:
        """[T, n] of own's dtype: what each row's delta has in the place of `own` [n], or that itself."""
        (launch,) = self.plan(site)[1]
        pool, tables, width = self.kernels.pool, self.tables, len(own)
        out = own.new_empty(len(tables.row_slots), width)
        vectors_kernel[(len(out), -(-width // VECTOR_COLUMNS))](
            pool.word, pool.field, tables.slots, tables.row_slots, own, out,
            site, self.kernels.numbers[launch], width, VECTOR_COLUMNS,
        )  # fmt: skip
        return out

    def linear(self, site: int, x: Tensor, taken: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The whole layer: x [..., in] of T rows → [..., out]. `taken`: x as the base's weight takes it."""
        y = F.linear(taken, weight, bias)
        self.add(site, x, y.flatten(0, -2), bias)
        return y

    def prepared(self, x: Tensor) -> Activations:
        """Shared by the layers that read the same x, one after the other."""
        if self._input is None or self._input[0] is not x:
            self._input = (x, Activations.of(x.flatten(0, -2), self.kernels.pool))
        return self._input[1]


@dataclass(frozen=True)
class Activations:
    """x̂ float16 [copies, variants, rows, width], sums float32 [variants, rows, …], 2^e float32 [variants, rows]: see
    activation_prep. `rows` are ROWS_OF_A_SEGMENT more than x has, whatever stands in them."""

    values: Tensor
    sums: Tensor
    exponents: Tensor

    @classmethod
    def empty(cls, variants: int, rows: int, cols: int, device: torch.device) -> Activations:
        width, rows = padded(cols, WIDTH), rows + ROWS_OF_A_SEGMENT
        values = torch.empty(len(COPIES), variants, rows, width, dtype=torch.float16, device=device)
        sums = torch.empty(variants, rows, width // 128 * 15, device=device)
        return cls(values, sums, torch.empty(variants, rows, device=device))

    @classmethod
    def of(cls, x: Tensor, pool: Pool) -> Activations:
        """x [T, K] itself, as the one variant."""
        made = cls.empty(1, len(x), x.shape[1], x.device)
        activation_prep_kernel[(len(x),)](
            x.contiguous(), pool.word, pool.float, made.values, made.sums, made.exponents, x.shape[1], made.width,
            made.values.stride(0), LANES, PREP_BLOCK,
        )  # fmt: skip
        return made

    def with_room(self, variants: int) -> Activations:
        """The same as the first of `variants`."""
        if variants == 1:
            return self
        _, _, rows, width = self.values.shape
        made = Activations.empty(variants, rows - ROWS_OF_A_SEGMENT, width, self.values.device)
        made.values[:, 0], made.sums[0], made.exponents[0] = self.values[:, 0], self.sums[0], self.exponents[0]
        return made

    @property
    def width(self) -> int:
        return self.values.shape[3]

    @property
    def rows(self) -> int:
        return self.values.shape[2]


@dataclass
class _SiteCall:
    step: FusedStep
    site: int
    plan: SitePlan
    x: Tensor
    y: Tensor
    bias: Tensor | None
    height: int

    def run(self, launches: Sequence[Launch]) -> None:
        assert self.y.is_contiguous()
        kernels = self.step.kernels
        self.pool, self.programs = kernels.pool, kernels.programs
        self.activations = self.step.prepared(self.x).with_room(self.plan.variants)
        between: Tensor | None = None
        if self.plan.rank:
            between = torch.zeros(len(self.y), self.plan.rank, device=self.x.device)
        factors: Activations | None = None
        for launch in launches:
            if launch.kind == "rescale":
                self._rescale(launch)
            elif launch.kind == "variant":
                self._variants(launch)
            elif launch.phase == 2:
                assert between is not None
                self._launch(launch, self.activations, between, each=True)
            elif launch.phase == 3:
                assert between is not None
                factors = factors or Activations.of(between, self.pool)
                self._onto(launch, factors)
            else:
                self._onto(launch, self.activations)

    def _onto(self, launch: Launch, source: Activations) -> None:
        """Adds to y, or, where a rotation is undone, to y by way of a buffer."""
        if launch.turned is None:
            self._launch(launch, source, self.y)
            return
        assert isinstance(launch.turned, Rotation)
        turned = torch.zeros(len(self.y), self.height, device=self.y.device)
        self._launch(launch, source, turned)
        self.y[:, : self.height] += launch.turned.inverse(turned).to(self.y.dtype)

    def _launch(self, launch: Launch, source: Activations, y: Tensor, *, each: bool = False) -> None:
        """Adds to y [T, n]."""
        pool, step, grid = self.pool, self.step, (self.programs,)
        slots, rows, tiles, _ = step.tables
        height = self.plan.tallest if each else self.height
        bytes_and_words = (pool.byte, pool.word, pool.float, pool.field, slots)
        activations = (source.values[0], source.exponents, y)

        def numbers(tile: int, width: int = source.width) -> tuple[int, ...]:
            return self.site, step.kernels.numbers[launch], source.rows, -(-height // tile), width, y.shape[1]

        if launch.kind == "codes":
            stride = source.values.stride(0) // IN_UNIT
            grouped_matmul_kernel[grid](
                pool.word, pool.value, pool.float, pool.field, slots, tiles,
                source.values, source.sums, source.exponents, y,
                *numbers(WEIGHT_ROWS, source.width // IN_UNIT), stride,
                launch.about, each, LANES, ROWS_OF_A_SEGMENT, WEIGHT_ROWS, self.programs, num_warps=WEIGHT_WARPS,
            )  # fmt: skip
        elif launch.kind == "gather":
            width = source.width
            if isinstance(launch.about, tuple):
                form, variant = launch.about
                assert isinstance(form, BookForm)
                width = form.width
                activations = (project(source.values[0, variant], form), source.exponents[variant], y)
            gather_matmul_kernel[grid](
                *bytes_and_words,
                rows,
                *activations,
                *numbers(GATHER_ROWS, width),
                each,
                GATHER_ROWS,
                self.programs,
            )
        elif launch.kind == "grid":
            length = int(str(launch.about))
            vector = grid_padding(length)
            grid_matmul_kernel[grid](
                pool.byte, pool.value, pool.float, pool.field, slots, tiles,
                *activations, *numbers(GRID_ROWS),
                each, length, vector, max(1, 32 // vector), ROWS_OF_A_SEGMENT, GRID_ROWS, self.programs,
            )  # fmt: skip
        else:
            size = int(str(launch.about))
            patch_matmul_kernel[grid](
                *bytes_and_words, tiles, *activations, *numbers(size), size, ROWS_OF_A_SEGMENT, self.programs
            )

    def _rescale(self, launch: Launch) -> None:
        pool, step, bias = self.pool, self.step, self.y if self.bias is None else self.bias
        rescale_kernel[(self.programs,)](
            pool.float, pool.field, step.tables.slots, step.tables.rows, bias, self.y,
            self.site, step.kernels.numbers[launch], -(-self.height // GATHER_ROWS), self.y.shape[1],
            self.bias is not None, GATHER_ROWS, self.programs,
        )  # fmt: skip

    def _variants(self, launch: Launch) -> None:
        step, rotation = self.step, launch.about
        x = self.x.flatten(0, -2).contiguous()
        if isinstance(rotation, Rotation):
            x = rotation.forward(x.float())
        made = self.activations
        variant_prep_kernel[(self.programs,)](
            self.pool.word, self.pool.float, self.pool.field, step.tables.slots, step.tables.rows, x,
            made.values, made.sums, made.exponents, self.site, step.kernels.numbers[launch], made.rows,
            x.shape[1], made.width, made.values.stride(0), LANES, PREP_BLOCK, self.programs,
        )  # fmt: skip
