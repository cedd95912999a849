"""Many deltas at one linear layer: fused kernels against x · decode(term)ᵀ in float64, over every form they read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deltaserve_kernels.fused.bundle import Bundle, LaunchNumbers, make_bundle
from deltaserve_kernels.fused.parts import FusedTerm, fused_term, rescale
from deltaserve_kernels.fused.site import FusedKernels, FusedStep
from deltaserve_kernels.segments import Segments
from deltaserve_kernels.terms import Coded, SeededMask, Term

from ..forms import Maker, activations, forms, integers, whole_forms
from ..tolerances import FUSED_RELATIVE_RMS, relative_rms

pytestmark = pytest.mark.usefixtures("poison")
NOT_READ = {"groups-odd-length"}
EXACT = (
    "sign", "odd", "int", "one-scale", "no-scale", "groups", "float", "exact", "mask", "gaussian", "placed", "patches"
)  # fmt: skip
ROUNDED = {"mask-6-bits", "mask-shared-by-64", "placed-col"}  # of the names above, those whose x is multiplied first
SITE = 1


def fused(term: Term) -> FusedTerm:
    made = fused_term(term)
    assert made is not None
    return made


def bundle_of(kernels: FusedKernels, *terms: tuple[Term, float]) -> Bundle:
    """At the second of three sites."""
    return make_bundle([[], [(fused(term), gamma) for term, gamma in terms], []], kernels.numbers).to(kernels.device)


def add(kernels: FusedKernels, bundles: dict[int, Bundle], slots: Sequence[int], x: Tensor, y: Tensor) -> Tensor:
    """y after the step; slots sorted."""
    step = FusedStep(kernels, Segments.of(slots), bundles)
    y = y.to(kernels.device, copy=True)
    step.add(SITE, x.to(kernels.device), y)
    return y.cpu()


def tolerance(name: str) -> float:
    exact = name.startswith(EXACT) and name not in ROUNDED
    return FUSED_RELATIVE_RMS["exact" if exact else "rounded"]


@pytest.mark.parametrize("name", sorted(set(forms(1, 1)) - NOT_READ))
@pytest.mark.parametrize("shape", [(37, 1), (97, 131)])
def test_every_form(kernels: FusedKernels, name: str, shape: tuple[int, int]) -> None:
    term = forms(*shape)[name]
    x = activations(6, term.cols)
    x[3, 0] = 800.0
    y = torch.randn(6, term.rows)
    slots = [-1, 2, 2, 2, 2, 2]
    added = add(kernels, {2: bundle_of(kernels, (term, 1.5))}, slots, x, y).double() - y.double()
    expected = 1.5 * x.double() @ term.decode().double().T
    assert not added[0].any(), "a row of the base"
    assert relative_rms(added[1:], expected[1:]) < tolerance(name)


@pytest.mark.parametrize("name", sorted(NOT_READ))
def test_what_is_not_read_is_known_before(name: str) -> None:
    assert fused_term(forms(97, 131)[name]) is None


@pytest.mark.parametrize("name", sorted(set(whole_forms(1, 16)) - {"groups"}))  # groups of 6 are not read
def test_small_integers_and_powers_of_two_are_exact(kernels: FusedKernels, name: str) -> None:
    term = whole_forms(36, 64)[name]
    x = integers(3, term.cols)
    y = add(kernels, {0: bundle_of(kernels, (term, 0.5))}, [0, 0, 0], x, torch.zeros(3, term.rows))
    assert torch.equal(y.double(), 0.5 * x.double() @ term.decode().double().T)


def mix(kernels: FusedKernels, rows: int, cols: int) -> tuple[dict[int, Bundle], dict[int, list[tuple[Term, float]]]]:
    """Five tenants, each of other families and widths; the third of several terms at once."""
    make, every = Maker(rows, cols), forms(rows, cols)
    names = {0: ["sign-1"], 1: ["odd-4", "factors"], 3: ["groups", "book-stages", "factors-sparse"], 4: ["int-3"],
             6: ["rotated-patches-16", "gaussian-4-8", "mask-3-of-16", "book-boosted"]}  # fmt: skip
    terms = {slot: [(every[name], 0.5 + slot) for name in own] for slot, own in names.items()}
    terms[4].append((make.coded(rows, cols, 2, mask=SeededMask(8, 3, 1)), -1.0))
    return {slot: bundle_of(kernels, *own) for slot, own in terms.items()}, terms


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1), (0, 9, 0, 8, 1), (17, 0, 2, 0, 1)])
def test_tenants_and_families_mix(kernels: FusedKernels, counts: tuple[int, ...]) -> None:
    rows, cols = 130, 96
    bundles, terms = mix(kernels, rows, cols)
    slots = [-1, *(slot for slot, count in zip(terms, counts, strict=True) for _ in range(count))]
    used = {slot: bundle for slot, bundle in bundles.items() if slot in slots}
    x = activations(len(slots), cols)
    y = add(kernels, used, slots, x, torch.zeros(len(slots), rows))
    for row, slot in enumerate(slots):
        expected = torch.zeros(rows, dtype=torch.float64)
        for term, gamma in terms.get(slot, []):
            expected += gamma * x[row].double() @ term.decode().double().T
        if slot < 0:
            assert not y[row].any()
        else:
            assert relative_rms(y[row], expected) < FUSED_RELATIVE_RMS["rounded"], slot


def test_a_row_depends_on_no_other(kernels: FusedKernels) -> None:
    """Bit for bit: alone, among others, and in another place of its segment."""
    rows, cols = 130, 96
    bundles, terms = mix(kernels, rows, cols)
    slots = [slot for slot in terms for _ in range(3)]
    x = activations(len(slots), cols)
    together = add(kernels, bundles, slots, x, torch.zeros(len(slots), rows))
    for row in range(1, len(slots), 3):
        slot = slots[row]
        alone = add(kernels, {slot: bundles[slot]}, [slot], x[row : row + 1], torch.zeros(1, rows))
        assert torch.equal(alone[0], together[row]), slot


def test_slots_are_places_not_names(kernels: FusedKernels) -> None:
    """What a slot holds is read when a step begins: deltas come and go without anything compiled or captured."""
    rows, cols = 70, 96
    one, two = forms(rows, cols)["odd-2"], forms(rows, cols)["int-5"]
    first, second = bundle_of(kernels, (one, 1.0)), bundle_of(kernels, (two, 1.0))
    x = activations(2, cols)
    y = torch.zeros(2, rows)
    before = add(kernels, {0: first, 5: second}, [0, 5], x, y)
    after = add(kernels, {0: second, 5: first}, [0, 5], x.flip(0), y)
    assert torch.equal(after.flip(0), before)


def test_a_bundle_may_lie_anywhere(kernels: FusedKernels) -> None:
    term = forms(70, 96)["groups"]
    bundle = bundle_of(kernels, (term, 1.0))
    x = activations(1, 96)
    y = add(kernels, {0: bundle}, [0], x, torch.zeros(1, 70))
    moved = Bundle(bundle.memory.clone(), bundle.plans)
    bundle.memory.fill_(255)
    assert torch.equal(add(kernels, {0: moved}, [0], x, torch.zeros(1, 70)), y)


def test_nothing_holds_a_bundle_after_its_step(kernels: FusedKernels) -> None:
    bundle = bundle_of(kernels, (forms(70, 96)["odd-2"], 1.0))
    memory = weakref.ref(bundle.memory)
    add(kernels, {0: bundle}, [0], activations(1, 96), torch.zeros(1, 70))
    del bundle
    assert memory() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_y_is_rounded_once(kernels: FusedKernels, dtype: torch.dtype) -> None:
    term = Maker(70, 96, whole=True).coded(70, 96, 1, "sign")
    x, y = integers(2, 96), torch.randn(2, 70).to(dtype)
    added = add(kernels, {0: bundle_of(kernels, (term, 1.0))}, [0, 0], x, y)
    expected = y.double() + x.double() @ term.decode().double().T
    error = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10  # the interpreter truncates
    assert torch.allclose(added.double(), expected, rtol=error, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_bases_product_is_rescaled_first(kernels: FusedKernels, with_bias: bool) -> None:
    rows, cols = 70, 96
    term, factors = forms(rows, cols)["odd-2"], torch.rand(rows) + 0.5
    made = make_bundle([[], [(rescale(rows, 1.25, factors), 1.0), (fused(term), 2.0)]], kernels.numbers)
    x, y, bias = activations(3, cols), torch.randn(3, rows), torch.randn(rows)
    step = FusedStep(kernels, Segments.of([-1, 0, 0]), {0: made.to(kernels.device)})
    out = y.to(kernels.device, copy=True)
    step.add(SITE, x.to(kernels.device), out, bias.to(kernels.device) if with_bias else None)
    shift = bias.double() if with_bias else 0
    expected = (y.double() - shift) * 1.25 * factors.double() + shift + 2 * x.double() @ term.decode().double().T
    assert torch.equal(out[0].cpu(), y[0])
    assert relative_rms(out[1:].cpu(), expected[1:]) < 1e-6


def test_wider_outputs_are_left_alone(kernels: FusedKernels) -> None:
    """Logits have columns for added tokens, which no term knows."""
    for name in ("odd-2", "book", "gaussian-4-8", "rotated-patches-16", "book-turned"):
        term = forms(97, 131)[name]
        x, y = activations(2, 131), torch.full((2, 120), -torch.inf)
        y[:, :97] = 0
        step = FusedStep(kernels, Segments.of([0, 0]), {0: bundle_of(kernels, (term, 1.0))})
        out = y.to(kernels.device, copy=True)
        step.add(SITE, x.to(kernels.device), out, rows=97)
        assert out[:, 97:].isneginf().all()
        assert relative_rms(out[:, :97].cpu(), x.double() @ term.decode().double().T) < tolerance(name)


def test_no_tenants_no_launch(kernels: FusedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaserve_kernels.fused.site._SiteCall.run", lambda *_: pytest.fail("a launch"))
    step = FusedStep(kernels, Segments.of([-1, -1]), {})
    step.add(SITE, activations(2, 8), torch.zeros(2, 8))
    elsewhere = make_bundle([[(fused(forms(8, 8)["odd-2"]), 1.0)], [], []], kernels.numbers)
    FusedStep(kernels, Segments.of([0]), {0: elsewhere}).add(SITE, activations(1, 8), torch.zeros(1, 8))


def test_memory_is_what_was_packed() -> None:
    """The words of sites and parts, row scales, and the codes: 1 bit a weight where rows and columns fill tiles."""
    codes = Maker(1024, 1024).codes(1024, 1024, bits=1)
    term = Coded(1024, 1024, 1, "sign", codes, row=torch.rand(1024, 1))
    bundle = make_bundle([[(fused(term), 1.0)]], LaunchNumbers())
    assert bundle.nbytes == 1024 * 1024 // 8 + 4 * 1024 + 2 * 128
    assert bundle.memory.numel() % 16 == 0
