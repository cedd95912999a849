"""Every knob of the server, in one frozen object. Built by `cli`, passed down; nothing else reads the environment.

Precedence: command line, then DELTASERVE_* variables, then the defaults below. An unknown DELTASERVE_* variable is an
error: a typo must not be ignored.
"""

from __future__ import annotations

import ipaddress
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from deltaserve.errors import BadRequest

PREFIX = "DELTASERVE_"
SECRETS = ("api_key", "registry")
OTHER_VARIABLES = {"DELTASERVE_URL", "DELTASERVE_CACHE_DIR"}  # read by the client, and by cache_dir


def cache_dir() -> Path:
    """Where converted and downloaded bases are kept: DELTASERVE_CACHE_DIR, else ~/.cache/deltaserve."""
    named = os.environ.get("DELTASERVE_CACHE_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "deltaserve"


def _weights(given: Any) -> Any:
    """NAME=WEIGHT,… as a mapping. Raises ValueError for what is not over 0."""
    if not isinstance(given, str):
        return given
    pairs = [pair.partition("=") for pair in given.split(",") if pair.strip()]
    weights = {name.strip(): float(weight) for name, _, weight in pairs}
    if any(not 0 < weight < math.inf for weight in weights.values()):
        raise ValueError("a weight is a number over 0")
    return weights


def _told(error: Any) -> str:
    return "***" if error["loc"][0] in SECRETS else repr(error["input"])


class Settings(BaseSettings):
    """Settings of `deltaserve serve`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    base: str = Field(description="base model: a directory, a hub id, or a .gguf file")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 = any free one")
    store: str = Field("deltaserve-store", description="uploaded deltas: a directory, or s3://BUCKET/PREFIX")
    registry: str | None = Field(
        None,
        repr=False,
        description="who there is and what they own: postgresql://… with a store in S3 (default: a file in --store)",
    )
    store_cache: Path = Field(Path("deltaserve-cache"), description="this server's copies of what is in S3")
    store_cache_bytes: int = Field(64 * 2**30, ge=1, description="how much of that it keeps")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="type of weights and KV")
    kernels: Literal["auto", "torch", "triton", "amx", "avx512bf16", "avx512", "avx2"] = Field(
        "auto", description="what applies deltas: triton on a GPU, on a CPU in bfloat16 what was built for it, or torch"
    )
    quantization: Literal["none", "int8", "fp8", "int4"] = Field(
        "none", description="of the base's weights alone, by torchao; deltas ride on top"
    )
    materialize_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="on a GPU: tokens of one delta in a step from which W + Δ is written out for them; auto: timed at "
        "start; 0: never",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto", description="on a GPU: decode steps are recorded and replayed; on: or the server does not start"
    )
    served_model_name: str | None = Field(None, description="id of the base in requests (default: its file name)")
    api_key: str | None = Field(
        None,
        min_length=1,
        description="the first admin key; without any key the server listens on loopback only",
        repr=False,
    )
    max_num_seqs: int = Field(32, ge=1, le=4096, description="requests that run at once")
    max_num_batched_tokens: int | None = Field(
        None, ge=16, le=2**20, description="tokens of one step, prompts included (default: 1024, on a CPU 256)"
    )
    max_model_len: int | None = Field(None, ge=2, description="longest prompt + answer (default: the model's, ≤ 8192)")
    max_num_queued_reqs: int = Field(256, ge=0, description="requests that wait; beyond it 429")
    max_num_seqs_per_tenant: int | None = Field(
        None, ge=1, description="of those that run, at most this many of one tenant (default: no bound)"
    )
    max_num_batched_tokens_per_tenant: int | None = Field(
        None, ge=1, description="of one step's tokens, at most this many of one tenant (default: an even part)"
    )
    max_num_queued_reqs_per_tenant: int | None = Field(
        None, ge=0, description="of those that wait, at most this many of one tenant (default: half)"
    )
    tenant_weights: Annotated[dict[str, float], NoDecode, BeforeValidator(_weights)] = Field(
        {}, description="share of a tenant when many wait, 1 where none is named: acme=4,other=0.5"
    )
    kv_cache_tokens: int | None = Field(None, ge=16, description="tokens the KV cache holds (default: 1/4 of memory)")
    prefix_caching: bool = Field(True, description="keep the KV of prompts and answers for those that begin alike")
    block_size: int = Field(16, ge=1, le=256, description="tokens of one KV block")
    max_deltas: int = Field(32, ge=1, le=4096, description="deltas resident on the device")
    max_cpu_deltas: int = Field(128, ge=1, description="deltas kept packed in host memory")
    max_delta_bytes: int | None = Field(None, ge=1, description="bytes of deltas on the device (default: no bound)")
    max_cpu_delta_bytes: int | None = Field(None, ge=1, description="bytes of deltas in host memory")
    delta_quantum_s: float = Field(1.0, ge=0, description="seconds a delta keeps its place while others wait for one")
    max_delta_wait_s: float = Field(
        30.0, ge=0, description="seconds a delta waits for those in use to end; then they wait for it"
    )
    max_upload_bytes: int = Field(16 * 2**30, ge=1, description="largest artifact that is accepted")
    import_root: str | None = Field(
        None,
        description="where load_lora_adapter finds artifacts: a directory, or s3://BUCKET/PREFIX (default: nowhere)",
    )
    upload_expires_s: int = Field(
        86400, ge=1, le=30 * 86400, description="seconds after its last part that an upload in parts waits for the next"
    )
    jobs: int = Field(1, ge=0, le=64, description="uploaded checkpoints compressed at once; 0 = none are taken")
    job_threads: int | None = Field(None, ge=1, description="CPU threads of a job (default: a quarter of the cores)")
    job_memory_bytes: int | None = Field(
        None, ge=2**30, description="address space of a job, files it reads included (default: no bound)"
    )
    job_timeout_s: int = Field(86400, ge=1, description="seconds that a job may run")
    keep_versions: int = Field(3, ge=1, le=1000, description="versions of a model that stay, to roll back to")
    shutdown_timeout_s: int = Field(30, ge=0, description="seconds that running requests get after SIGTERM")
    keep_alive_timeout_s: int = Field(
        75, ge=1, description="seconds an idle connection stays open; longer than those of balancers and clients (60)"
    )
    client_timeout_s: int = Field(
        30, ge=1, description="seconds that a client may take for its headers, and between two pieces of its body"
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json"] = Field(
        "auto", description="how models write tool calls (auto: by their chat template)"
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the model (default: torch's)")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much is logged")

    @property
    def is_loopback(self) -> bool:
        """Does `host` keep other machines out? A name other than localhost may mean anything."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def shown(self) -> dict[str, Any]:
        """For the log: without secrets."""
        return self.model_dump(mode="json") | {name: "***" for name in SECRETS if getattr(self, name) is not None}

    @classmethod
    def build(cls, **given: Any) -> Settings:
        """Settings from the command line's values (None = not given). Raises BadRequest naming every bad value."""
        known = {f"{PREFIX}{name.upper()}" for name in cls.model_fields} | OTHER_VARIABLES
        unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
        if unknown:
            raise BadRequest(f"unknown environment variables: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            reasons = [f"{'.'.join(map(str, e['loc']))}: {_told(e)}: {e['msg']}" for e in error.errors()]
            raise BadRequest("; ".join(reasons)) from None
