"""deltaserve demo: a real base, the real server in a process of its own, three sample tenants over HTTP, one table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.demo_base import demo_base
from deltaserve.errors import CheckpointError, EngineFailure
from deltaserve_client import Client

BASE_NAME = "base"
TENANTS = ("numwords", "chain", "debsec")  # numbers in words · word problems · sections of Debian packages
SAMPLES = Path(__file__).resolve().parents[2] / "tests" / "tenants"
PROMPTS_EACH = 3
MAX_TOKENS = 40
SHOWN_CHARS = 90
START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Row:
    tenant: str
    prompt: str
    expected: str


def run_demo(*, base: str | None, tenants: Path | None, keep: bool) -> int:
    """Exit status 0 if every tenant answered. Raises CheckpointError where base or samples are missing."""
    console = Console()
    samples = tenants or SAMPLES
    rows = list(_rows(samples))
    with _progress(console) as progress:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        path = demo_base(base, progress=report)
    console.print(f"base: SmolLM2-135M-Instruct, {path}\nstarting the server …")
    with tempfile.TemporaryDirectory(prefix="deltaserve-demo-") as directory:
        checkpoint = Checkpoint.open(path)
        with running_server(checkpoint.directory, Path(directory)) as url, Client(url) as client:
            console.print(f"the server is up at {url}\n")
            for tenant in TENANTS:
                _upload(console, client, tenant, samples / f"{tenant}.safetensors")
            _ask(console, client, rows)
            _show_bytes(console, client, checkpoint.num_bytes)
            if keep:
                _show_curl(console, url, rows[0])
                _wait_for_interrupt(console)
    return 0


def _rows(samples: Path) -> Iterator[Row]:
    for tenant in TENANTS:
        file = samples / "data" / f"{tenant}.test.jsonl"
        if not file.is_file() or not (samples / f"{tenant}.safetensors").is_file():
            raise CheckpointError(
                f"{samples}: the sample tenants are not there; they are part of the repository (tests/tenants): run "
                "the demo from a clone, or name their directory with --tenants"
            )
        for line in file.read_text(encoding="utf-8").splitlines()[:PROMPTS_EACH]:
            fields = json.loads(line)
            yield Row(tenant, fields["prompt"], fields["answer"])


@contextmanager
def running_server(base: Path, directory: Path, *options: str) -> Iterator[str]:
    """The real command in a process of its own, on a free port; → its URL. Stopped by SIGTERM at the end."""
    log = directory / "server.log"
    command = [sys.executable, "-m", "deltaserve", "serve", str(base), "--port", "0"]
    command += [
        "--served-model-name",
        BASE_NAME,
        "--store",
        str(directory / "store"),
        "--max-model-len",
        "2048",
        *options,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield server_url(process, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def server_url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that the server's log names once it listens. Raises EngineFailure with the log's end if it does not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if "running on http" in line:
                return "http" + line.split(" on http", 1)[1].split(" ", 1)[0]
        time.sleep(0.1)
    raise EngineFailure("the server did not start:\n" + log.read_text(encoding="utf-8", errors="replace")[-2000:])


def _upload(console: Console, client: Client, tenant: str, file: Path) -> None:
    with _progress(console) as progress:
        task = progress.add_task(f"upload {tenant}", total=file.stat().st_size)
        client.upload(tenant, file, progress=lambda done, total: progress.update(task, completed=done, total=total))


def _ask(console: Console, client: Client, rows: list[Row]) -> None:
    """Every prompt to the base and to its tenant, all at the same time."""
    jobs = [(model, row) for row in rows for model in (BASE_NAME, row.tenant)]

    def answer(job: tuple[str, Row]) -> tuple[str, int]:
        model, row = job
        message = {"role": "user", "content": row.prompt}
        completion = client.chat(model, [message], max_tokens=MAX_TOKENS, temperature=0)
        return completion.text, completion.completion_tokens

    console.print(f"\n{len(jobs)} requests at once, for {1 + len(TENANTS)} models in one batch …")
    began = time.monotonic()
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(answer, jobs))
    seconds = time.monotonic() - began
    table = Table("tenant", "prompt", "base's answer", "tenant's answer", "expected")
    for place, row in enumerate(rows):
        theirs, ours = answers[2 * place][0], answers[2 * place + 1][0]
        style = "green" if ours.strip() == row.expected else "yellow"
        cells = (row.prompt, _short(theirs), _short(ours, style), row.expected)
        table.add_row(row.tenant, *cells, end_section=True)
    console.print(table)
    tokens = sum(count for _, count in answers)
    console.print(
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s, prompts and loading included\n"
    )


def _show_bytes(console: Console, client: Client, full_copy: int) -> None:
    table = Table("tenant", "codec", "bits/param", "on disk", "resident", "full copy", "smaller")
    for delta in client.deltas():
        raw = delta.raw
        disk, resident = int(raw["disk_bytes"]), int(raw["resident_bytes"])
        table.add_row(
            delta.id,
            str(raw["codec"]),
            f"{raw['bits_per_parameter']:.3f}",
            f"{disk / 1e6:.1f} MB",
            f"{resident / 1e6:.1f} MB",
            f"{full_copy / 1e6:.0f} MB",
            f"{full_copy / disk:.0f}×",
        )
    console.print(table)


def _show_curl(console: Console, url: str, row: Row) -> None:
    body = {"model": row.tenant, "messages": [{"role": "user", "content": row.prompt}], "temperature": 0}
    console.print("\ntry it:\n")
    for line in (
        f"curl -s {url}/v1/models",
        f"curl -s {url}/v1/deltas",
        f"curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(body)}'",
        f"curl -s {url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d '{json.dumps({**body, 'model': BASE_NAME, 'max_tokens': 40, 'stream': True})}'",
        f"curl -s {url}/metrics | grep deltaserve",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def _wait_for_interrupt(console: Console) -> None:
    console.print("\nthe server stays up; Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("stopping …")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), console=console
    )


def _short(text: str, style: str = "") -> Text:
    """One line of model output, never read as markup."""
    line = " ".join(text.split())
    return Text(line if len(line) <= SHOWN_CHARS else line[: SHOWN_CHARS - 1] + "…", style)
