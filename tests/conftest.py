"""Fixtures for every test: a tiny base and a maker of real fine-tunes of it (tests/support/tiny.py)."""

from __future__ import annotations

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, whoever does so

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType


def _support(name: str) -> ModuleType:
    """tests/support/NAME.py; under --import-mode=importlib a test folder is on no path."""
    spec = importlib.util.spec_from_file_location(f"support_{name}", Path(__file__).parent / "support" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def support() -> Callable[[str], ModuleType]:
    """tests/support/NAME.py."""
    return _support


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """tests/support/postgres.py: a PostgreSQL that runs; `postgres.url(name)`. Skips where there is none."""
    running = _support("postgres").Postgres()
    yield running
    running.close()


@pytest.fixture
def postgres_url(postgres: Any) -> str:
    """An empty registry of the test's own."""
    return str(postgres.url(f"test_{os.urandom(6).hex()}"))


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """tests/support/s3.py: moto's S3, with the variables that lead to it set; `s3.url(name)`."""
    running = _support("s3").S3()
    yield running
    running.stop()


@pytest.fixture
def s3_url(s3: Any) -> str:
    """An empty store of the test's own."""
    return str(s3.url(f"test-{os.urandom(6).hex()}"))


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/support/tiny.py: `make_base`, `make_finetune`."""
    torch.set_num_threads(1)
    return _support("tiny")


@pytest.fixture(scope="session")
def tiny_base(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: 2-layer random Llama, tied, bf16, real tokenizer, chat template. Read only."""
    return Path(tiny.make_base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture(scope="session")
def untied_base(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_base`, with a head of its own and attention biases. Read only."""
    return Path(tiny.make_base(tmp_path_factory.mktemp("untied") / "base", tied=False, attention_bias=True))


@pytest.fixture(scope="session")
def make_finetune(tiny: ModuleType) -> Callable[..., Path]:
    """tiny.make_finetune(base_dir, out_dir, *, scale, seed, …)."""
    maker: Callable[..., Any] = tiny.make_finetune
    return maker


@pytest.fixture(scope="session")
def tiny_finetune(
    make_finetune: Callable[..., Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fine-tune of `tiny_base` that changes everything a delta carries but the untied head. Read only."""
    return make_finetune(
        tiny_base,
        tmp_path_factory.mktemp("tiny") / "tuned",
        scale=0.02,
        seed=1,
        embedding_rows=(3, 7),
        added_tokens=("<|tool|>", "<|end_of_turn|>"),
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end_of_turn|>{% endfor %}",
        generation={"temperature": 0.5, "top_p": 0.9, "do_sample": True},
        eos="<|end_of_turn|>",
    )


@dataclass
class Tenant:
    """One model of the server: its upload (None for the base), and the same weights in transformers."""

    name: str
    artifact: bytes | None = field(repr=False)
    directory: Path

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory)

    @cached_property
    def model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        model.generation_config = GenerationConfig()
        return model

    def logits(self, ids: Sequence[int]) -> Any:
        """float32 [len(ids), V]"""
        with torch.no_grad():
            return self.model(torch.tensor([list(ids)])).logits[0].float()

    def greedy(self, ids: Sequence[int], max_new_tokens: int) -> tuple[str, list[int]]:
        """transformers.generate: (text that the new tokens add, the new tokens)"""
        import torch
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self.tokenizer.eos_token_id, pad_token_id=0
        )
        prompt = torch.tensor([list(ids)])
        out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0].tolist()
        return self.text(ids, out[len(ids) :]), out[len(ids) :]

    def text(self, ids: Sequence[int], new: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        before, after = (
            self.tokenizer.decode(part, skip_special_tokens=skip_special_tokens) for part in (ids, [*ids, *new])
        )
        return str(after[len(before) :])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)


@pytest.fixture(scope="session")
def make_tenant(
    tiny_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Tenant]:
    """make_tenant(name, codec, options, finetuned=DIRECTORY or None, prepared=by make_delta, **of make_finetune)"""
    import torch

    from deltaserve.codecs.registry import make_codec
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import compress
    from deltaserve.deltas.prepare import make_delta
    from deltaserve.deltas.restore import restore

    def make(
        name: str,
        codec: str,
        options: Any = None,
        finetuned: Path | None = None,
        prepared: bool = False,
        **changes: Any,
    ) -> Tenant:
        folder = tmp_path_factory.mktemp(name)
        if finetuned is None:
            finetuned = make_finetune(tiny_base, folder / "tuned", **{"scale": 0.05, "seed": 1, **changes})
        base = Checkpoint.open(tiny_base)
        out = folder / "delta.safetensors"
        made = make_codec(codec, None, options)
        artifact = (make_delta if prepared else compress)(base, Checkpoint.open(finetuned), made, out, seed=7)
        restore(base, artifact, folder / "restored", dtype=torch.float32)
        return Tenant(name, out.read_bytes(), folder / "restored")

    return make


@pytest.fixture(scope="session")
def process() -> ModuleType:
    """tests/support/server.py: `ServerProcess`, `wait_until`."""
    return _support("server")


@pytest.fixture(scope="session")
def kills() -> ModuleType:
    """tests/support/kills.py: `Scene`."""
    return _support("kills")


@pytest.fixture(scope="session")
def nursery() -> Iterator[Any]:
    """tests/support/nursery.py: servers that start at once, one at a time."""
    with _support("nursery").nursery() as made:
        yield made


@pytest.fixture(scope="session")
def jobs() -> ModuleType:
    """tests/support/jobs.py: `send`, `create`, `ended`, `workers`."""
    return _support("jobs")


@pytest.fixture(scope="session")
def tenants(make_tenant: Callable[..., Tenant], tiny_base: Path, tiny_finetune: Path) -> dict[str, Tenant]:
    """The base and one tenant of each kind, by name. lowrank: generation defaults. chatty: tokens, template, eos."""
    defaults = {"top_k": 1, "do_sample": True, "max_new_tokens": 7}
    made = [
        Tenant("tiny", None, tiny_base),
        make_tenant("sign", "bitdelta", seed=1),
        make_tenant("sparse", "dare", {"group": 4}, seed=2),
        make_tenant("lowrank", "delta-svd", {"rank": 8}, seed=3, generation=defaults),
        make_tenant("chatty", "bitdelta", finetuned=tiny_finetune),
    ]
    return {tenant.name: tenant for tenant in made}


@pytest.fixture(scope="session")
def server(
    process: ModuleType, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """One server for all tests that leave it as they find it, with every tenant of `tenants` uploaded."""
    with process.ServerProcess(tiny_base, tmp_path_factory.mktemp("server") / "store") as running:
        tenants: dict[str, Tenant] = request.getfixturevalue("tenants")  # made while the server starts
        running.wait_ready()
        for tenant in tenants.values():
            if tenant.artifact is not None:
                assert running.upload(tenant.name, tenant.artifact).status_code == 201
        yield running


@pytest.fixture(scope="session")
def town(
    process: ModuleType, tiny_base: Path, tenants: dict[str, Tenant], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server with keys and two tenants: acme with `sign` as `mine`, globex with `sparse` as `mine` and `secret`."""
    with process.ServerProcess(tiny_base, tmp_path_factory.mktemp("town") / "store", api_key="first-key") as running:
        made = _support("town").Town(running.wait_ready())
        for tenant, name, artifact in (
            ("acme", "mine", "sign"),
            ("globex", "mine", "sparse"),
            ("globex", "secret", "lowrank"),
        ):
            made.upload(tenant, name, tenants[artifact].artifact)
        yield made
        made.close()
    assert not any(key in running.printed for key in made.keys), "no key is ever logged"


@pytest.fixture
def start_server(process: ModuleType, tiny_base: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """start_server(*flags, api_key=None): a process of the test's own; all of one test share one store."""
    started = []

    def start(*flags: str, api_key: str | None = None) -> Any:
        running = process.ServerProcess(tiny_base, tmp_path / "store", *flags, api_key=api_key)
        started.append(running)
        return running.wait_ready()

    yield start
    for running in started:
        running.close()


@pytest.fixture(scope="session")
def at_once() -> Callable[[Sequence[Callable[[], Any]]], list[Any]]:
    """Runs calls at the same time, each on a thread; their results in order."""

    def run(calls: Sequence[Callable[[], Any]]) -> list[Any]:
        with ThreadPoolExecutor(len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    return run


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    """The tiny base's, as transformers has it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Any]:
    """Of grammars."""
    from deltaserve.engine.grammars import Grammars

    made = Grammars()
    yield made
    made.close()
