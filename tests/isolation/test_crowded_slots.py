"""More deltas than places, in every proportion: each request is served in the end, and everything is given back."""

from __future__ import annotations

import hashlib
import random
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.limits import Limits
from deltaserve.deltas.residency import Residency
from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.scheduler import Scheduler
from deltaserve.engine.types import Row
from deltaserve.ids import DeltaDigest

from .rig import CPU, Patience, make_request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def files(
    tiny_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[DeltaDigest, Path]:
    folder = tmp_path_factory.mktemp("files")
    tuned = make_finetune(tiny_base, folder / "tuned", scale=0.02, seed=1)
    found: dict[DeltaDigest, Path] = {}
    for seed in range(6):
        path = folder / f"{seed}.safetensors"
        compress(Checkpoint.open(tiny_base), Checkpoint.open(tuned), make_codec("bitdelta"), path, seed=seed)
        found[DeltaDigest(hashlib.sha256(path.read_bytes()).hexdigest())] = path
    return found


@pytest.mark.parametrize("mixtures", [False, True], ids=["alone", "mixtures"])
@pytest.mark.parametrize("patience_s", [0.0, 0.01, 30.0])
@pytest.mark.parametrize("device", [1, 2, 4])
@pytest.mark.parametrize("host", [1, 3, 6])
def test_every_request_is_served(
    files: dict[DeltaDigest, Path], device: int, host: int, patience_s: float, mixtures: bool
) -> None:
    chance = random.Random(device * 100 + host)
    ready = threading.Event()
    limits = Limits(device, host, quantum_s=min(patience_s, 0.005), max_wait_s=patience_s)
    residency = Residency(lambda digest: nullcontext(files[digest]), CPU, limits, on_ready=ready.set)
    blocks = BlockPool(40, 4, b"salt")
    scheduler = Scheduler(blocks, residency, max_num_seqs=4, max_num_batched_tokens=64)
    requests = [
        make_request([chance.randrange(3) for _ in range(chance.randint(1, 20))], chance.choice([None, *files]))
        for _ in range(40)
    ]
    if mixtures:
        for request in chance.sample(requests, 15):
            names = [*chance.sample([*files], min(device, chance.randint(1, 3))), None]
            request.digest, request.others = names[0], tuple(Row(digest=name) for name in names[1:])
    arriving = list(requests)
    patience = Patience(ready)
    while arriving or len(scheduler):
        if arriving and chance.random() < 0.5:
            scheduler.add(arriving.pop())
        ready.clear()
        chunks, failed = scheduler.plan()
        assert not failed
        if chunks or arriving:
            patience.moved()
        else:
            patience.wait()
        for chunk in chunks:
            request = chunk.request
            for row in request.rows:
                assert (row.slot >= 0) == (row.digest is not None)
                assert row.digest is None or residency.state(row.digest) == "device"
            sampled = chunk.samples
            request.num_computed += chunk.num_tokens
            if sampled:
                request.tokens.append(7)
            if request.num_generated >= 4:
                scheduler.remove(request)
    assert all(request.num_generated == 4 for request in requests)
    assert (residency.counts()["pinned"], blocks.num_free) == (0, 40)
    residency.close()
