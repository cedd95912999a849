"""The composition root: settings → services → application. The one place that knows every part."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import torch
import transformers
from fastapi import FastAPI

from deltaserve import __version__
from deltaserve.api import (
    admin,
    chat,
    completions,
    compressions,
    deltas,
    errors,
    files,
    health,
    loras,
    models,
    uploads,
    usage,
)
from deltaserve.api.deps import Services, needs
from deltaserve.api.metering import ResidencyMeter
from deltaserve.api.middleware import OPEN_PATHS, Authenticate, Identify
from deltaserve.api.openapi import document
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compressions import Compressions
from deltaserve.deltas.import_bucket import open_imports
from deltaserve.deltas.intake import Intake, upload_pool
from deltaserve.deltas.job_runner import Bounds, JobRunner
from deltaserve.deltas.limits import Limits
from deltaserve.deltas.manifest import Manifest
from deltaserve.deltas.parts import PartStore
from deltaserve.deltas.places import open_places
from deltaserve.deltas.residency import Residency
from deltaserve.deltas.sightings import Sightings
from deltaserve.deltas.staging import Staging
from deltaserve.deltas.store import DeltaStore
from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.grammars import Grammars
from deltaserve.engine.loop import Engine
from deltaserve.engine.runner import Runner
from deltaserve.engine.scheduler import Chunk, Scheduler
from deltaserve.engine.templates import TemplateRenderer
from deltaserve.engine.text import Sink, TextSide
from deltaserve.engine.types import Request as EngineRequest
from deltaserve.engine.types import SamplingParams
from deltaserve.errors import BadRequest, CheckpointError
from deltaserve.gauges import read_gauges
from deltaserve.ids import DeltaDigest, RequestId
from deltaserve.metrics import Metrics
from deltaserve.model.load import load_model
from deltaserve.model.recording import GraphLimits
from deltaserve.model.served import ServedModel
from deltaserve.settings import Settings
from deltaserve.tenants.accounts import Accounts, Scope
from deltaserve.tenants.jobs import Jobs
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.limits import Gate
from deltaserve.tenants.usage import Usage

logger = logging.getLogger(__name__)
MAX_THREADS = 512  # most of them asleep, waiting for disks, templates and tokenizers
FEW_CORES = max((os.cpu_count() or 1) // 4, 1)  # for uploads and jobs: serving needs the others
LONGEST_DEFAULT = 8192  # tokens of max_model_len where the settings do not say
STEP_TOKENS = {"cuda": 1024, "cpu": 256}  # of max_num_batched_tokens where the settings do not say
SWEEP_S = 60.0
METER_S = 5.0


def build_services(settings: Settings) -> Services:
    """Loads the base and puts every part in place; the engine runs. Raises CheckpointError, BadRequest."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    imports = open_imports(settings.import_root)
    registry, files = open_places(settings.store, settings.registry, settings.store_cache, settings.store_cache_bytes)
    accounts = Accounts(registry)
    keys = Keys(registry, accounts, settings.api_key)
    if keys.is_open and not settings.is_loopback:
        raise BadRequest(
            f"--host {settings.host} can be reached from other machines, and there is no key: give --api-key KEY "
            "(DELTASERVE_API_KEY), or listen on 127.0.0.1"
        )
    if keys.is_open:
        logger.warning("there is no key: all of this machine are admins; listening on %s alone", settings.host)
    device = _device(settings.device)
    base = Checkpoint.open(settings.base)
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    kv_tokens = settings.kv_cache_tokens or _default_kv_tokens(base, device)
    num_blocks = max(kv_tokens // settings.block_size, 1)
    model = load_model(
        base,
        device=device,
        dtype=dtype,
        kv_slots=num_blocks * settings.block_size,
        block_size=settings.block_size,
        kernels=settings.kernels,
        quantization=settings.quantization,
        materialize_tokens=settings.materialize_tokens,
        graphs=_graph_limits(settings),
    )
    max_model_len = _max_model_len(settings, model, num_blocks * settings.block_size)
    metrics = Metrics(settings.served_model_name or base.name)
    parts: dict[str, Engine] = {}
    residency = Residency(
        lambda digest: store.reading(digest),
        device,
        Limits(
            settings.max_deltas,
            settings.max_cpu_deltas,
            settings.max_delta_bytes,
            settings.max_cpu_delta_bytes,
            settings.delta_quantum_s,
            settings.max_delta_wait_s,
        ),
        load=model.load_delta,
        on_ready=lambda: parts["engine"].wake(),
        on_loaded=lambda tier, seconds: metrics.delta_load_seconds.labels(metrics.model_name, tier).observe(seconds),
    )
    sightings = Sightings(residency)

    def forget(digest: DeltaDigest) -> None:
        residency.discard([digest])
        sightings.forget(digest)

    store = DeltaStore(
        registry,
        files,
        keep_versions=settings.keep_versions,
        on_removed=forget,
    )
    text = TextSide(
        base,
        model.vocab_size,
        max_model_len,
        TemplateRenderer(),
        lambda digest: _manifest(store, digest),
    )

    grammars = Grammars()
    grammars.warm_up(text.base_profile.tokenizer)

    def check_template(artifact: Artifact) -> None:
        if artifact.manifest.chat_template is not None:
            text.check_template(artifact.manifest.chat_template)

    intake = Intake(store, base, [model.check_servable, check_template], settings.max_upload_bytes)
    gate = Gate()
    store.delete_expired()
    staging = Staging(registry, store, expires_s=settings.upload_expires_s)
    parted = PartStore(
        registry, accounts, store, intake.accept, gate, stage=staging.keep, expires_s=settings.upload_expires_s
    )
    jobs = Jobs(registry)
    threads = settings.job_threads or FEW_CORES
    bounds = Bounds(settings.jobs, threads, settings.job_memory_bytes, settings.job_timeout_s)
    job_runner = JobRunner(jobs, accounts, staging, intake, base, bounds, on_published=lambda: services.keep_pinned())
    runner = Runner(model, residency.slots, settings.block_size)
    blocks = BlockPool(num_blocks, settings.block_size, os.urandom(32) if settings.prefix_caching else None)
    _warm_up(runner, model, text, blocks)
    scheduler = Scheduler(
        blocks,
        residency,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens or STEP_TOKENS[device.type],
        max_num_seqs_per_tenant=settings.max_num_seqs_per_tenant,
        max_num_batched_tokens_per_tenant=settings.max_num_batched_tokens_per_tenant,
        weights=settings.tenant_weights,
    )
    queued_each = settings.max_num_queued_reqs_per_tenant
    engine = parts["engine"] = Engine(
        scheduler,
        runner,
        metrics,
        max_num_queued=settings.max_num_queued_reqs,
        max_num_queued_per_tenant=(settings.max_num_queued_reqs + 1) // 2 if queued_each is None else queued_each,
    )
    engine.start()
    services = Services(
        settings=settings,
        base_id=settings.served_model_name or base.name,
        base_fingerprint=base.fingerprint,
        created=int(time.time()),
        max_model_len=max_model_len,
        runtime={
            "version": __version__,
            "base": base.fingerprint,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "dtype": str(model.dtype).removeprefix("torch."),
            **model.runtime,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        engine=engine,
        text=text,
        grammars=grammars,
        registry=registry,
        accounts=accounts,
        keys=keys,
        gate=gate,
        usage=Usage(registry),
        store=store,
        intake=intake,
        parts=parted,
        staging=staging,
        compressions=Compressions(registry, jobs, staging, base, text.check_template, job_runner),
        imports=imports,
        residency=residency,
        sightings=sightings,
        metrics=metrics,
        upload_pool=upload_pool(FEW_CORES),
        unwatch=model.watch_compiles(metrics.kernel_compiled),
    )
    services.keep_pinned()
    job_runner.start(is_alone=not registry.is_shared)
    metrics.read_gauges_from(lambda: read_gauges(services, blocks, model))
    logger.info(
        "base %s (%s…) on %s as %s; context %d tokens, KV cache %d tokens; %s",
        services.base_id, base.fingerprint[:12], device, services.runtime["dtype"], max_model_len,
        num_blocks * settings.block_size, ", ".join(f"{what} {name}" for what, name in model.runtime.items()),
    )  # fmt: skip
    return services


def create_app(services: Services) -> FastAPI:
    """The application. Closes `services` when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        # Requests wait in threads for a template or a tokenizer; a slow tenant must not take the last one.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_THREADS))
        meter = ResidencyMeter(services)
        chores = [
            asyncio.create_task(_every(SWEEP_S, services.parts.sweep)),
            asyncio.create_task(_every(SWEEP_S, services.store.delete_expired)),
            asyncio.create_task(_every(SWEEP_S, services.compressions.sweep)),
            asyncio.create_task(_every(METER_S, meter.read)),
        ]
        if services.registry.is_shared:
            chores += [
                asyncio.create_task(_every(SWEEP_S, services.store.sweep)),
                asyncio.create_task(_every(SWEEP_S, services.keep_pinned)),  # what other servers' tenants pinned
            ]
        yield
        for chore in chores:
            chore.cancel()
        services.engine.stop()
        meter.read()
        await asyncio.sleep(0)  # the last events are heard, and billed
        close_services(services)

    app = FastAPI(title="deltaserve", version=__version__, lifespan=lifespan)
    app.state.services = services
    app.include_router(health.open_router)
    asking, either = needs(Scope.INFERENCE), needs(Scope.INFERENCE, Scope.MANAGE)
    for router, dependencies in (
        (completions.router, asking),
        (chat.router, asking),
        (models.router, either),
        (deltas.router, either),
        (models.changing, needs(Scope.MANAGE)),
        (deltas.changing, needs(Scope.MANAGE)),
        (uploads.router, needs(Scope.MANAGE)),
        (files.router, needs(Scope.MANAGE)),
        (compressions.router, needs(Scope.MANAGE)),
        (loras.router, needs()),
        (health.metrics_router, needs(Scope.METRICS)),
        (health.router, needs(*Scope)),
        (usage.router, either),
        (admin.router, needs()),
    ):
        app.include_router(router, dependencies=dependencies)
    errors.install(app)
    document(app, OPEN_PATHS)

    app.add_middleware(Authenticate, keys=services.keys, gate=services.gate)
    app.add_middleware(Identify, metrics=services.metrics, patience_s=services.settings.client_timeout_s)
    return app


def close_services(services: Services) -> None:
    """Ends what runs, and every thread and process of `services`."""
    services.engine.stop()
    services.unwatch()
    services.upload_pool.shutdown()
    services.compressions.close()
    services.residency.close()
    services.text.close()
    services.grammars.close()
    services.usage.close()
    services.registry.close()
    services.store.files.close()


async def _every(seconds: float, chore: Callable[[], None]) -> None:
    """What nobody asks for: expired things go, what lies on the device is billed."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(chore)
        except Exception:  # a full disk, perhaps: the next round tries again
            logger.exception("a chore failed")


def _manifest(store: DeltaStore, digest: DeltaDigest) -> Manifest:
    with store.reading(digest) as path:
        return Artifact.open(path).manifest


def _graph_limits(settings: Settings) -> GraphLimits | None:
    if settings.cuda_graphs == "off":
        return None
    positions = settings.max_model_len or LONGEST_DEFAULT
    return GraphLimits(settings.max_num_seqs, settings.max_deltas, positions, required=settings.cuda_graphs == "on")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadRequest("--device cuda: torch finds no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _default_kv_tokens(base: Checkpoint, device: torch.device) -> int:
    """A quarter of the memory that is free now, by the base's shape, 65536 tokens at most."""
    config = base.config
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 1
    size = config.get("head_dim") or config.get("hidden_size", 64) // (config.get("num_attention_heads") or 1)
    per_token = 2 * heads * size * config.get("num_hidden_layers", 1) * 4
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return int(max(min(free // 4 // per_token, 65536), 1024))


def _max_model_len(settings: Settings, model: ServedModel, kv_tokens: int) -> int:
    asked = settings.max_model_len
    if asked is not None and asked > model.max_positions:
        raise BadRequest(f"--max-model-len {asked}: the base has {model.max_positions} positions")
    if asked is not None and asked > kv_tokens:
        raise BadRequest(f"--max-model-len {asked}: the KV cache has room for {kv_tokens} tokens (--kv-cache-tokens)")
    return asked or min(model.max_positions, LONGEST_DEFAULT, kv_tokens)


def _warm_up(runner: Runner, model: ServedModel, text: TextSide, blocks: BlockPool) -> None:
    """One prompt and one decode step: what the model cannot do fails here and not at the first request. A layer that
    keeps its state elsewhere than in the paged KV cache (recurrent, convolutional) would mix requests."""
    ids = [0, 0, 0]
    params = SamplingParams(max_tokens=1)
    request = EngineRequest(
        id=RequestId("warm-up"),
        digest=None,
        prompt_ids=ids,
        params=params,
        eos_ids=frozenset(),
        vocab_size=1,
        sink=Sink(text.base_profile, ids, params),
        emit=lambda event: None,
    )
    blocks.try_grow(request, len(ids))
    try:
        for chunk in (Chunk(request, 0, 2), Chunk(request, 2, 1)):
            runner.run([chunk])
    except Exception as error:
        raise CheckpointError(f"this architecture cannot be served: {type(error).__name__}: {error}") from error
    else:
        if (paged := model.num_paged_layers) != model.num_layers:
            raise CheckpointError(
                f"this architecture cannot be served: {paged} of its {model.num_layers} layers keep their state in the "
                "paged KV cache"
            )
    finally:
        blocks.release(request)
        runner.generators.forget(request)
