"""A base in bfloat16 on a CPU: /version says that it is served natively, and answers do not depend on who else asks.

Compared exactly: texts, tokens and log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve_kernels.native.library import NativeUnavailable, load

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS = ["Many fine-tunes of one base", "def serve(request):", "Zwölf Boxkämpfer jagen Viktor quer über den Deich."]
MODELS = ["tiny", "sign", "sparse", "chatty"]


@pytest.fixture
def instruction_set() -> str:
    try:
        return load().instruction_set
    except NativeUnavailable as error:
        pytest.skip(str(error))


ONE_PLACE = ["--max-deltas", "1", "--delta-quantum-s", "0.01", "--max-delta-wait-s", "0.05"]


@pytest.mark.parametrize("flags", [[], ONE_PLACE, ["--no-prefix-caching"]], ids=["", "one place", "nothing cached"])
def test_all_at_once_are_answered_like_each_alone(
    start_server: Callable[..., Any],
    tenants: dict[str, Any],
    at_once: Callable[..., list[Any]],
    instruction_set: str,
    flags: list[str],
) -> None:
    server = start_server("--dtype", "bfloat16", "--max-num-batched-tokens", "16", *flags)
    version = server.http.get("/version").json()
    assert (version["decoder"], version["kernels"], version["dtype"]) == ("native", instruction_set, "bfloat16")
    for name in MODELS[1:]:
        assert server.upload(name, tenants[name].artifact).status_code == 201

    def ask(model: str, prompt: str) -> Any:
        fields = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 3}
        return server.http.post("/v1/completions", json=fields).raise_for_status().json()["choices"]

    cases = [(model, prompt) for prompt in PROMPTS for model in MODELS]
    alone = [ask(*case) for case in cases]
    together = at_once([lambda case=case: ask(*case) for case in cases])  # type: ignore[misc]
    for case, found, wanted in zip(cases, together, alone, strict=True):
        assert (case, found) == (case, wanted)
    assert len({str(choices) for choices in alone}) == len(cases)
