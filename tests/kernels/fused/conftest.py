"""The fused kernels run on a GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels.fused.site import FusedKernels


@pytest.fixture(scope="session")
def kernels() -> FusedKernels:
    return FusedKernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture
def poison():  # type: ignore[no-untyped-def]
    """Memory that nobody has written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
