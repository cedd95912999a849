"""The process that compresses what tenants uploaded: one order (`deltas.order`) on stdin, lines of JSON on stdout.

It takes what the server leaves: cores only while nobody else wants them (SCHED_IDLE), and it is the first that the
kernel ends when memory runs out. It ends when its stdin does, so with the server, however that ended. Uploads are
parsed here and not in the server: what they can break is this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
import time
import traceback
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from deltaserve.deltas.order import Order
from deltaserve.errors import DeltaServeError

if TYPE_CHECKING:
    from deltaserve.evaluation.recipes import Made

MEASURING = 0.25  # of the work, where there is a phase before layers are coded
TELL_EVERY_S = 0.5
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "failed to map segment")  # of torch, and of C's


class Teller:
    """Lines to the server, and progress as one fraction that only grows. `rounds`: layers may be coded several times,
    to meet a size; each round is told as half of what is left."""

    def __init__(self, out: TextIO, *, rounds: bool) -> None:
        self._out = out
        self._share = 0.5 if rounds else 1.0
        self._begun = self._told = time.monotonic()
        self._phase: tuple[int, int] = (0, 0)  # steps done, steps in all
        self._floor = self._fraction = 0.0

    def tell(self, **line: Any) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def progress(self, name: str, done: int, total: int) -> None:
        """`deltas.compress.Progress`."""
        if total == 1 and not name:
            return
        before, now = self._phase, time.monotonic()
        is_new = total != before[1] or done < before[0]
        if is_new:
            self._floor = max(self._fraction, MEASURING if before[1] else 0.0)
            self._begun = now
            self.tell(log="info", message=name if total == 1 else f"coding {total} tensors")
        self._phase = done, total
        self._fraction = self._floor + (1 - self._floor) * self._share * (done / total if total > 1 else 0)
        if is_new or now - self._told >= TELL_EVERY_S:
            self._told = now
            left = (now - self._begun) / done * (total - done) if done else None
            fraction = round(self._fraction, 4)
            self.tell(step=name, fraction=fraction, seconds_left=None if left is None else round(left))


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no line for the server
    order = Order.parse(sys.stdin.readline())
    _step_back(order)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    teller = Teller(out, rounds=order.recipe.get("codec") in (None, "auto"))
    teller.tell(step="starting", fraction=0.0, seconds_left=None)
    try:
        teller.tell(report=_work(order, teller))
    except DeltaServeError as error:
        teller.tell(error={"code": error.code, "message": _without_paths(order, error.message)})
    except Exception as error:
        traceback.print_exc()
        if _is_out_of_memory(error):
            limit = f"{order.memory_bytes} bytes of memory" if order.memory_bytes else "the memory there is"
            teller.tell(error={"code": "out_of_memory", "message": f"the job needs more than {limit}"})
        elif isinstance(error, ValueError):  # JSON, UTF-8, a tokenizer: whatever parses files
            message = f"a file of the checkpoint cannot be read: {_without_paths(order, str(error))}"
            teller.tell(error={"code": "invalid_checkpoint", "message": message})
        else:
            message = f"compression failed with {type(error).__name__}; the server's log has the reason"
            teller.tell(error={"code": "internal_error", "message": message})


def _step_back(order: Order) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not everywhere, and a container may forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if order.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (order.memory_bytes, order.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


def _work(order: Order, teller: Teller) -> dict[str, Any]:
    began = time.monotonic()
    import torch

    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.recipe import Recipe
    from deltaserve.evaluation.recipes import make
    from deltaserve.evaluation.rows import load_rows

    torch.set_num_threads(order.threads)
    base = Checkpoint.of_files(Path(order.base_directory), order.base_name, [Path(file) for file in order.base_files])
    rows = load_rows(Path(order.rows)) if order.rows else []
    recipe = Recipe(**order.recipe)
    made = make(recipe, base, order.checkpoint, Path(order.out), rows=rows, progress=teller.progress)
    return _report(made, time.monotonic() - began)


def _report(made: Made, seconds: float) -> dict[str, Any]:
    from deltaserve.evaluation.making import peak_bytes

    artifact = made.artifact
    errors = [layer.error for layer in artifact.manifest.layers.values() if layer.error]
    return {
        "codec": artifact.manifest.codec,
        "bits_per_parameter": round(artifact.bits_per_parameter, 6),
        "bytes": artifact.file.num_bytes,
        "full_bytes": made.full_bytes,
        "layers": len(artifact.manifest.layers),
        "mean_relative_error": round(fmean(error.relative for error in errors), 6) if errors else None,
        "tried": [{**vars(step), "bits": round(step.bits, 6)} for step in made.tried],
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_bytes(),
    }


def _without_paths(order: Order, message: str) -> str:
    """Where the server keeps its files is nobody's business."""
    checkpoint = Path(order.checkpoint)
    for path, name in ((f"{checkpoint}/", ""), (str(checkpoint), checkpoint.name), (f"{order.base_directory}/", "")):
        message = message.replace(path, name)
    return message.replace(order.base_directory, order.base_name)


if __name__ == "__main__":
    main()
