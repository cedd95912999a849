"""The native library, once for each instruction set that there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deltaserve_kernels.native.library import NEEDS, Library, available, load


@pytest.fixture(params=list(NEEDS))
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """With one thread, before and after."""
    name = request.param
    if name not in available():
        pytest.skip(f"{name}: not built, or not an instruction set of this processor")
    library = load(name)
    library.set_threads(1)
    yield library
    library.set_threads(1)
