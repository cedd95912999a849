"""What handlers need."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from deltaserve.deltas.intake import Intake
from deltaserve.deltas.residency import Residency
from deltaserve.deltas.store import DeltaStore
from deltaserve.engine.grammars import Grammars
from deltaserve.engine.loop import Engine
from deltaserve.engine.text import TextSide
from deltaserve.errors import Draining
from deltaserve.metrics import Metrics
from deltaserve.settings import Settings


@dataclass
class Services:
    """Everything behind the HTTP layer, made by app.build_services."""

    settings: Settings
    base_id: str
    base_fingerprint: str
    created: int
    max_model_len: int
    runtime: dict[str, str]  # what runs: versions, device, dtype, kernels
    engine: Engine
    text: TextSide
    grammars: Grammars
    store: DeltaStore
    intake: Intake
    residency: Residency
    metrics: Metrics
    upload_pool: ThreadPoolExecutor
    draining: bool = field(default=False)

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise Draining("the server is shutting down")


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]
