"""schemathesis on the whole OpenAPI document of the real server, with data that fits it and data that does not.

    python -m tests.attacks.fuzz_api [--seconds 900] [--rounds 1] [--json FILE]   (pip install 'deltaserve[fuzz]')

Every route, as an admin and then as a tenant with the scopes inference and manage: examples, edge cases, fuzzing, and
chains of calls that use each other's ids. Its checks: no 5xx, no reply after 10 seconds, no status and no type that the
document does not name, no route without a key. Half of the names are of models that there are (fuzz_hooks.py).
Beside them: the server's memory after each round, how many requests it counted by status, what it logged.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress

from ..support.server import ServerProcess
from ..support.tiny import make_base, make_finetune

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "fuzz-admin-key"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,ignored_auth"
PATIENCE_S = 10
WARM_UP_S = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=900, help="of fuzzing, both callers together")
    parser.add_argument("--rounds", type=int, default=1, help="of both callers, in that time: does memory grow on?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--max-model-len", "64", "--kv-cache-tokens", "4096", "--shutdown-timeout-s", "5"]
        server = ServerProcess(make_base(Path(folder) / "base"), Path(folder) / "store", *flags, api_key=KEY)
        try:
            server.wait_ready()
            server.http.post("/v1/admin/tenants", json={"name": "acme"}).raise_for_status()
            asked = {"tenant": "acme", "scopes": ["inference", "manage"]}
            tenant = server.http.post("/v1/admin/keys", json=asked).raise_for_status().json()["key"]
            for number, artifact in enumerate(_artifacts(Path(folder)), 1):
                server.upload("mine", artifact).raise_for_status()
                server.upload("acme:mine", artifact).raise_for_status()
                assert server.http.get(f"/v1/deltas/mine@{number}").is_success
            rounds: list[dict[str, Any]] = []
            ids = {key: _ids(server.url, key, Path(folder)) for key in (KEY, tenant)}
            each_s = args.seconds // (2 * args.rounds)
            both = [("tenant", tenant, each_s), ("admin", KEY, each_s)]
            for who, key, seconds in [("admin, warm-up", KEY, WARM_UP_S), *both * args.rounds]:
                status = _schemathesis(server.url, key, seconds, Path(folder), ids[key])
                rounds.append({"caller": who, "seconds": seconds, "exit": status, "rss_mb": _rss_mb(server)})
                sys.stdout.write(json.dumps(rounds[-1]) + "\n")
            figures = {"rounds": rounds, "requests": _requests(server), "exit": server.stop()}
            figures["tracebacks"] = server.printed.count("Traceback")
        finally:
            server.close()
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if figures["tracebacks"]:
        sys.stdout.write(server.printed[-20_000:])
    return int(any(done["exit"] for done in rounds) or figures["tracebacks"] or figures["exit"])


def _artifacts(folder: Path) -> Iterator[bytes]:
    base = Checkpoint.open(folder / "base")
    for seed in (1, 2):
        tuned = make_finetune(folder / "base", folder / f"tuned{seed}", scale=0.05, seed=seed)
        out = folder / f"{seed}.safetensors"
        compress(base, Checkpoint.open(tuned), make_codec("bitdelta"), out)
        yield out.read_bytes()


def _ids(url: str, key: str, folder: Path) -> dict[str, str]:
    """Of objects that the caller has: an upload, a job, a file, and those of a checkpoint for another job."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S) as http:

        def made(path: str, **what: Any) -> str:
            made_id: str = http.post(path, **what).raise_for_status().json()["id"]
            return made_id

        def sent(path: Path) -> str:
            return made("/v1/files", data={"purpose": "user_data"}, files={"file": (path.name, path.read_bytes())})

        first, second = ([sent(path) for path in sorted((folder / "tuned1").iterdir())] for _ in range(2))
        named = {"bytes": 1, "filename": "mine.safetensors", "mime_type": "", "purpose": "fine-tune"}
        return {
            "upload_id": made("/v1/uploads", json=named),
            "compression_id": made("/v1/compressions", json={"name": "made", "files": first, "codec": "bitdelta"}),
            "file_id": sent(folder / "tuned1" / "config.json"),
            "checkpoint": " ".join(second),
        }


def _schemathesis(url: str, key: str, seconds: int, folder: Path, ids: dict[str, str]) -> int:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS]
    command += ["-H", f"Authorization: Bearer {key}", "--max-response-time", str(PATIENCE_S), "--mode", "all"]
    command += ["--max-time", str(seconds), "--continue-on-failure", "--generation-database", "none"]
    command += ["--no-color", "--request-timeout", str(3 * PATIENCE_S)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.attacks.fuzz_hooks", "PYTHONPATH": paths}
    environment["FUZZ_IDS"] = json.dumps(ids)
    return subprocess.run(command, cwd=folder, env=environment).returncode


def _rss_mb(server: ServerProcess) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _requests(server: ServerProcess) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith("http_requests_total{"):
            counted[line.partition('status="')[2][:3]] += int(float(line.rpartition(" ")[2]))
    return dict(sorted(counted.items()))


if __name__ == "__main__":
    sys.exit(main())
