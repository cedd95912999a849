"""The real server as a process: `python -m deltaserve serve …`, watched, and stopped as an operator would."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import openai

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

START_TIMEOUT_S = 120  # most of it is importing torch, on a busy machine
STOP_TIMEOUT_S = 30
POLL_S = 0.02
LISTENING = re.compile(r"running on (http://\S+:\d+)")


def wait_until(happens: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
    """The first true result of `happens`, asked again and again. Raises AssertionError when the time is up."""
    deadline_s = time.monotonic() + timeout_s
    while not (result := happens()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(POLL_S)
    return result


class ServerProcess:
    """Starts at once, on a free port; `wait_ready` before the first request. `log` holds what it printed.

    As a context: at its end the server stops as it should, and has printed no traceback.
    """

    def __init__(self, base: Path, store: Path | str, *flags: str, api_key: str | None = None) -> None:
        words = ["serve", str(base), "--port", "0", "--store", str(store), "--device", "cpu", "--dtype", "float32"]
        words += ["--num-threads", "1", "--served-model-name", "tiny", *flags]
        self.api_key = api_key
        self.store = store
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deltaserve", *words, *(["--api-key", api_key] if api_key else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.http = httpx.Client()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                assert self.stop() == 0, self.printed
                assert "Traceback" not in self.printed, self.printed
        finally:
            self.close()

    def wait_ready(self) -> ServerProcess:
        """Raises AssertionError with the log if the process dies or takes too long."""
        self.url = wait_until(self._address, f"the server listens; its log:\n{self.printed}", START_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        self.http.close()
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        wait_until(lambda: self.http.get("/health").status_code == 200, "the server is healthy")
        return self

    @property
    def printed(self) -> str:
        return "".join(self.log)

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client, without its retries. The caller closes it."""
        given = {"api_key": self.api_key or "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def upload(self, name: str, artifact: bytes, **query: str) -> httpx.Response:
        return self.http.put(f"/v1/deltas/{name}", content=artifact, params=query)

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of `name` whose labels include `labels`; 0 where there is none."""
        total = 0.0
        for line in self.http.get("/metrics").raise_for_status().text.splitlines():
            series, _, value = line.rpartition(" ")
            own, _, rest = series.partition("{")
            if own == name and all(f'{key}="{wanted}"' in rest for key, wanted in labels.items()):
                total += float(value)
        return total

    def wait_idle(self) -> None:
        def idle() -> bool:
            return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0

        wait_until(idle, "no request is left in the engine")

    def signal_stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_status(self) -> int:
        status = self.process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        return status

    def stop(self) -> int:
        """SIGTERM and the exit status; harmless when it is gone already."""
        if self.process.poll() is None:
            self.signal_stop()
        try:
            return self.exit_status()
        finally:
            self.close()

    def kill(self) -> None:
        self.process.kill()
        self.exit_status()
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.exit_status()
        self.http.close()
        assert self.process.stdout
        self.process.stdout.close()

    def _address(self) -> str | None:
        if self.process.poll() is not None:
            self._reader.join(STOP_TIMEOUT_S)
            raise AssertionError(f"the server ended with status {self.process.returncode}:\n{self.printed}")
        found = LISTENING.search(self.printed)
        return found.group(1) if found else None

    def _read_log(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.log.append(line)
