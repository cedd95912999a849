"""Each fault ends in the right error for the right request, and the server holds afterwards what it held before."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve.deltas.artifact import Artifact

from .conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .conftest import Site

MIXED = {"mixture": [{"model": "sign", "weight": 1}, {"model": "sparse", "weight": 1}]}
SHAPED = {"structured_outputs": {"regex": "[a-z ]{40}"}}
KINDS: list[dict[str, Any]] = [{}, MIXED, SHAPED, {"stream": True}, {"n": 2, "temperature": 1, "seed": 1}]
IDS = ["plain", "mixture", "grammar", "stream", "choices"]


@pytest.fixture(autouse=True)
def nothing_is_left(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What pytest captures of a log holds tracebacks, these hold frames, and frames requests.
    monkeypatch.setattr(logging.getLogger("deltaserve.engine.loop"), "disabled", True)
    site.check_idle()
    yield
    site.check_idle()


def last_event(reply: httpx.Response) -> dict[str, Any]:
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert events[-1] != "[DONE]"
    return dict(json.loads(events[-1]))


@pytest.fixture
def forward_raises_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """forward_raises_for(name): a forward pass with rows of that delta raises, once it is past the prompt."""
    model = type(site.services.engine._runner._model)
    whole = model.forward

    def arm(name: str) -> None:
        wait_until(lambda: site.num_live == 0, "the answers before are done")
        gathered = False
        digest = site.digest(name)

        def forward(self: Any, step: Any, ids: Any, positions: Any, rows: Any) -> Any:
            nonlocal gathered
            if not gathered:
                wait_until(lambda: site.num_live >= 4, "all are asked")
                gathered = True
            running = [row for request in site.services.engine._scheduler.running for row in request.rows]
            slots = {row.slot for row in running if row.digest == digest}
            if slots & {run.slot for run in step.segments.runs} and int(positions.max()) > 8:
                raise RuntimeError("secret detail of the device")
            return whole(self, step, ids, positions, rows)

        monkeypatch.setattr(model, "forward", forward)

    return arm


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_forward_pass_that_raises_ends_the_requests_of_that_delta_alone(
    site: Site, forward_raises_for: Callable[[str], None], kind: dict[str, Any]
) -> None:
    good = {name: site.text(name) for name in ("sparse", "lowrank", "tiny")}
    forward_raises_for("sign")

    def bad() -> Any:
        reply = site.ask("sign", **kind)
        return last_event(reply) if kind.get("stream") else (reply.status_code, reply.json())

    failed, *answers = site.at_once(bad, *(lambda name=name: site.text(name) for name in good))  # type: ignore[misc]
    assert dict(zip(good, answers, strict=True)) == good
    error = failed["error"] if kind.get("stream") else failed[1]["error"]
    assert (error["code"], "secret" in error["message"]) == ("engine_failure", False)
    assert kind.get("stream") or failed[0] == 500


def test_a_forward_pass_that_raises_once_costs_nobody_an_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["sign", "sparse", "tiny", "sign"]
    kinds = [{"temperature": 1, "seed": 5}, {}, {}, MIXED]
    alone = [site.text(name, **kind) for name, kind in zip(names, kinds, strict=True)]
    model = type(site.services.engine._runner._model)
    whole, calls, raised = model.forward, 0, 0
    wait_until(lambda: site.num_live == 0, "the answers before are done")

    def forward(self: Any, step: Any, *args: Any) -> Any:
        nonlocal calls, raised
        calls += 1
        if calls == 1:
            wait_until(lambda: site.num_live == 4, "all are asked")
        if len(step.spans) >= 4 and not raised:
            raised = calls
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, step, *args)

    monkeypatch.setattr(model, "forward", forward)
    asks = [lambda n=n, k=k: site.text(n, **k) for n, k in zip(names, kinds, strict=True)]  # type: ignore[misc]
    assert site.at_once(*asks) == alone
    assert raised


@pytest.fixture(scope="module")
def damaged(tiny_base: Path, make_tenant: Callable[..., Any], make_finetune: Any, tmp_path_factory: Any) -> bytes:
    """Finite weights whose products are not."""
    folder = make_finetune(tiny_base, tmp_path_factory.mktemp("damaged") / "tuned", scale=0.05, seed=6)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if "layernorm" in name or name.endswith("norm.weight"):
            weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, path, metadata={"format": "pt"})
    artifact: bytes = make_tenant("damaged", "bitdelta", finetuned=folder).artifact
    return artifact


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_logits_that_are_not_finite_end_the_requests_of_that_delta_alone(
    site: Site, damaged: bytes, kind: dict[str, Any]
) -> None:
    good = {name: site.text(name) for name in ("sparse", "tiny")}
    site.upload("damaged", damaged)
    if "mixture" in kind:
        kind = {"mixture": [*MIXED["mixture"], {"model": "damaged", "weight": 1}]}
    failed, *answers = site.at_once(
        lambda: site.error("damaged", **kind),
        *(lambda name=name: site.text(name) for name in good),  # type: ignore[misc]
    )
    assert failed == (500, "numerical_error")  # before the first event: a status even for a stream
    assert dict(zip(good, answers, strict=True)) == good
    site.http.delete("/v1/deltas/damaged")


@pytest.mark.parametrize("kind", [*KINDS[1:3], {"n": 3}], ids=["mixture", "grammar", "choices"])
def test_a_client_that_vanishes_in_its_stream_leaves_nothing(site: Site, kind: dict[str, Any]) -> None:
    body = {"model": "sign", "prompt": "Many", "max_tokens": 100, "ignore_eos": True, "stream": True, **kind}
    if "structured_outputs" in kind:
        body["structured_outputs"] = {"regex": "[a-z ]{4000}"}
    with site.http.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_lines())
    site.check_idle()


def test_a_client_that_vanishes_while_its_grammar_is_tried_leaves_nothing(site: Site) -> None:
    body = {"model": "sign", "prompt": "Many", "max_tokens": 9, "structured_outputs": {"regex": "[a-z]{7}(x|y)*"}}
    with httpx.Client(base_url=site.http.base_url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.01))
    wait_until(lambda: site.num_live == 0, "it ends")


def test_answers_that_compete_for_blocks_are_those_of_each_alone(site: Site) -> None:
    """Ten answers of 100 tokens in a cache of 512, mixtures and grammars among them."""
    kinds: list[dict[str, Any]] = [
        {},
        MIXED,
        {"structured_outputs": {"regex": "[a-z ]{100}"}},
        {"temperature": 1, "seed": 2},
    ]
    asks = [{"max_tokens": 90, **kinds[place % 4], "prompt": f"Number {place}"} for place in range(10)]
    alone = [site.text("sign", **fields) for fields in asks]
    before = site.services.engine._scheduler.num_preemptions
    assert site.at_once(*(lambda fields=fields: site.text("sign", **fields) for fields in asks)) == alone  # type: ignore[misc]
    assert site.services.engine._scheduler.num_preemptions > before


def test_a_mixture_that_outgrows_the_cache_ends_in_an_error_and_its_neighbour_goes_on(site: Site) -> None:
    wanted = site.text("tiny", max_tokens=200)
    mixture = {"mixture": [*MIXED["mixture"], {"model": "tiny", "weight": 1}], "max_tokens": 400, "stream": True}
    reply, text = site.at_once(lambda: site.ask("sign", **mixture), lambda: site.text("tiny", max_tokens=200))
    assert last_event(reply)["error"]["code"] == "context_length_exceeded"
    assert text == wanted


def test_a_file_that_is_damaged_on_disk_is_an_error_for_its_delta_alone(site: Site, tenants: dict[str, Any]) -> None:
    site.upload("torn", tenants["chatty"].artifact)
    path = site.path("torn")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    failed, text = site.at_once(lambda: site.error("torn"), lambda: site.text("tiny"))
    assert failed == (500, "delta_load_failed")
    assert text == site.text("tiny")
    site.http.delete("/v1/deltas/torn")


def test_no_memory_for_a_load_is_an_error_and_the_next_load_is_tried(
    site: Site, tenants: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.upload("heavy", tenants["chatty"].artifact)
    with monkeypatch.context() as patch:

        def no_memory(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            raise torch.OutOfMemoryError("no memory on the device")

        patch.setattr(Artifact, "open", no_memory)
        failed, text = site.at_once(lambda: site.error("heavy"), lambda: site.text("tiny"))
    assert (failed, text) == ((500, "delta_load_failed"), site.text("tiny"))
    assert site.ask("heavy").status_code == 200
    site.http.delete("/v1/deltas/heavy")
