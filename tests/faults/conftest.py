"""A whole server in this process, over real HTTP: faults can be put into its parts, and its memory be counted."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from deltaserve import cli
from deltaserve.api.generation import Generation
from deltaserve.app import build_services, create_app
from deltaserve.engine.grammars import MatcherGuide
from deltaserve.engine.types import Request
from deltaserve.settings import Settings
from deltaserve.tenants.accounts import Caller
from deltaserve_kernels.native.library import available

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deltaserve.ids import DeltaDigest

WAIT_S = 15.0
POLL_S = 0.01
HELD = (Request, Generation, MatcherGuide)


def wait_until(happens: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline_s, what
        time.sleep(POLL_S)


class Site:
    """The server, its services, and a client that knows what an idle server holds: nothing."""

    def __init__(self, settings: Settings) -> None:
        self.services = build_services(settings)
        config = uvicorn.Config(create_app(self.services), port=0, log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started, "the server starts")
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S)

    @property
    def num_live(self) -> int:
        return self.services.engine.num_running + self.services.engine.num_waiting

    def upload(self, name: str, artifact: bytes) -> None:
        assert self.http.put(f"/v1/deltas/{name}", content=artifact).status_code == 201

    def path(self, name: str) -> Path:
        """The file that a name points to."""
        with self.services.store.reading(self.digest(name)) as path:
            return path

    def digest(self, name: str) -> DeltaDigest:
        caller = Caller(self.services.accounts.default, "-", frozenset())
        return self.services.store.models.find(caller, name)[0].active.digest

    def ask(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": "Many fine-tunes", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        return self.http.post("/v1/completions", json={**body, **fields})

    def text(self, model: str, **fields: Any) -> str:
        return str(self.ask(model, **fields).raise_for_status().json()["choices"][0]["text"])

    def error(self, model: str, **fields: Any) -> tuple[int, str]:
        reply = self.ask(model, **fields)
        return reply.status_code, reply.json()["error"]["code"]

    def at_once(self, *calls: Callable[[], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(calls)) as pool:
            return [done.result(WAIT_S) for done in [pool.submit(call) for call in calls]]

    def check_idle(self) -> None:
        """Blocks, pins, leases, generators and every object of a request are gone."""
        engine, store = self.services.engine, self.services.store
        wait_until(lambda: self.num_live == 0, "no request is left")
        blocks = engine._scheduler.blocks
        assert blocks.num_free == blocks.num_blocks
        assert self.services.residency.counts()["pinned"] == 0
        assert not engine._runner.generators._by_request
        wait_until(lambda: not store._leases, "leases go back")
        wait_until(lambda: not self._held(), "the objects of requests are gone")

    def _held(self) -> list[Any]:
        gc.collect()
        return [held for held in gc.get_objects() if type(held) in HELD]

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@pytest.fixture(scope="package", params=["float32", "bfloat16"], ids=["transformers", "native"])
def site(
    request: pytest.FixtureRequest, tiny_base: Path, tenants: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    if request.param == "bfloat16" and not available():
        pytest.skip("no native kernels here")
    made = Site(
        Settings(
            base=str(tiny_base),
            served_model_name="tiny",
            store=str(tmp_path_factory.mktemp("site") / "store"),
            device="cpu",
            dtype=request.param,
            kv_cache_tokens=512,
            max_num_seqs=8,
        )
    )
    for name in ("sign", "sparse", "lowrank"):
        made.upload(name, tenants[name].artifact)
    yield made
    made.close()


FILES = ("sign", "sparse", "lowrank", "chatty")
PROMPT = "Many fine-tunes"


@pytest.fixture(scope="package")
def scene(
    kills: Any,
    nursery: Any,
    tiny_base: Path,
    tenants: dict[str, Any],
    make_finetune: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """tests/support/kills.py `Scene`; nothing is wrong with a store if the doctor says so."""
    chosen = [tenants[name] for name in FILES]
    answers = {}
    for tenant in chosen:
        text, _ = tenant.greedy(tenant.encode(PROMPT), kills.MAX_TOKENS)
        answers[hashlib.sha256(tenant.artifact).hexdigest()] = (PROMPT, text)
    folder = tmp_path_factory.mktemp("kills")
    tuned = make_finetune(tiny_base, folder / "tuned", scale=0.05, seed=4)
    made = kills.Scene(
        nursery,
        tiny_base,
        folder,
        [tenant.artifact for tenant in chosen],
        answers,
        {path.name: path.read_bytes() for path in sorted(tuned.iterdir())},
        diagnose,
    )
    made.build()
    return made


def diagnose(store: Path) -> Iterator[str]:
    """What the doctor finds, but for a disk that is small on purpose."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        cli.main(["doctor", "--store", str(store), "--json"])
    for finding in json.loads(told.getvalue())["findings"]:
        if finding["check"] != "room":
            yield f"{finding['subject']}: {finding['message']}"
