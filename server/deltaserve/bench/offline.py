"""An engine for a benchmark: a store of its own, with artifacts under names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaserve.api.deps import Services
from deltaserve.app import build_services, close_services
from deltaserve.deltas.store import Destination
from deltaserve.settings import Settings
from deltaserve.tenants.accounts import Caller


@contextmanager
def engine(base: str, artifacts: Mapping[str, Path], **settings: Any) -> Iterator[Services]:
    """Services of `deltaserve serve` with these settings, without HTTP. Raises what a start or an upload may."""
    with tempfile.TemporaryDirectory(prefix="deltaserve-bench-") as directory:
        services = build_services(Settings.build(**{"base": base, "store": directory, **settings}))
        try:
            for name, path in artifacts.items():
                register(services, name, path.read_bytes())
            yield services
        finally:
            close_services(services)


def caller(services: Services) -> Caller:
    """Whose the artifacts are."""
    return Caller(services.accounts.default, "bench", frozenset())


def register(services: Services, name: str, artifact: bytes) -> None:
    """As an upload does."""
    upload = services.intake.begin(services.intake.max_bytes)
    try:
        upload.write(artifact)
        services.intake.accept(Destination(services.accounts.default, name, "bench"), upload, None)
    finally:
        upload.close()
