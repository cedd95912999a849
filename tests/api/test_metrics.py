"""vLLM's metric names are there, and their values move with what happens."""

from __future__ import annotations

from typing import Any

import pytest

from deltaserve.metrics import MAX_DELTA_SERIES, Metrics

GAUGES = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
COUNTERS = [
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:admission_rejections_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "deltaserve:kernel_compiles_total",
]
HISTOGRAMS = [
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "deltaserve:step_seconds",
]


def test_the_names_that_dashboards_use_are_there(server: Any) -> None:
    text = server.http.get("/metrics").raise_for_status().text
    for name in [*GAUGES, *COUNTERS, *(f"{name}_count" for name in HISTOGRAMS)]:
        assert f'{name}{{model_name="tiny"}} ' in text, name
    for tier in ("disk", "host"):
        assert f'deltaserve:delta_load_seconds_count{{model_name="tiny",tier="{tier}"}} ' in text


def test_an_answer_is_counted(server: Any) -> None:
    def read() -> dict[str, float]:
        names = [*COUNTERS[:2], "vllm:request_success_total", "vllm:e2e_request_latency_seconds_count"]
        labels = {"handler": "/v1/completions", "status": "200"}
        return {name: server.metric(name) for name in names} | {"http": server.metric("http_requests_total", **labels)}

    before = read()
    body = {"model": "tiny", "prompt": [5] * 6, "max_tokens": 9, "ignore_eos": True}
    server.http.post("/v1/completions", json=body).raise_for_status()
    assert [after - old for after, old in zip(read().values(), before.values(), strict=True)] == [6, 9, 1, 1, 1]


def test_a_long_prompt_is_read_in_steps_of_256_tokens_on_a_cpu(server: Any) -> None:
    def num_steps() -> float:
        return float(server.metric("vllm:iteration_tokens_total_count"))

    before = num_steps()
    body = {"model": "tiny", "prompt": [7, 8, 9, 11] * 100, "max_tokens": 1}
    server.http.post("/v1/completions", json=body).raise_for_status()
    assert num_steps() >= before + 2  # more where another tenant was here a moment ago


def test_a_resident_delta_has_its_sizes(server: Any) -> None:
    body = {"model": "sign", "prompt": "a", "max_tokens": 1}
    server.http.post("/v1/completions", json=body).raise_for_status()
    card = server.http.get("/v1/deltas/sign").json()
    assert server.metric("deltaserve:delta_disk_bytes", delta="sign") == card["disk_bytes"]
    assert server.metric("deltaserve:delta_resident_bytes", delta="sign", state="device") > 0
    assert server.metric("deltaserve:deltas", tier="device") >= 1


@pytest.mark.parametrize("route", ["/openapi.json", "/version"])
def test_the_server_describes_itself(route: str, server: Any) -> None:
    assert server.http.get(route).raise_for_status().json()


def test_the_series_of_tenants_are_bounded() -> None:
    metrics = Metrics("tiny")
    for number in range(MAX_DELTA_SERIES + 50):
        for _ in range(2):
            metrics.used(f"tenant-{number}", "m", 1, 3, 4)
    lines = [
        line for line in metrics.render().decode().splitlines() if line.startswith("deltaserve:tenant_requests_total")
    ]
    assert len(lines) == MAX_DELTA_SERIES + 1
    assert 'deltaserve:tenant_requests_total{model="other",tenant="other"} 100.0' in lines


def test_a_kernel_that_is_compiled_while_serving_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics("tiny")
    metrics.kernel_compiled("rescale_kernel")
    assert 'deltaserve:kernel_compiles_total{model_name="tiny"} 1.0' in metrics.render().decode()
    assert [(record.levelname, "rescale_kernel" in record.message) for record in caplog.records] == [("WARNING", True)]
