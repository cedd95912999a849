"""An engine for a benchmark: a store of its own, with artifacts under names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaserve.api.deps import Services
from deltaserve.app import build_services, close_services
from deltaserve.settings import Settings


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


def register(services: Services, name: str, artifact: bytes) -> None:
    """As an upload does."""
    upload = services.intake.begin()
    try:
        upload.write(artifact)
        services.intake.accept(name, upload, None)
    finally:
        upload.close()
