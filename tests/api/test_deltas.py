"""The life of a delta: uploaded, versioned, listed, used, deleted; and every upload that is refused leaves nothing."""

from __future__ import annotations

import hashlib
import resource
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]


@pytest.fixture
def sign(tenants: dict[str, Any]) -> bytes:
    artifact: bytes = tenants["sign"].artifact
    return artifact


@pytest.fixture(scope="module")
def named(tiny_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An artifact that is not packed: what is wrong with it can be put in by the names in its header."""
    from deltaserve.codecs.bitdelta import BitDelta
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import compress

    folder = tmp_path_factory.mktemp("named")
    tuned = Checkpoint.open(make_finetune(tiny_base, folder / "tuned", scale=0.05, seed=1))
    compress(Checkpoint.open(tiny_base), tuned, BitDelta(), folder / "delta", packed=False)
    return (folder / "delta").read_bytes()


@pytest.fixture(autouse=True)
def as_found(server: Any) -> Iterator[None]:
    """Every test leaves the listing as it was."""
    before = server.http.get("/v1/deltas").json()
    yield
    for card in server.http.get("/v1/deltas").json()["data"]:
        if card["id"] not in [old["id"] for old in before["data"]]:
            server.http.delete(f"/v1/deltas/{card['id']}")


def _ask(http: httpx.Client, model: str, **more: Any) -> httpx.Response:
    return http.post(
        "/v1/completions", json={"model": model, "prompt": "Many", "max_tokens": 12, "temperature": 0, **more}
    )


def test_an_upload_is_served_at_once_and_listed(server: Any, http: httpx.Client, sign: bytes) -> None:
    reply = server.upload("fresh", sign)
    assert reply.status_code == 201
    card = reply.json()
    assert card["id"] == "fresh" and card["object"] == "delta" and card["version"] == 1 and card["codec"] == "bitdelta"
    assert card["sha256"] == hashlib.sha256(sign).hexdigest() and card["disk_bytes"] == len(sign)
    assert card["base"] == http.get("/version").json()["base"]

    assert _ask(http, "fresh").json()["choices"] == _ask(http, "sign").json()["choices"]
    assert http.get("/v1/deltas/fresh").json()["state"] == "device"
    listed = http.get("/v1/deltas").json()
    assert listed["object"] == "list" and "fresh" in [delta["id"] for delta in listed["data"]]


def test_new_bytes_are_a_new_version_and_the_same_bytes_are_not(
    server: Any, http: httpx.Client, tenants: dict[str, Any]
) -> None:
    first, second = tenants["sign"], tenants["sparse"]
    assert server.upload("versions", first.artifact).status_code == 201
    again = server.upload("versions", first.artifact)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    newer = server.upload("versions", second.artifact)
    assert (newer.status_code, newer.json()["version"], newer.json()["codec"]) == (200, 2, "dare")
    assert _ask(http, "versions").json()["choices"] == _ask(http, "sparse").json()["choices"]


def test_a_running_request_finishes_on_the_version_it_began_with(server: Any, tenants: dict[str, Any]) -> None:
    server.upload("moving", tenants["sign"].artifact)
    wanted = {"prompt": "Many", "temperature": 0, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    with server.client() as client:
        expected = client.completions.create(model="sign", **wanted).choices[0].text
        stream = client.completions.create(model="moving", stream=True, **wanted)
        text = next(iter(stream)).choices[0].text
        server.upload("moving", tenants["sparse"].artifact)
        server.http.delete("/v1/deltas/moving").raise_for_status()
        assert text + "".join(chunk.choices[0].text for chunk in stream) == expected


def test_a_deleted_delta_is_unknown(server: Any, http: httpx.Client, sign: bytes, error_of: ErrorOf) -> None:
    for route in ("/v1/deltas/brief", "/v1/models/brief"):
        server.upload("brief", sign)
        assert http.delete(route).json() == {"id": "brief", "object": route.split("/")[2][:-1], "deleted": True}
        for reply in (_ask(http, "brief"), http.get(route), http.delete(route)):
            assert error_of(reply, 404, "model_not_found")["param"] == "model"
    assert _ask(http, "sign").status_code == 200, "the same bytes under another name stay"


@pytest.mark.parametrize("name", ["%20", "a%20b", ".hidden", "-x", "a%2Fb", "%2e%2e", "ü", "a%00", "x" * 129, "%ff"])
def test_a_name_that_is_none_is_refused(
    name: str, server: Any, http: httpx.Client, sign: bytes, error_of: ErrorOf
) -> None:
    assert error_of(server.upload(name, sign), 400, "invalid_name")["param"] == "name"
    error_of(http.get(f"/v1/models/{name}"), 404, "model_not_found")


def test_a_percent_encoded_name_is_the_name(server: Any, http: httpx.Client, sign: bytes) -> None:
    assert server.upload("%61%62.c_-D", sign).json()["id"] == "ab.c_-D"
    assert http.get("/v1/deltas/ab.c_-D").status_code == 200


def test_the_bases_name_is_taken(server: Any, http: httpx.Client, sign: bytes, error_of: ErrorOf) -> None:
    reply = server.upload("tiny", sign)
    error_of(reply, 409, "name_conflict")
    assert reply.headers["x-should-retry"] == "false"
    error_of(http.delete("/v1/models/tiny"), 409, "name_conflict")


def test_a_wrong_checksum_is_refused_and_the_right_one_accepted(server: Any, sign: bytes, error_of: ErrorOf) -> None:
    digest = hashlib.sha256(sign).hexdigest()
    error = error_of(server.upload("checked", sign, sha256="0" * 64), 400, "digest_mismatch")
    assert digest in error["message"] and "0" * 64 in error["message"]
    error_of(server.upload("checked", sign, sha256="xyz"), 400, "invalid_request")
    assert server.upload("checked", sign, sha256=digest.upper()).status_code == 201


def test_a_delta_of_another_base_names_both_fingerprints(
    server: Any, http: httpx.Client, named: bytes, error_of: ErrorOf
) -> None:
    ours = http.get("/version").json()["base"]
    error = error_of(server.upload("bad", named.replace(ours.encode(), b"0" * 64)), 422, "base_mismatch")
    assert ours in error["message"] and "0" * 64 in error["message"]


@pytest.mark.parametrize(
    "spoil",
    [lambda raw: b"", lambda raw: raw[:5], lambda raw: raw[:1000], lambda raw: raw[:-1], lambda raw: b"\0" * len(raw)],
    ids=["empty", "length cut", "header cut", "data cut", "zeros"],
)
def test_a_broken_file_is_corrupt(spoil: Callable[[bytes], bytes], server: Any, sign: bytes, error_of: ErrorOf) -> None:
    error_of(server.upload("bad", spoil(sign)), 422, "artifact_corrupt")


def test_numbers_that_are_not_finite_name_their_tensor(
    server: Any, named: bytes, split: Callable[..., Any], join: Callable[..., bytes], error_of: ErrorOf
) -> None:
    header, data = split(named)
    name = next(name for name in header if name.endswith(".row"))
    begin, end = header[name]["data_offsets"]
    error = error_of(
        server.upload("bad", join(header, data[:begin] + b"\xff" * (end - begin) + data[end:])),
        422,
        "artifact_not_finite",
    )
    assert name in error["message"]


def test_every_wrong_name_and_shape_is_listed(
    server: Any, named: bytes, split: Callable[..., Any], join: Callable[..., bytes], error_of: ErrorOf
) -> None:
    header, data = split(named)
    first, second = sorted(name for name in header if name.endswith(".codes"))[:2]
    header["stranger"] = header.pop(first)
    header[second]["shape"] = header[second]["shape"][::-1]
    message = error_of(server.upload("bad", join(header, data)), 422, "artifact_mismatch")["message"]
    for what in ("stranger: the manifest does not mention it", f"{first}: missing", f"{second}: shape"):
        assert what in message


def test_a_file_of_another_kind_is_refused(server: Any, join: Callable[..., bytes], error_of: ErrorOf) -> None:
    error_of(server.upload("bad", join({"__metadata__": {}}, b"")), 422, "invalid_artifact")


def test_a_full_disk_is_an_answer_and_nothing_is_half_stored(
    server: Any, http: httpx.Client, tenants: dict[str, Any], error_of: ErrorOf
) -> None:
    pid = server.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (8192, hard))
    try:
        error = error_of(server.upload("bad", tenants["lowrank"].artifact), 507, "insufficient_storage")
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert "nothing of it was kept" in error["message"]
    error_of(http.get("/v1/deltas/bad"), 404, "model_not_found")
    assert server.upload("good", tenants["lowrank"].artifact).status_code == 201


def test_a_refused_upload_leaves_the_version_before_it(
    server: Any, http: httpx.Client, sign: bytes, error_of: ErrorOf
) -> None:
    server.upload("kept", sign)
    error_of(server.upload("kept", sign[:-7]), 422, "artifact_corrupt")
    assert http.get("/v1/deltas/kept").json()["version"] == 1
    assert _ask(http, "kept").status_code == 200


def test_model_cards_name_base_and_tenants(server: Any, http: httpx.Client, error_of: ErrorOf) -> None:
    with server.client() as client:
        cards = {card.id: card for card in client.models.list()}
        assert set(cards) == {"tiny", "sign", "sparse", "lowrank", "chatty"}
        for name, card in cards.items():
            assert client.models.retrieve(name) == card
            owner = "deltaserve" if name == "tiny" else "default"
            assert (card.object, card.owned_by, card.max_model_len) == ("model", owner, 512)
            assert card.parent == (None if name == "tiny" else "tiny")
        server.upload("gone", server.http.get("/health").content or b"x")
    error_of(http.get("/v1/models/gone"), 404, "model_not_found")
    error_of(http.get("/v1/models/org%2Fname"), 404, "model_not_found")
