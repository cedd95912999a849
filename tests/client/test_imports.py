"""The client is light: it and its commands load without the server's dependencies."""

from __future__ import annotations

import json
import os
import subprocess
import sys

HEAVY = {"torch", "transformers", "fastapi", "triton", "deltaserve_kernels"}


def top_level_modules_after(statement: str) -> set[str]:
    """In a fresh interpreter, so that what other tests imported does not count."""
    program = f"import json, sys; {statement}; json.dump(sorted({{m.split('.')[0] for m in sys.modules}}), sys.stdout)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
    return set(json.loads(done.stdout))


def test_the_client_needs_httpx_and_no_server():
    loaded = top_level_modules_after("import deltaserve_client")
    assert "httpx" in loaded
    assert not loaded & (HEAVY | {"deltaserve"})


def test_the_commands_load_without_the_servers_libraries():
    loaded = top_level_modules_after("import deltaserve.cli.remote")
    assert "deltaserve_client" in loaded
    assert not loaded & HEAVY
