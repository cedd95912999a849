"""A rig whose deltas are in a store and come and go by residency; and its tenants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaserve.codecs.budget import Budget
from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.limits import Limits
from deltaserve.deltas.residency import Residency
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.tenants.accounts import Accounts, Caller
from deltaserve.tenants.sqlite import SqliteRegistry

from .rig import CPU, Rig, make_request

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.engine.types import Request
    from deltaserve.model.load import ServedModel
    from deltaserve.tenants.models import Model, Version

PROMPT = [5, 9, 200, 31, 77, 4, 4, 120, 250, 66, 13, 87, 5, 42]
CODECS: dict[str, tuple[str, Budget, dict[str, Any]]] = {
    "sign": ("bitdelta", Budget(), {"scale": "row"}),
    "svd": ("delta-svd", Budget(rank=4), {}),
    "sparse": ("dare", Budget(), {"group": 4}),
    "grown": ("bitdelta", Budget(), {}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "sign": {"norms": True},
    "svd": {"untie": True},
    "sparse": {"norms": False, "embedding_rows": (4, 9)},
    "grown": {"added_tokens": ("<|x|>", "<|y|>"), "embedding_rows": (77,)},
}


class Town(Rig):
    """A rig whose deltas are in a store and come and go by residency."""

    def __init__(
        self,
        model: ServedModel,
        root: Path,
        max_deltas: int = 4,
        host: int = 8,
        device_bytes: int | None = None,
        quantum_s: float = 1.0,
        max_wait_s: float = 30.0,
        **options: Any,
    ) -> None:
        self.residency = Residency(
            lambda digest: self.store.reading(digest),
            CPU,
            Limits(max_deltas, host, device_bytes, quantum_s=quantum_s, max_wait_s=max_wait_s),
            load=model.load_delta,
            on_ready=lambda: self.ready.set(),
        )
        self.registry = SqliteRegistry(root)
        self.me = Caller(Accounts(self.registry).default, "-", frozenset())
        self.store = DeltaStore(
            self.registry, LocalFiles(root), on_removed=lambda digest: self.residency.discard([digest])
        )
        super().__init__(model, self.residency, self.residency.slots, **options)

    def upload(self, name: str, data: bytes) -> Version:
        upload = self.store.begin_upload(1 << 24)
        upload.write(data)
        stored = self.store.commit(Destination(self.me.tenant, name, "test"), upload, upload.finish(None), {})
        upload.close()
        return stored.version

    def path(self, name: str) -> Path:
        """The file that a name points to."""
        with self.store.reading(self.named(name).active.digest) as path:
            return path

    def named(self, name: str) -> Model:
        return self.store.models.find(self.me, name)[0]

    def ask(self, name: str | None, *, prompt: list[int] = PROMPT, max_tokens: int = 6, **params: Any) -> Request:
        digest = None if name is None else self.named(name).active.digest
        return make_request(prompt, digest, max_tokens=max_tokens, **params)

    def close(self) -> None:
        assert self.residency.counts()["pinned"] == 0
        self.residency.close()
        self.registry.close()
