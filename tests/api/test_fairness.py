"""A tenant that sends too much is refused alone, and does not keep another one's answer waiting."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

FLAGS = ["--max-num-seqs", "2", "--max-num-queued-reqs", "8", "--max-num-queued-reqs-per-tenant", "3"]
LONG = {"model": "tiny", "prompt": "Many", "max_tokens": 400, "extra_body": {"ignore_eos": True}}


def test_a_flood_of_one_is_refused_and_another_is_answered_before_it(
    start_server: Callable[..., Any], tenants: dict[str, Any], process: Any
) -> None:
    server = start_server(*FLAGS)
    assert server.upload("sign", tenants["sign"].artifact).status_code == 201
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        running = client.completions.create(stream=True, n=2, **LONG)
        next(iter(running))
        waiting = pool.submit(lambda: client.completions.create(n=3, **LONG))
        process.wait_until(lambda: server.metric("vllm:num_requests_waiting") == 3, "the flood waits")
        with pytest.raises(openai.RateLimitError, match="at most 3 of one tenant may"):
            client.completions.create(**LONG)

        answer = client.completions.create(model="sign", prompt="Many", max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1
        assert server.metric("vllm:num_preemptions_total") == 1, "both seats were taken"
        assert server.metric("vllm:num_requests_waiting") >= 3
        running.close()
        assert waiting.result(60).usage.completion_tokens == 1200
    server.wait_idle()


def test_a_weight_that_is_none_is_refused_at_the_start(process: Any, tiny_base: Any, tmp_path: Any) -> None:
    server = process.ServerProcess(tiny_base, tmp_path / "store", "--tenant-weights", "sign=-1")
    assert server.exit_status() == 2
    server.close()
    assert "tenant_weights" in server.printed
    assert "a weight is a number over 0" in server.printed
