"""The triangle for every codec there is: native kernel, plain kernel and `decode` agree on what it encodes."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.native.library import Library
from deltaserve_kernels.native.parts import part_of
from deltaserve_kernels.native.site import apply_part
from deltaserve_kernels.terms import Coded, LowRank, Patches, Rotated, Term

from ...codecs.test_contract import CASES, SITE, matrix
from ...support.kinds import kinds
from ..forms import activations
from ..tolerances import NATIVE_RELATIVE_RMS, RELATIVE_RMS, relative_rms

FLOATS, SMALL = "16-bit values under a mask", "patches of 8 × 8, half a tile"
LEFT_TO_TORCH = {
    **dict.fromkeys(("dare-1-16", "dare-8-16", "dare-33-16"), FLOATS),
    **dict.fromkeys(("impart-10-False-2.0-unbiased", "impart-10-False-2.0-paper"), FLOATS),
    **dict.fromkeys((f"delta-dct-1-8-even-{estimator}" for estimator in ("unbiased", "paper")), SMALL),
    **dict.fromkeys(("delta-dct-1-8-2-0-paper", "delta-dct-1-8-2-1-0-unbiased"), SMALL),
}  # case of the contract: why
KINDS_LEFT_TO_TORCH = {
    "several": FLOATS,
    "patches": "patches of 4 × 4",
    "rotated-patches": "patches of 4 × 4",
    "rotated-codebook": "rows that are scaled before they are turned back",
}  # of `kinds`: why


@cache
def encoded(case: str) -> list[Term]:
    """Of a delta with 70 × 161 entries."""
    (found,) = (one for one in CASES if str(one) == case)
    return found.codec.encode(matrix(70, 161), SITE)


def agree(library: Library, term: Term) -> None:
    part = part_of(term)
    assert part is not None
    x = activations(17, term.cols)
    expected = x.double() @ term.decode().double().T
    assert relative_rms(apply_term(x.float(), term.serving()), expected) < 10 * RELATIVE_RMS[torch.float32]
    assert relative_rms(apply_part(library, x, part), expected) < NATIVE_RELATIVE_RMS["rounded"]


@pytest.mark.parametrize("case", sorted({str(case) for case in CASES} - set(LEFT_TO_TORCH)))
def test_what_a_codec_encodes_is_served(library: Library, case: str) -> None:
    for term in encoded(case):
        agree(library, term)


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_what_is_left_to_torch_is_known(case: str) -> None:
    """16-bit values under a mask, or patches of another size than 16 and 32."""
    left = [term for term in encoded(case) if part_of(term) is None]
    assert left
    for term in left:
        inner = term.term if isinstance(term, Rotated) else term
        factors = [inner.left, inner.right] if isinstance(inner, LowRank) else [inner]
        floats = any(isinstance(one, Coded) and one.grid == "float" and one.mask for one in factors)
        assert floats or (isinstance(inner, Patches) and inner.size == 8)


@pytest.mark.parametrize("shape", [(6, 8), (33, 65), (70, 161)], ids=str)
@pytest.mark.parametrize("name", kinds(6, 8))
def test_every_kind_of_term(library: Library, name: str, shape: tuple[int, int]) -> None:
    term = kinds(*shape)[name]
    if name in KINDS_LEFT_TO_TORCH:
        assert part_of(term) is None
    else:
        agree(library, term)
