"""kill -9 under uploads and load, again and again on one store: is anything lost that was acknowledged?

Each round starts the real server on the same store, uploads versions under several names and keeps requests running,
kills the process at a random moment, and starts again. Checked after each restart: every acknowledged upload is served
with the bytes that were acknowledged; nothing is half-stored; no client was left hanging; what is listed answers.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.demo import server_url

import common

NAMES = 4
CLIENT_TIMEOUT_S = 60


class Round:
    """Clients against one life of the server."""

    def __init__(self, url: str, files: list[bytes], rng: random.Random) -> None:
        self._url = url
        self._files = files
        self._rng = rng
        self.acknowledged: dict[str, tuple[int, str]] = {}
        self.attempted: dict[str, set[str]] = {}
        self.answered = 0
        self.broken = 0
        self._stop = threading.Event()

    def run(self, process: subprocess.Popen[bytes], seconds: float) -> int:
        """Kills the process after `seconds`; → clients that were still hanging a minute later."""
        threads = [threading.Thread(target=self._upload, args=(i,), daemon=True) for i in range(NAMES)]
        threads += [threading.Thread(target=self._ask, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self._stop.set()
        for thread in threads:
            thread.join(CLIENT_TIMEOUT_S)
        return sum(thread.is_alive() for thread in threads)

    def _upload(self, index: int) -> None:
        name = f"delta-{index}"
        rng = random.Random(self._rng.random() + index)
        with httpx.Client(timeout=CLIENT_TIMEOUT_S) as client:
            while not self._stop.is_set():
                body = rng.choice(self._files)
                try:
                    reply = client.put(f"{self._url}/v1/deltas/{name}", content=body)
                except httpx.HTTPError:
                    self.broken += 1
                    return
                if reply.status_code in (200, 201):
                    fields = reply.json()
                    self.acknowledged[name] = (fields["version"], fields["sha256"])

    def _ask(self) -> None:
        with httpx.Client(timeout=CLIENT_TIMEOUT_S) as client:
            while not self._stop.is_set():
                body = {
                    "model": random.choice([common.BASE_NAME, *self.acknowledged]),
                    "prompt": "1 2 3",
                    "max_tokens": 8,
                }
                try:
                    self.answered += client.post(f"{self._url}/v1/completions", json=body).status_code == 200
                except httpx.HTTPError:
                    self.broken += 1
                    return


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    base = common.open_base(args)
    files = [(common.SAMPLES / f"{tenant}.safetensors").read_bytes() for tenant in common.TENANTS]
    rng = random.Random(0)
    totals: dict[str, Any] = {"rounds": args.rounds, "acknowledged": 0, "answered": 0, "connections_broken": 0}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        known: dict[str, tuple[int, str]] = {}
        for number in range(args.rounds + 1):
            process, url = _start(base.directory, store, Path(directory) / f"{number}.log")
            problems += _check(url, store, known)
            if number == args.rounds:
                process.terminate()
                problems += [f"exit status {process.returncode}"] if process.wait(60) else []
                break
            clients = Round(url, files, rng)
            hanging = clients.run(process, rng.uniform(0.5, 12.0))
            problems += [f"round {number}: {hanging} clients hang"] if hanging else []
            known |= clients.acknowledged
            totals["acknowledged"] += len(clients.acknowledged)
            totals["answered"] += clients.answered
            totals["connections_broken"] += clients.broken
    common.report(args, {**totals, "problems": problems})
    return 1 if problems else 0


def _start(base: Path, store: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "deltaserve", "serve", str(base), "--port", "0", "--store", str(store)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--served-model-name", common.BASE_NAME], stdout=output, stderr=subprocess.STDOUT
        )
    return process, server_url(process, log)


def _check(url: str, store: Path, known: dict[str, tuple[int, str]]) -> list[str]:
    """An upload whose acknowledgement was cut off may be there or not; an acknowledged one may not be missing."""
    listed = {entry["id"]: entry for entry in httpx.get(f"{url}/v1/deltas", timeout=60).json()["data"]}
    problems = []
    for name, (version, digest) in known.items():
        found = listed.get(name)
        if found is None or found["version"] < version or (found["version"] == version and found["sha256"] != digest):
            problems.append(f"{name}: version {version} {digest[:12]} was acknowledged, found {found}")
    referenced = {entry["sha256"] for entry in listed.values()}
    stored = {path.stem for path in (store / "objects").glob("*/*")}
    problems += [f"orphan object {digest[:12]}" for digest in stored - referenced]
    problems += [f"half-stored {path.name}" for path in (store / "incoming").iterdir()]
    for name in listed:
        body = {"model": name, "prompt": "1 2 3", "max_tokens": 2}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        problems += [f"{name} answers {reply.status_code}"] if reply.status_code != 200 else []
    return problems


if __name__ == "__main__":
    sys.exit(main())
