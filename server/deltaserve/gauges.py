"""What /metrics reads at every scrape, and nobody counts."""

from __future__ import annotations

from collections.abc import Iterable

from deltaserve.api.deps import Services
from deltaserve.engine.blocks import BlockPool
from deltaserve.metrics import MAX_DELTA_SERIES
from deltaserve.model.served import ServedModel

Gauge = tuple[str, str, dict[str, str], float]


def read_gauges(services: Services, blocks: BlockPool, model: ServedModel) -> Iterable[Gauge]:
    shape = {"block_size": str(blocks.block_size), "num_gpu_blocks": str(blocks.num_blocks)}
    yield "vllm:cache_config_info", "shape of the KV cache", shape, 1
    yield "vllm:num_requests_running", "requests in the batch", {}, services.engine.num_running
    yield "vllm:num_requests_waiting", "requests in the queue", {}, services.engine.num_waiting
    yield "vllm:kv_cache_usage_perc", "share of KV blocks held", {}, 1 - blocks.num_free / blocks.num_blocks
    for status, count in services.compressions.jobs.counts().items():
        yield "deltaserve:jobs", "compressions that wait and run", {"status": status}, count
    for tier, count in services.residency.counts().items():
        yield "deltaserve:deltas", "deltas by tier", {"tier": tier}, count
    for tier, size in services.residency.tier_bytes().items():
        yield "deltaserve:delta_tier_bytes", "bytes of deltas by tier", {"tier": tier}, size
    yield "deltaserve:materialize_bytes", "memory for weights that are written out", {}, model.scratch_bytes
    for how, steps in model.decode_steps.items():
        yield "deltaserve:decode_steps", "decode steps since the start, by what ran them", {"by": how}, steps
    for stored in services.store.models.every(MAX_DELTA_SERIES):
        version = stored.active
        state = services.residency.state(version.digest)
        labels = {"tenant": stored.owner, "delta": stored.name, "version": str(version.number), "state": state}
        yield "deltaserve:delta_disk_bytes", "bytes of one delta's file", labels, version.summary["disk_bytes"]
        resident = services.residency.resident_bytes(version.digest) or 0
        yield "deltaserve:delta_resident_bytes", "bytes of one delta in memory, 0 on disk", labels, resident
