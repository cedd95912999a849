"""Many tenants, many deltas: start-up, lists, names, uploads beside the disk's own rate, what uploads do to serving.

Over real HTTP, on a tiny base whose answers cost next to nothing, so that what is measured is everything around them.
`--deltas` are uploaded by `--tenants` with keys of their own; then the registry alone is filled up to `--registered`.
Small uploads are synced one by one: beside them, files of the same size, synced with their folder. Large ones are parts
of 32 MiB of random bytes: beside them, the same bytes written to one file, and synced as often.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
import common
from small_world import ServerProcess, World

ADMIN_KEY = "load-admin"
UPLOADERS = 16
PART_BYTES = 32 * 2**20
NUM_PARTS = 8
FLAGS = ("--max-deltas", "32", "--max-cpu-deltas", "128", "--kv-cache-tokens", "4096", "--max-num-seqs", "16")


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--deltas", type=int, default=1000)
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=500, help="of each kind whose latency is measured")
    parser.add_argument("--serve-s", type=float, default=30, help="seconds of serving, with and without uploads")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        figures = Load(Path(directory), args).run()
    common.report(args, figures)
    return 0


class Load:
    def __init__(self, folder: Path, args: Any) -> None:
        self.args = args
        self.folder = folder
        self.world = World(folder, 3)
        self.keys: list[str] = []

    def run(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"disk": _disk(self.folder, len(self.world.delta(0).data))}
        with self.server(figures, "empty") as server:
            figures["tenants"] = self.add_tenants(server)
            figures["small_uploads"] = self.upload_small(server)
        with self.server(figures, f"{self.args.deltas} deltas") as server:
            figures["latency"] = {f"{self.args.deltas} deltas": self.latencies(server)}
            figures["parts"] = self.upload_parts(server)
            figures["serving"] = self.serve(server)
            self.register(server)
        with self.server(figures, f"{self.args.registered} deltas") as server:
            figures["latency"][f"{self.args.registered} deltas"] = self.latencies(server)
        return figures

    @contextmanager
    def server(self, figures: dict[str, Any], what: str) -> Iterator[ServerProcess]:
        began = time.monotonic()
        with ServerProcess(self.world.base, self.folder / "store", *FLAGS, api_key=ADMIN_KEY) as server:
            server.wait_ready()
            figures.setdefault("start_s", {})[what] = round(time.monotonic() - began, 2)
            yield server

    def add_tenants(self, server: ServerProcess) -> dict[str, float]:
        began = time.monotonic()
        for number in range(self.args.tenants):
            name = f"tenant-{number}"
            server.http.post("/v1/admin/tenants", json={"name": name}).raise_for_status()
            scopes = {"tenant": name, "scopes": ["inference", "manage"]}
            self.keys.append(server.http.post("/v1/admin/keys", json=scopes).raise_for_status().json()["key"])
        return {"count": self.args.tenants, "with_a_key_each_per_s": _rate(self.args.tenants, began)}

    def upload_small(self, server: ServerProcess) -> dict[str, Any]:
        each = self.args.deltas // self.args.tenants

        def of_tenant(key: str) -> list[float]:
            with _client(server.url, key) as client:
                return [_timed(lambda n=n: self._put(client, n)) for n in range(each)]

        began = time.monotonic()
        with ThreadPoolExecutor(UPLOADERS) as pool:
            times = [seconds for own in pool.map(of_tenant, self.keys) for seconds in own]
        size = len(self.world.delta(0).data)
        return {
            "count": len(times),
            "bytes_each": size,
            "at_once": UPLOADERS,
            "per_s": _rate(len(times), began),
        } | _spread(times)

    def _put(self, client: httpx.Client, number: int) -> None:
        content = self.world.delta(number % self.world.num_kinds).data
        client.put(f"/v1/deltas/model-{number}", content=content).raise_for_status()

    def latencies(self, server: ServerProcess) -> dict[str, Any]:
        rng = random.Random(0)
        each = self.args.deltas // self.args.tenants
        clients = [_client(server.url, key) for key in self.keys]

        def measured(ask: Callable[[httpx.Client], httpx.Response], calls: int) -> dict[str, float]:
            return _spread([_timed(lambda: ask(rng.choice(clients)).raise_for_status()) for _ in range(calls)])

        calls = self.args.calls
        found = {
            "health (the floor)": measured(lambda client: client.get("/health"), calls),
            "resolve: GET /v1/models/NAME": measured(
                lambda client: client.get(f"/v1/models/model-{rng.randrange(each)}"), calls
            ),
            "resolve: completion of 1 token of the base": measured(
                lambda client: client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}),
                calls,
            ),
            "list one's own: GET /v1/models": measured(lambda client: client.get("/v1/models"), calls),
            "list all as an admin: GET /v1/models": measured(lambda _: server.http.get("/v1/models"), calls // 20),
            "metrics": measured(lambda _: server.http.get("/metrics"), calls // 20),
        }
        for client in clients:
            client.close()
        return found

    def upload_parts(self, server: ServerProcess) -> dict[str, float]:
        """MB/s of parts, one after the other and four at once."""
        parts = [os.urandom(PART_BYTES) for _ in range(NUM_PARTS)]
        found = {}
        for at_once in (1, 4):
            body = {
                "bytes": NUM_PARTS * PART_BYTES,
                "filename": "large.safetensors",
                "mime_type": "",
                "purpose": "fine-tune",
            }
            with _client(server.url, self.keys[0]) as client:
                upload = client.post("/v1/uploads", json=body).raise_for_status().json()["id"]

                def send(part: bytes, client: httpx.Client = client, upload: str = upload) -> None:
                    client.post(f"/v1/uploads/{upload}/parts", files={"data": part}).raise_for_status()

                began = time.monotonic()
                with ThreadPoolExecutor(at_once) as pool:
                    list(pool.map(send, parts))
                found[f"{at_once} at once, MB/s"] = round(NUM_PARTS * PART_BYTES / 1e6 / (time.monotonic() - began), 1)
                client.post(f"/v1/uploads/{upload}/cancel").raise_for_status()
        return found

    def serve(self, server: ServerProcess) -> dict[str, Any]:
        """Completions of 16 tokens, four at once, without and with uploads by another process."""
        found = {"without uploads": self._ask(server)}
        files = [self.world.delta(0).data for _ in range(200)]
        stop = multiprocessing.get_context("spawn").Event()
        count = multiprocessing.get_context("spawn").Value("i", 0)
        process = multiprocessing.get_context("spawn").Process(
            target=_upload_until, args=(server.url, self.keys, files, stop, count)
        )
        process.start()
        while not count.value:
            time.sleep(0.05)
        before, began = count.value, time.monotonic()
        found[f"with {UPLOADERS} uploads at once"] = self._ask(server)
        found["uploads_per_s"] = {"meanwhile": _rate(count.value - before, began)}
        stop.set()
        process.join()
        return found

    def _ask(self, server: ServerProcess) -> dict[str, float]:
        until = time.monotonic() + self.args.serve_s
        body = {"model": "tiny", "prompt": "Many fine-tunes", "max_tokens": 16, "ignore_eos": True}

        def ask(key: str) -> list[float]:
            times = []
            with _client(server.url, key) as client:
                while time.monotonic() < until:
                    times.append(_timed(lambda: client.post("/v1/completions", json=body).raise_for_status()))
            return times

        with ThreadPoolExecutor(4) as pool:
            return _spread([seconds for own in pool.map(ask, self.keys[:4]) for seconds in own])

    def register(self, server: ServerProcess) -> None:
        """Fills the registry by uploads that are all alike but for their names."""
        missing = self.args.registered - self.args.deltas // self.args.tenants * self.args.tenants
        numbers = iter(range(missing))
        lock = threading.Lock()

        def fill(key: str) -> None:
            with _client(server.url, key) as client:
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    data = self.world.delta(0, fresh=False).data
                    client.put(f"/v1/deltas/other-{number}", content=data).raise_for_status()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fill, self.keys))


def _upload_until(url: str, keys: list[str], files: list[bytes], stop: Any, count: Any) -> None:
    def upload(number: int) -> None:
        rng = random.Random(number)
        with _client(url, keys[number % len(keys)]) as client:
            while not stop.is_set():
                client.put(f"/v1/deltas/busy-{number}", content=rng.choice(files)).raise_for_status()
                with count.get_lock():
                    count.value += 1

    with ThreadPoolExecutor(UPLOADERS) as pool:
        list(pool.map(upload, range(UPLOADERS)))


def _client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)


def _disk(folder: Path, small_bytes: int) -> dict[str, float]:
    """What the same bytes cost without a server: small files with their folders, and one large file."""
    data, times = os.urandom(small_bytes), []
    began = time.monotonic()
    for number in range(100):
        times.append(_timed(lambda number=number: _write_synced(folder / f"probe-{number}", [data])))
        (folder / f"probe-{number}").unlink()
    small = _rate(100, began)
    parts = [os.urandom(PART_BYTES) for _ in range(NUM_PARTS)]
    seconds = _timed(lambda: _write_synced(folder / "probe", parts))
    (folder / "probe").unlink()
    large = round(NUM_PARTS * PART_BYTES / 1e6 / seconds, 1)
    return {"small_synced_files_per_s": small, "large_file_synced_mb_per_s": large} | _spread(times)


def _write_synced(path: Path, pieces: list[bytes]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _rate(count: int, began: float) -> float:
    return round(count / (time.monotonic() - began), 1)


def _spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    places = {"p50_ms": 0.5, "p99_ms": 0.99}
    return {
        name: round(1000 * ordered[min(int(at * len(ordered)), len(ordered) - 1)], 2) for name, at in places.items()
    }


if __name__ == "__main__":
    sys.exit(main())
