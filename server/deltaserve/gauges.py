"""What /metrics reads at every scrape, and nobody counts."""

from __future__ import annotations

from collections.abc import Iterable

from deltaserve.api.deps import Services
from deltaserve.engine.blocks import BlockPool
from deltaserve.metrics import MAX_DELTA_SERIES

Gauge = tuple[str, str, dict[str, str], float]


def read_gauges(services: Services, blocks: BlockPool, scratch_bytes: int) -> Iterable[Gauge]:
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
    yield "deltaserve:materialize_bytes", "memory for weights that are written out", {}, scratch_bytes
    for model in services.store.models.every(MAX_DELTA_SERIES):
        version = model.active
        state = services.residency.state(version.digest)
        labels = {"tenant": model.owner, "delta": model.name, "version": str(version.number), "state": state}
        yield "deltaserve:delta_disk_bytes", "bytes of one delta's file", labels, version.summary["disk_bytes"]
        resident = services.residency.resident_bytes(version.digest) or 0
        yield "deltaserve:delta_resident_bytes", "bytes of one delta in memory, 0 on disk", labels, resident
