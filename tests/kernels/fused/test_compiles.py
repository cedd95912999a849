"""Compilations are noticed: real ones, for a GPU that need not be there, in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, threading
import sass
from triton import knobs
from deltaserve_kernels.fused.compiles import expected, watch

def make(name="rescale"):
    sass.compiled(*sass.KERNELS[name], 90)

earlier, told, other, found = [], [], [], {}
knobs.compilation.listener = lambda *, metadata, cache_hit, **rest: earlier.append((metadata["name"], cache_hit))
make()
end, end_other = watch(told.append), watch(other.append)
make("prep")
make("prep")
found["compiled, then from the cache"] = list(told)
with expected():
    make("prep")
    found["expected"] = told[2:]
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
found["of another thread meanwhile"] = told[2:]
end()
make("prep")
found["after the end"] = told[3:]
found["of who watches still"] = len(other)
found["of who listened before"] = earlier
json.dump(found, sys.stdout)
"""


def test_every_compilation_is_told_but_expected_ones(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), *sys.path]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr[-2000:]
    prep, rescale = "activation_prep_kernel", "rescale_kernel"
    assert json.loads(done.stdout) == {
        "compiled, then from the cache": [prep, prep],
        "expected": [],
        "of another thread meanwhile": [rescale],
        "after the end": [],
        "of who watches still": 4,
        "of who listened before": [
            [rescale, False],
            [prep, False],
            [prep, True],
            [prep, True],
            [rescale, True],
            [prep, True],
        ],
    }
