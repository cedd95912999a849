"""A tenant of every codec, uploaded to one server and asked at once: each answers as its restored checkpoint does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.codecs.registry import CODECS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPTS = ["Many fine-tunes of one base", "1234567890 ?! 你好"]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def made(make_tenant: Callable[..., Any]) -> dict[str, Any]:
    options = {"delta-svd": {"rank": 6}, "lora-svd": {"rank": 6}}
    return {
        name: make_tenant(name, name, options.get(name), seed=seed, prepared=True) for seed, name in enumerate(CODECS)
    }


@pytest.fixture(scope="module")
def crowded(
    process: Any, tiny_base: Path, made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    with process.ServerProcess(tiny_base, tmp_path_factory.mktemp("crowded") / "store") as running:
        running.wait_ready()
        for name, tenant in made.items():
            assert running.upload(name, tenant.artifact).status_code == 201, name
        yield running


def test_all_codecs_in_one_batch_answer_as_what_they_restore(
    made: dict[str, Any], crowded: Any, at_once: Callable[..., list[Any]]
) -> None:
    with crowded.client() as client:

        def ask(name: str, prompt: str) -> Any:
            return lambda: client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=NUM_TOKENS)

        cases = [(name, prompt) for prompt in PROMPTS for name in made]
        replies = at_once([ask(*case) for case in cases])
    answers = {case: reply.choices[0].text for case, reply in zip(cases, replies, strict=True)}
    wanted = {(name, prompt): made[name].greedy(made[name].encode(prompt), NUM_TOKENS)[0] for name, prompt in cases}
    assert answers == wanted
    assert len({answers[name, PROMPTS[0]] for name in made}) > len(made) // 2  # the tenants are not one
