"""Which library is loaded, its threads, and the processes around it."""

from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deltaserve_kernels.native import library as native
from deltaserve_kernels.native.library import NEEDS, Library, NativeUnavailable, available, load
from deltaserve_kernels.native.parts import Part, part_of
from deltaserve_kernels.native.site import apply_part

from ..forms import activations, forms


def part(name: str) -> Part:
    made = part_of(forms(200, 97)[name])
    assert made is not None
    return made


@pytest.fixture
def fresh() -> None:
    """What earlier tests loaded is loaded again."""
    load.cache_clear()


def test_the_best_comes_first() -> None:
    found = available()
    if not found:
        pytest.skip("no native library was built for this processor")
    assert list(found) == [name for name in NEEDS if name in found]
    assert load().instruction_set in found
    assert load(found[-1]).instruction_set == found[-1]


@pytest.mark.usefixtures("fresh")
def test_what_was_not_built_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert available() == ()
    with pytest.raises(NativeUnavailable, match="no native kernels were built for this processor"):
        load()
    with pytest.raises(NativeUnavailable, match="no native kernels for avx2 here; there are: none"):
        load("avx2")


@pytest.mark.usefixtures("fresh")
def test_what_the_processor_lacks_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NEEDS:
        (tmp_path / f"lib{name}.so").touch()
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "processor_flags", lambda: frozenset({"avx2", "fma"}))
    assert available() == ("avx2",)
    with pytest.raises(NativeUnavailable, match="no native kernels for amx here; there are: avx2"):
        load("amx")


@pytest.mark.usefixtures("fresh")
def test_an_unknown_instruction_set_is_refused() -> None:
    known = ", ".join(available()) or "none"
    with pytest.raises(NativeUnavailable, match=re.escape(f"no native kernels for neon here; there are: {known}")):
        load("neon")


@pytest.mark.skipif(not available(), reason="no library was built")
@pytest.mark.usefixtures("fresh")
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaserve_kernels.native.library.LAYOUT", 0)
    with pytest.raises(RuntimeError, match=r"built from other sources: python kernels/build_native\.py"):
        load()


@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 5, 1000])
def test_any_number_of_threads_may_be_asked_for(library: Library, threads: int) -> None:
    """Fewer than one is one; each change takes effect at the next call."""
    x = activations(3, 97)
    expected = apply_part(library, x, part("odd-4"))
    for count in (min(threads, 8), 2, 1):
        library.set_threads(count)
        assert torch.equal(apply_part(library, x, part("odd-4")), expected)


def test_more_threads_than_cores_lose_no_piece(library: Library) -> None:
    """Threads that sleep, that come late and that another job has overtaken."""
    x, made = activations(3, 97), part("odd-4")
    expected = apply_part(library, x, made)
    library.set_threads(4 * (os.cpu_count() or 1))
    assert all(torch.equal(apply_part(library, x, made), expected) for _ in range(500))


def test_callers_at_once_do_not_meet(library: Library) -> None:
    """One has the pool, the others work alone; buffers belong to their threads."""
    names = ["odd-4", "book", "mask-1-of-8", "factors-sparse", "rotated-patches-32", "gaussian-4-8"]
    expected = {name: apply_part(library, activations(17, 97), part(name)) for name in names}
    library.set_threads(2)

    def call(index: int) -> bool:
        name = names[index % len(names)]
        return torch.equal(apply_part(library, activations(17, 97), part(name)), expected[name])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(120)))


def work(name: str) -> None:
    """In a child: as many threads as its parent had, none of which it has."""
    library = load(name)
    x = activations(17, 97)
    first = apply_part(library, x, part("odd-4"))
    library.set_threads(1)
    raise SystemExit(0 if torch.equal(apply_part(library, x, part("odd-4")), first) else 1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("parents", [1, 2])
def test_a_forked_child_has_a_pool_of_its_own(library: Library, parents: int) -> None:
    library.set_threads(parents)
    x = activations(17, 97)
    expected = apply_part(library, x, part("odd-4"))
    child = multiprocessing.get_context("fork").Process(target=work, args=(library.instruction_set,))
    child.start()
    child.join(20)
    try:
        assert child.exitcode == 0
        assert torch.equal(apply_part(library, x, part("odd-4")), expected)
    finally:
        child.kill()
