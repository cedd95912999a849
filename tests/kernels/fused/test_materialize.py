"""W + Δ written out, against the definition and float64; long runs of a step beside short ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve_kernels.fused.bundle import Bundle, make_bundle
from deltaserve_kernels.fused.parts import fused_term, rescale
from deltaserve_kernels.fused.site import FusedKernels, FusedStep
from deltaserve_kernels.materialize.calibrate import calibrated
from deltaserve_kernels.materialize.naive import materialize
from deltaserve_kernels.materialize.site import KINDS, LongRuns, Scratch
from deltaserve_kernels.segments import Segments
from deltaserve_kernels.terms import Coded, SeededMask, Term

from ..forms import Maker, activations, forms, whole_forms
from ..tolerances import FUSED_RELATIVE_RMS, relative_rms

pytestmark = pytest.mark.usefixtures("poison")
SITE = 1
PACKED = (  # forms that stay packed: books, grids, patches, rotations, picked columns
    "book", "gaussian", "placed", "rotated", "patches", "table", "groups-odd-length"
)  # fmt: skip
WRITTEN = sorted(name for name in forms(1, 1) if not name.startswith(PACKED))


def bundle_of(kernels: FusedKernels, *terms: tuple[Term, float], packed: tuple[int, ...] = ()) -> Bundle:
    """At the second of three sites."""
    made = [(form, gamma) for term, gamma in terms if (form := fused_term(term)) is not None]
    assert len(made) == len(terms)
    return make_bundle([[], made, []], kernels.numbers, packed).to(kernels.device)


def written(kernels: FusedKernels, bundle: Bundle, weight: Tensor) -> Tensor:
    scratch = Scratch(kernels, [tuple(weight.shape)], weight.dtype)
    step = FusedStep(kernels, Segments.of([3]), {3: bundle})
    return scratch.write(step.tables.slots, 3, SITE, bundle.plans[SITE], weight.to(kernels.device)).cpu()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("shape", [(37, 1), (70, 99)])
def test_every_form(kernels: FusedKernels, name: str, shape: tuple[int, int]) -> None:
    term = forms(*shape)[name]
    bundle = bundle_of(kernels, (term, 1.5))
    assert bundle.plans[SITE].written <= set(KINDS)
    assert bundle.plans[SITE].written
    delta = written(kernels, bundle, torch.zeros(shape))
    limit = FUSED_RELATIVE_RMS["rounded" if torch.cuda.is_available() and name.startswith("factors") else "exact"]
    assert relative_rms(delta, materialize(torch.zeros(shape), [(term, 1.5)])) < limit


@pytest.mark.parametrize("name", sorted(set(forms(1, 1)) - set(WRITTEN) - {"groups-odd-length"}))
def test_other_forms_stay_packed(kernels: FusedKernels, name: str) -> None:
    bundle = bundle_of(kernels, (forms(97, 131)["odd-2"], 1.0), (forms(97, 131)[name], 1.0))
    assert not bundle.plans[SITE].written


@pytest.mark.parametrize("name", ["sign-1", "odd-4", "mask", "factors", "float"])
def test_small_integers_and_powers_of_two_are_exact(kernels: FusedKernels, name: str) -> None:
    term = whole_forms(36, 64)[name]
    weight = torch.randint(-4, 5, (36, 64)).float()
    bundle = bundle_of(kernels, (term, 0.5))
    assert torch.equal(written(kernels, bundle, weight), materialize(weight, [(term, 0.5)]))


def test_terms_add_up_and_the_base_is_rescaled_first(kernels: FusedKernels) -> None:
    rows, cols = 33, 30
    every, factors, weight = forms(rows, cols), torch.rand(rows) + 0.5, torch.randn(rows, cols)
    terms = [(every[name], 0.5 + n) for n, name in enumerate(("factors", "sign-1", "mask-3-of-16", "factors-sparse"))]
    parts = [(made, gamma) for term, gamma in terms if (made := fused_term(term)) is not None]
    bundle = make_bundle([[], [(rescale(rows, 1.25, factors), 1.0), *parts]], kernels.numbers).to(kernels.device)
    assert bundle.plans[SITE].written == set(KINDS)
    expected = materialize(weight, terms, 1.25 * factors[:, None])
    assert relative_rms(written(kernels, bundle, weight), expected) < FUSED_RELATIVE_RMS["exact"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(kernels: FusedKernels, dtype: torch.dtype) -> None:
    term, weight = forms(97, 131)["groups"], torch.randn(97, 131).to(dtype)
    exact = weight.double() + term.decode().double()
    found = written(kernels, bundle_of(kernels, (term, 1.0)), weight)
    assert found.dtype == dtype
    error = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10  # the interpreter truncates
    assert torch.allclose(found.double(), exact, rtol=error, atol=1e-6)


def long_runs(
    kernels: FusedKernels, weight: Tensor, least: int, slots: list[int], bundles: dict[int, Bundle]
) -> LongRuns:
    scratch = Scratch(kernels, [tuple(weight.shape)], weight.dtype)
    scratch.thresholds = dict.fromkeys(KINDS, least)
    return LongRuns(scratch, Segments.of(slots), bundles)


def test_long_runs_among_short_ones(kernels: FusedKernels) -> None:
    """Rows of a step: base, a long run, a short one, a long one of a form that stays packed, a long one."""
    rows, cols, least = 33, 32, 3
    every = forms(rows, cols)
    names = {0: "sign-1", 1: "mask-3-of-16", 2: "book", 4: "factors"}
    bundles = {slot: bundle_of(kernels, (every[name], 0.5)) for slot, name in names.items()}
    slots = [-1, -1, 0, 0, 0, 0, 1, 1, 2, 2, 2, 4, 4, 4]
    weight, bias, x = torch.randn(rows, cols), torch.randn(rows), activations(len(slots), cols).float()
    step = long_runs(kernels, weight, least, slots, bundles)
    taken = []
    original = step._scratch.write
    step._scratch.write = lambda *given: (taken.append(given[1]), original(*given))[1]  # type: ignore[method-assign]
    device = kernels.device
    y = step.linear(SITE, *[x.to(device)[None]] * 2, weight.to(device), bias.to(device))[0].cpu()
    assert taken == [0, 4]
    packed = long_runs(kernels, weight, 5, slots, bundles)
    everyone = [x.to(device)[None]] * 2
    assert torch.equal(
        packed.linear(SITE, *everyone, weight.to(device), None),
        FusedStep.linear(step, SITE, *everyone, weight.to(device), None),
    ), "no run is long enough"
    for row, slot in enumerate(slots):
        whole = weight.double()
        if slot >= 0:
            whole = whole + 0.5 * every[names[slot]].decode().double()
        expected = x[row].double() @ whole.T + bias.double()
        assert relative_rms(y[row], expected) < FUSED_RELATIVE_RMS["rounded"], row


def test_a_site_that_is_not_all_in_the_bundle_stays_packed(kernels: FusedKernels) -> None:
    bundle = bundle_of(kernels, (forms(70, 96)["odd-2"], 1.0), packed=(SITE,))
    step = long_runs(kernels, torch.zeros(70, 96), 1, [0, 0], {0: bundle})
    assert not step._scratch.takes(bundle.plans[SITE], 1000)


def test_a_long_run_is_the_same_among_others(kernels: FusedKernels) -> None:
    """Bit for bit: the weights that are written depend on the delta alone, whatever was written before."""
    rows, cols = 130, 96
    weight, x = torch.randn(rows, cols), activations(5, cols).float()
    bundles = {
        slot: bundle_of(kernels, (forms(rows, cols)[name], 1.0)) for slot, name in ((0, "int-3"), (7, "factors"))
    }
    mixed = long_runs(kernels, weight, 2, [0, 0, 7, 7, 7], bundles)
    alone = long_runs(kernels, weight, 2, [7, 7, 7], {7: bundles[7]})
    x, weight = x.to(kernels.device), weight.to(kernels.device)
    together = mixed.linear(SITE, x, x, weight, None)
    assert torch.equal(alone.linear(SITE, x[2:], x[2:], weight, None), together[2:])


def test_scratch_is_one_matrix_for_each_shape(kernels: FusedKernels) -> None:
    scratch = Scratch(kernels, [(8, 4), (4, 8), (8, 4)], torch.bfloat16)
    assert scratch.nbytes == 2 * 2 * 32
    assert not scratch.takes(bundle_of(kernels).plans[SITE], 1000), "nothing to add"


def test_masks_of_wide_groups_and_long_rows(kernels: FusedKernels) -> None:
    """Entries whose group begins tiles before the column, and groups within a tile."""
    make = Maker(3, 130)
    for group, keep in ((100, 9), (70, 1), (5, 2)):
        term: Coded = make.coded(3, 130, 4, mask=SeededMask(group, 5, 9, keep=keep))
        found = written(kernels, bundle_of(kernels, (term, 1.0)), torch.zeros(3, 130))
        assert relative_rms(found, term.decode()) < FUSED_RELATIVE_RMS["exact"]


def test_thresholds_are_timed(kernels: FusedKernels) -> None:
    scratch = Scratch(kernels, [(8, 40), (64, 64)], torch.float32)
    scratch.warm_up()
    scratch.thresholds = calibrated(scratch, tokens=2)
    assert set(scratch.thresholds) == set(KINDS)
    assert all(rows > 0 for rows in scratch.thresholds.values())
