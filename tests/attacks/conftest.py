"""Targets of attacks by file."""

from __future__ import annotations

import pytest

from .target import Target


@pytest.fixture(scope="session", params=["bitdelta", "dare", "delta-svd", "every-kind", "every-kind packed"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    codec, _, packed = request.param.partition(" ")
    return Target(tmp_path_factory.mktemp("target"), codec, packed=bool(packed))


@pytest.fixture(scope="session")
def one_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("target"), "dare")


@pytest.fixture(scope="session")
def packed_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("target"), "every-kind", packed=True)
