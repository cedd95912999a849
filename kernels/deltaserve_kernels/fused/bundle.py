"""A delta as one block of memory that can lie anywhere on the device.

int64 [sites + 1]      number of the first part of each site, counted in 16 words from the start
int64 [parts, 16]      fields.Field, site by site
data                   what the offsets point to, each on 16 bytes
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deltaserve_kernels.fused.fields import IN_UNIT, TAGS, UNIT, WORDS, Field, Launch, float_bits
from deltaserve_kernels.fused.parts import BookForm, FusedTerm, InputForm, written_as
from deltaserve_kernels.fused.slots import padded


class LaunchNumbers:
    """Numbers for launches, the same for all deltas of a server; modulo TAGS, the launch's tag. Thread-safe."""

    def __init__(self) -> None:
        self._numbers: dict[Launch, int] = {}
        self._lock = threading.Lock()

    def __getitem__(self, launch: Launch) -> int:
        with self._lock:
            return self._numbers.setdefault(launch, (len(self._numbers) + 1) * TAGS + launch.tag)


@dataclass(frozen=True)
class SitePlan:
    """What a delta needs at a site."""

    launches: frozenset[Launch] = frozenset()
    variants: int = 1  # forms of the input, the input itself included
    rank: int = 0  # columns between factors
    tallest: int = 0  # rows of the tallest factor
    reach: int = 0  # columns between factors up to the last that is used
    written: frozenset[str] = frozenset()  # codes, gather, factors: what `materialize` adds to W; none: it cannot


@dataclass(frozen=True, eq=False)
class Bundle:
    """memory uint8 [bytes], a multiple of 16; plans by site. Equal to itself alone. `number` names its plans as long as
    the process lives, and holds no memory."""

    memory: Tensor
    plans: tuple[SitePlan, ...]
    number: int = field(default_factory=itertools.count().__next__)

    def to(self, device: torch.device | str) -> Bundle:
        return replace(self, memory=self.memory.to(device))

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


@dataclass
class _Site:
    """The parts of one site in the making."""

    numbers: LaunchNumbers
    fields: list[dict[Field, int]]
    tensors: list[dict[Field, Tensor]]
    forms: list[InputForm]
    launches: set[Launch]
    rank: int = 0
    tallest: int = 0
    reach: int = 0
    kinds: set[str | None] = field(default_factory=set)  # None: of a form that cannot be added to W

    def add(self, term: FusedTerm, gamma: float) -> None:
        offsets: dict[int, int] = {}  # first column of the factors of a rank
        for part in term.parts:
            variant = 0 if part.phase == 3 else self._variant(part.form)
            about = (part.about, variant) if isinstance(part.about, BookForm) else part.about
            launch = Launch(part.phase, part.kind, about, part.turned)
            self.launches.add(launch)
            last = part.phase != 2
            fields = {
                Field.KEY: self.numbers[launch],
                Field.SCALE: float_bits(part.scale * (gamma if last else 1.0)),
                Field.ZERO: float_bits(part.zero),
                Field.ROWS: part.rows,
                Field.VARIANT: 0 if isinstance(part.about, BookForm) else variant,
            } | {Field[name]: value for name, value in part.numbers.items()}
            if part.rank:
                start = offsets.setdefault(part.rank, self.rank)
                fields |= {Field.OUT: start} if part.phase == 2 else {Field.IN: start // IN_UNIT}
                if part.phase == 2:
                    self.tallest = max(self.tallest, part.rows)
                    self.reach = max(self.reach, start + part.rows)
            self.kinds.add(written_as(part))
            self.fields.append(fields)
            self.tensors.append({Field[name.upper()]: tensor for name, tensor in part.tensors.items()})
        self.rank += sum(offsets)

    def _variant(self, form: InputForm) -> int:
        if form.plain:
            return 0
        for number, known in enumerate(self.forms, 1):
            if known.rotation == form.rotation and _same(known.columns, form.columns) and _same(known.col, form.col):
                return number
        self.forms.append(form)
        launch = Launch(0, "variant", form.rotation)
        self.launches.add(launch)
        self.fields.append({Field.KEY: self.numbers[launch], Field.VARIANT: len(self.forms)})
        tensors = {Field.STARTS: form.columns, Field.VALUES: form.col}
        self.tensors.append({name: tensor for name, tensor in tensors.items() if tensor is not None})
        lengths = [len(tensor) for tensor in tensors.values() if tensor is not None]
        self.fields[-1][Field.COUNT] = lengths[0] if lengths else -1
        return len(self.forms)

    @property
    def plan(self) -> SitePlan:
        kinds = {kind for kind in self.kinds if kind} if None not in self.kinds else set()
        written = frozenset(kinds - {"rescale"})
        return SitePlan(frozenset(self.launches), 1 + len(self.forms), self.rank, self.tallest, self.reach, written)


def make_bundle(
    sites: Sequence[Sequence[tuple[FusedTerm, float]]], numbers: LaunchNumbers, packed: Collection[int] = ()
) -> Bundle:
    """`sites`: for each, its terms with their gamma; `packed`: those whose W + Δ is not all that the delta does."""
    made = [_Site(numbers, [], [], [], set()) for _ in sites]
    for site, terms in zip(made, sites, strict=True):
        for term, gamma in terms:
            site.add(term, gamma)
    header = padded(len(sites) + 1, WORDS)
    count = sum(len(site.fields) for site in made)
    words = torch.zeros(header + WORDS * count, dtype=torch.int64)
    blocks, end, number = [], words.nbytes // UNIT, header // WORDS
    for index, site in enumerate(made):
        words[index] = number
        for fields, tensors in zip(site.fields, site.tensors, strict=True):
            for name, tensor in tensors.items():
                blocks.append((end, tensor))
                fields[name] = end
                end += -(-tensor.nbytes // UNIT)
            for name, value in fields.items():
                words[number * WORDS + name] = value
            number += 1
    words[len(sites)] = number
    memory = torch.zeros(end * UNIT, dtype=torch.uint8)
    memory[: words.nbytes] = words.view(torch.uint8)
    for start, tensor in blocks:
        memory[start * UNIT : start * UNIT + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    plans = [site.plan for site in made]
    for index in packed:
        plans[index] = replace(plans[index], written=frozenset())
    return Bundle(memory, tuple(plans))


def merged(plans: Sequence[SitePlan]) -> SitePlan:
    """What a step needs that mixes these."""
    return SitePlan(
        frozenset().union(*(plan.launches for plan in plans)),
        max((plan.variants for plan in plans), default=1),
        max((plan.rank for plan in plans), default=0),
        max((plan.tallest for plan in plans), default=0),
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
