"""With the prefix cache every answer is what it is without; by the native decoder to the last bit.

Tolerance: as in test_isolation.py.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve_kernels.native.library import available

from .rig import PAGE, Rig, load, make_request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltaserve.deltas.resident import ResidentDelta
    from deltaserve.engine.types import Request
    from deltaserve.model.served import ServedModel

SALT = b"salt"
PROMPT = [5, 9, 200, 31, 77, 4, 4, 120, 250, 66, 13, 87, 5, 42, 8, 91, 17, 3, 64, 2, 19] * 2
"""Longer than two blocks of either decoder."""


@pytest.fixture(scope="module", params=["transformers", "native"])
def model(tiny_base: Path, request: pytest.FixtureRequest) -> ServedModel:
    if request.param == "native" and not available():
        pytest.skip("no native kernels here")
    return load(tiny_base, kv_slots=512, dtype=torch.bfloat16 if request.param == "native" else torch.float32)


@pytest.fixture(scope="module")
def deltas(
    model: ServedModel,
    tiny_base: Path,
    make_finetune: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, ResidentDelta]:
    """Two versions of one fine-tune."""
    from deltaserve.codecs.registry import make_codec
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import compress
    from deltaserve.deltas.resident import ResidentDelta

    folder = tmp_path_factory.mktemp("versions")
    made = {}
    for seed, name in enumerate(["first", "second"]):
        tuned = make_finetune(tiny_base, folder / name, scale=0.1, seed=seed)
        codec = make_codec("bitdelta")
        artifact = compress(Checkpoint.open(tiny_base), Checkpoint.open(tuned), codec, folder / f"{name}.safetensors")
        made[name] = ResidentDelta.load(artifact, model.serve)
    return made


@pytest.fixture
def make_rig(model: ServedModel, deltas: dict[str, ResidentDelta]) -> Callable[..., Rig]:
    """All rigs of a test share one KV cache: what is to be compared runs on one after the other."""
    return lambda **options: Rig.of(model, deltas, **options)


def ask(digest: str | None = None, prompt: list[int] = PROMPT, tenant: str = "", **params: Any) -> Request:
    request = make_request(prompt, digest, **params)
    request.tenant = tenant
    return request


def same(rig: Rig, found: Request, other: Rig, wanted: Request) -> None:
    assert rig.answer(found) == other.answer(wanted)
    one, two = rig.logits(found), other.logits(wanted)
    if rig.model.runtime["decoder"] == "native":
        assert torch.equal(one, two)
    else:
        assert float((one - two).abs().max()) <= 1e-5 * float(two.abs().max())


@pytest.mark.parametrize("budget", [3, 17, 64])
@pytest.mark.parametrize("digest", [None, "first"])
def test_an_answer_from_the_cache_is_the_answer_without_it(
    make_rig: Callable[..., Rig], digest: str | None, budget: int
) -> None:
    lengths = (len(PROMPT), len(PROMPT) - 1, 2 * PAGE, 2 * PAGE + 1, PAGE, 3)
    wanted = [ask(digest, PROMPT[:length]) for length in lengths]
    plain, cached = make_rig(budget=budget), make_rig(budget=budget, salt=SALT)
    for request in wanted:
        plain.run(request)
    for length, request in zip(lengths, wanted, strict=True):
        found = ask(digest, PROMPT[:length])
        cached.run(found)
        same(cached, found, plain, request)
    assert found.num_cached == 0
    again = ask(digest)
    cached.run(again)
    assert again.num_cached == (len(PROMPT) - 1) // cached.blocks.block_size * cached.blocks.block_size


def test_a_conversation_that_goes_on_finds_its_own_answer(make_rig: Callable[..., Rig]) -> None:
    plain, cached = make_rig(), make_rig(salt=SALT)
    first, said = ask("first", max_tokens=2 * PAGE), ask("first", max_tokens=2 * PAGE)
    plain.run(first)
    longer = [*first.tokens, 7, 7, 3]
    wanted, found = ask("first", longer), ask("first", longer)
    plain.run(wanted)
    cached.run(said)
    cached.run(found)
    assert found.num_cached is not None
    assert found.num_cached >= len(PROMPT) + PAGE
    same(cached, found, plain, wanted)


def test_a_new_version_another_tenant_and_the_base_never_see_the_old_kv(make_rig: Callable[..., Rig]) -> None:
    plain, cached = make_rig(), make_rig(salt=SALT)
    cases = [("second", "acme"), (None, "acme"), ("first", "other"), ("first", "")]
    expected = [ask(digest, tenant=tenant) for digest, tenant in cases]
    for wanted in expected:
        plain.run(wanted)
    cached.run(ask("first", tenant="acme"))
    cached.poison_cache()  # whoever finds it answers NaN
    for (digest, tenant), wanted in zip(cases, expected, strict=True):
        found = ask(digest, tenant=tenant)
        cached.run(found)
        assert found.num_cached == 0
        same(cached, found, plain, wanted)
    mine = ask("first", tenant="acme")
    cached.run(mine)
    assert mine.num_cached
    assert not torch.stack(cached.runner.logits[mine.id]).isfinite().any(), "the poison was there to be found"


def test_prompt_log_probabilities_are_complete_though_the_prompt_is_cached(make_rig: Callable[..., Rig]) -> None:
    plain, cached = make_rig(), make_rig(salt=SALT)
    asked = {"prompt_logprobs": True, "logprobs": 2, "max_tokens": 1}
    wanted, found = ask("first", **asked), ask("first", **asked)
    plain.run(wanted)
    cached.run(ask("first"))
    cached.run(found)
    assert [report.token_id for report in found.prompt_reports] == PROMPT[1:]
    if cached.model.runtime["decoder"] == "native":
        assert found.prompt_reports == wanted.prompt_reports


def test_under_pressure_of_blocks_answers_are_the_same_and_nothing_is_lost(make_rig: Callable[..., Rig]) -> None:
    """Prompts that share beginnings, three tenants, few blocks: shared, evicted, preempted and found again."""
    starts = [PROMPT[:n] for n in (PAGE, PAGE + 5, 2 * PAGE + 1, len(PROMPT))]
    cases = list(itertools.product(["first", "second", None], starts, ["", "acme"]))
    plain, cached = make_rig(), make_rig(salt=SALT, num_blocks=14, budget=20)
    wanted = [ask(digest, start, tenant, max_tokens=9) for digest, start, tenant in cases]
    found = [ask(digest, start, tenant, max_tokens=9) for digest, start, tenant in cases]
    for request in wanted:
        plain.run(request)
    for _ in range(2):
        found = [ask(digest, start, tenant, max_tokens=9) for digest, start, tenant in cases]
        cached.run(*found)
        for one, two in zip(found, wanted, strict=True):
            assert cached.answer(one) == plain.answer(two)
            if cached.scheduler.num_preemptions == 0:
                same(cached, one, plain, two)
    assert sum(request.num_cached or 0 for request in found) > 0
