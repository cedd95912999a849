"""An hour of everything at once: random tenants, uploads, deletes, cancels and faults. Does anything leak, hang or mix?

Each tenant is a client of its own with a key of its own over real HTTP; all use the same model names. A step is one of
STEPS, drawn at random. Every complete answer is compared with what transformers says of that very version's weights.
Every `--settle-s` seconds all clients stop, the server comes to rest, and what it still holds is written down: memory,
open files, threads, processes, KV blocks, pins, requests, and the store's files beside what its tenants own.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
import common
from small_world import MAX_TOKENS, Delta, ServerProcess, World, wait_until

NAMES = ("one", "two", "three")
CLIENT_TIMEOUT_S = 60  # an answer takes milliseconds: whoever waits longer hangs
ADMIN_KEY = "churn-admin"
FLAGS = ("--max-deltas", "6", "--max-cpu-deltas", "12", "--kv-cache-tokens", "1024", "--max-num-seqs", "16")
FLAGS += ("--max-num-queued-reqs-per-tenant", "256")


class Town:
    """What all clients share: the server, the right answers, and what was seen."""

    def __init__(self, world: World, server: ServerProcess) -> None:
        self.world = world
        self.server = server
        self.admin = server.http
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self.running = threading.Event()  # cleared: everybody rests
        self.ended = threading.Event()
        self.resting = threading.Semaphore(0)

    def problem(self, text: str) -> None:
        self.problems.append(f"{time.strftime('%H:%M:%S')} {text}")
        sys.stderr.write(self.problems[-1] + "\n")

    def expect(self, what: str, reply: httpx.Response, *statuses: int) -> Any:
        """The reply's JSON; another status is a problem."""
        self.seen[what] += 1
        if reply.status_code not in statuses:
            self.problem(f"{what}: {reply.request.method} {reply.request.url.path} {reply.status_code} {reply.text}")
        return reply.json() if reply.content else None


class Tenant:
    """One account; its steps come one after the other, its questions several at once."""

    def __init__(self, town: Town, number: int) -> None:
        self.town = town
        self.number = number
        self.rng = random.Random(number)
        self.generation = 0
        self.pool = ThreadPoolExecutor(4)
        self.deltas: dict[str, Delta] = {}  # by digest: every one that it sent
        self.http = self._open()

    def _open(self) -> httpx.Client:
        """A new account with a new key."""
        self.generation += 1
        self.name = f"t{self.number}-{self.generation}"
        self.versions: dict[tuple[str, int], str] = {}  # acknowledged: (name, number) → digest
        town = self.town
        town.expect("create tenant", town.admin.post("/v1/admin/tenants", json={"name": self.name}), 201, 200)
        return self._client(town.admin.post("/v1/admin/keys", json=self._scopes()))

    def _scopes(self) -> dict[str, Any]:
        return {"tenant": self.name, "scopes": ["inference", "manage"]}

    def _client(self, reply: httpx.Response) -> httpx.Client:
        self.key = self.town.expect("create key", reply, 201, 200)
        headers = {"Authorization": f"Bearer {self.key['key']}"}
        return httpx.Client(base_url=self.town.server.url, headers=headers, timeout=CLIENT_TIMEOUT_S)

    def live(self) -> None:
        """Until the town has ended."""
        steps, weights = list(STEPS), list(STEPS.values())
        while not self.town.ended.is_set():
            if not self.town.running.is_set():
                self.town.resting.release()
                while not (self.town.running.wait(0.2) or self.town.ended.is_set()):
                    pass
                continue
            try:
                self.rng.choices(steps, weights)[0](self)
            except httpx.TimeoutException as error:
                self.town.problem(f"{self.name} hangs: {error!r}")
            except Exception as error:
                self.town.problem(f"{self.name}: {error!r}")
        self.pool.shutdown()
        self.http.close()

    # What it has, as the server says; and whether that is what it was told.

    def models(self) -> dict[str, dict[int, Delta]]:
        """Every version of every name. One that was acknowledged under another digest, or that the tenant never sent,
        is a problem."""
        found: dict[str, dict[int, Delta]] = {}
        for card in self.town.expect("list", self.http.get("/v1/deltas"), 200)["data"]:
            name = card["id"]
            reply = self.http.get(f"/v1/deltas/{name}/versions")
            for version in self.town.expect("list versions", reply, 200)["data"]:
                digest = version["sha256"]
                told = self.versions.setdefault((name, version["version"]), digest)
                if told != digest or digest not in self.deltas:
                    self.town.problem(f"{self.name}: {name}@{version['version']} is {digest}, and was {told}")
                else:
                    found.setdefault(name, {})[version["version"]] = self.deltas[digest]
        return found

    def forget(self, name: str) -> None:
        self.versions = {key: digest for key, digest in self.versions.items() if key[0] != name}

    def drawn(self) -> tuple[str, Delta]:
        """A name, and a delta for it that is new to the world, or that it had before, or that others have too."""
        fresh = self.rng.random() < 0.7
        delta = self.town.world.delta(self.rng.randrange(self.town.world.num_kinds), fresh=fresh)
        if self.deltas and self.rng.random() < 0.2:
            delta = self.rng.choice(list(self.deltas.values()))
        self.deltas[delta.sha256] = delta
        return self.rng.choice(NAMES), delta

    def kept(self, name: str, number: int, digest: str) -> None:
        told = self.versions.setdefault((name, number), digest)
        if told != digest:
            self.town.problem(f"{self.name}: {name}@{number} became {digest}, and was {told}")

    def body(self, model: str, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS, **more}

    def ask(self, model: str, kind: int) -> None:
        answers = self.town.world.answers[kind]
        prompt = self.rng.choice(list(answers))
        reply = self.http.post("/v1/completions", json=self.body(model, prompt))
        if self.town.expect("answer", reply, 200) and reply.status_code == 200:
            text = reply.json()["choices"][0]["text"]
            if text != answers[prompt]:
                whose = [other for other, told in self.town.world.answers.items() if told.get(prompt) == text]
                self.town.problem(f"{self.name}: {model} (kind {kind}) answers {text!r} to {prompt!r}: kinds {whose}")

    # The steps.

    def upload(self) -> None:
        name, delta = self.drawn()
        reply = self.http.put(f"/v1/deltas/{name}", content=delta.data, params={"sha256": delta.sha256})
        if card := self.town.expect("upload", reply, 200, 201):
            self.kept(name, card["version"], card["sha256"])

    def upload_in_parts(self) -> None:
        """Some at once, one of them twice; sometimes cancelled, or left to lie."""
        name, delta = self.drawn()
        fields = {"bytes": len(delta.data), "filename": f"{name}.safetensors", "mime_type": "x", "purpose": "fine-tune"}
        upload = self.town.expect("begin upload", self.http.post("/v1/uploads", json=fields), 200, 429)
        if "id" not in upload:
            return
        path, step = f"/v1/uploads/{upload['id']}", len(delta.data) // 3 + 1
        pieces = [delta.data[start : start + step] for start in range(0, len(delta.data), step)]

        def send(piece: bytes) -> str:
            reply = self.http.post(f"{path}/parts", files={"data": piece})
            return str(self.town.expect("part", reply, 200)["id"])

        sent = list(self.pool.map(send, [*pieces, pieces[0]]))
        if self.rng.random() < 0.3:
            self.town.expect("cancel upload", self.http.post(f"{path}/cancel"), 200)
            return
        body = {"part_ids": sent[: len(pieces)], "sha256": delta.sha256}
        for _ in range(1 + (self.rng.random() < 0.3)):
            done = self.town.expect("complete upload", self.http.post(f"{path}/complete", json=body), 200)
        model, _, number = done["file"]["id"].partition("@")
        self.kept(model, int(number), delta.sha256)

    def break_off(self) -> None:
        """An upload that ends in the middle."""
        name, delta = self.drawn()

        def half() -> Any:
            yield delta.data[: len(delta.data) // 2]
            raise ConnectionAbortedError

        try:
            self.http.put(f"/v1/deltas/{name}", content=half())
        except ConnectionAbortedError:
            self.town.seen["upload broken off"] += 1

    def upload_damage(self) -> None:
        name, delta = self.drawn()
        place = self.rng.randrange(len(delta.data))
        data = delta.data[:place] + bytes([delta.data[place] ^ 0x81]) + delta.data[place + 1 :]
        reply = self.http.put(f"/v1/deltas/{name}", content=data, params={"sha256": delta.sha256})
        self.town.expect("upload of damaged bytes", reply, 400)
        self.town.expect("upload of garbage", self.http.put(f"/v1/deltas/{name}", content=data[:200]), 422)

    def ask_all(self) -> None:
        asks: list[tuple[str, int]] = [("tiny", -1)]
        for name, versions in self.models().items():
            asks += [(f"{name}@{number}", delta.kind) for number, delta in versions.items()]
        for asked in list(self.pool.map(lambda ask: self.ask(*ask), self.rng.sample(asks, min(len(asks), 4)))):
            assert asked is None

    def ask_by_name(self) -> None:
        for name in self.models():
            card = self.town.expect("look", self.http.get(f"/v1/deltas/{name}"), 200)
            self.ask(name, self.deltas[card["sha256"]].kind)

    def leave_a_stream(self) -> None:
        for name in self.models():
            body = self.body(name, "Many", stream=True, ignore_eos=True, n=2) | {"max_tokens": 200}
            with self.http.stream("POST", "/v1/completions", json=body) as reply:
                next(reply.iter_lines())
            self.town.seen["stream left"] += 1

    def delete_under_an_answer(self) -> None:
        """A model is deleted while it answers: the answer ends as it would have."""
        for name, versions in self.models().items():
            number, delta = self.rng.choice(list(versions.items()))
            answer = self.pool.submit(self._answer_or_none, f"{name}@{number}", delta.kind)
            self.town.expect("delete", self.http.delete(f"/v1/deltas/{name}"), 200)
            self.forget(name)
            answer.result(CLIENT_TIMEOUT_S)
            return

    def _answer_or_none(self, model: str, kind: int) -> None:
        answers = self.town.world.answers[kind]
        prompt = self.rng.choice(list(answers))
        reply = self.http.post("/v1/completions", json=self.body(model, prompt))
        self.town.expect("answer of what is deleted", reply, 200, 404)
        if reply.status_code == 200 and reply.json()["choices"][0]["text"] != answers[prompt]:
            self.town.problem(f"{self.name}: {model} answers wrongly while it is deleted")

    def move(self) -> None:
        for name, versions in self.models().items():
            change = {"version": self.rng.choice(list(versions))}
            if self.rng.random() < 0.3:
                change["canary"] = {"version": self.rng.choice(list(versions)), "percent": 50}  # type: ignore[assignment]
            self.town.expect("change", self.http.patch(f"/v1/deltas/{name}", json=change), 200)
            self.town.expect("change", self.http.patch(f"/v1/deltas/{name}", json={"canary": None}), 200)

    def delete_version(self) -> None:
        for name, versions in self.models().items():
            number = self.rng.choice(list(versions))
            reply = self.http.delete(f"/v1/deltas/{name}@{number}")
            self.town.expect("delete version", reply, 200, 409)

    def peep(self) -> None:
        """At what others have, under names that they have."""
        other = f"t{(self.number + 1) % 8}-1"
        for called in (f"{other}:{NAMES[0]}", f"{other}:{NAMES[0]}@1", "nobody"):
            self.town.expect("another's", self.http.post("/v1/completions", json=self.body(called, "a")), 404)
            self.town.expect("another's", self.http.get(f"/v1/deltas/{called}"), 404)

    def shaped(self) -> None:
        """A grammar, several choices, and a mixture."""
        for name in self.models():
            more: dict[str, Any] = self.rng.choice(
                [
                    {"structured_outputs": {"regex": "[a-z ]{10}"}},
                    {"n": 3, "temperature": 1.0},
                    {"mixture": [{"model": name, "weight": 1}, {"model": "tiny", "weight": 1}]},
                ]
            )
            reply = self.http.post("/v1/completions", json=self.body(name, "A delta", **more))
            self.town.expect("shaped answer", reply, 200)

    def damage_on_disk(self) -> None:
        """A file of its own loses a byte on the server's disk: an error or what is in memory, and never another's
        answer. The same bytes again heal it."""
        delta = self.town.world.delta(self.rng.randrange(self.town.world.num_kinds))
        self.deltas[delta.sha256] = delta
        reply = self.http.put("/v1/deltas/torn", content=delta.data)
        card = self.town.expect("upload", reply, 200, 201)
        path = self.town.server.store / "objects" / delta.sha256[:2] / f"{delta.sha256}.safetensors"
        path.write_bytes(delta.data[:-8] + bytes(8))
        answers = self.town.world.answers[delta.kind]
        prompt = self.rng.choice(list(answers))
        reply = self.http.post("/v1/completions", json=self.body(f"torn@{card['version']}", prompt))
        self.town.expect("answer of a damaged file", reply, 500)
        if reply.status_code == 500 and reply.json()["error"]["code"] != "delta_load_failed":
            self.town.problem(f"a damaged file is {reply.text}")
        self.town.expect("upload that heals", self.http.put("/v1/deltas/torn", content=delta.data), 200)
        self.ask("torn", delta.kind)
        self.town.expect("delete", self.http.delete("/v1/deltas/torn"), 200)

    def rotate(self) -> None:
        old = self.http
        reply = self.town.admin.post(f"/v1/admin/keys/{self.key['id']}/rotate", json={"grace_s": 0})
        self.http = self._client(reply)
        self.town.expect("old key", old.get("/v1/models"), 401)
        old.close()

    def move_house(self) -> None:
        """The tenant is deleted, and comes back under a new name without anything."""
        self.town.expect("delete tenant", self.town.admin.delete(f"/v1/admin/tenants/{self.name}"), 200)
        self.town.expect("old key", self.http.get("/v1/models"), 401)
        self.http.close()
        self.deltas.clear()
        self.http = self._open()


STEPS: dict[Callable[[Tenant], None], float] = {
    Tenant.upload: 5,
    Tenant.upload_in_parts: 3,
    Tenant.break_off: 1,
    Tenant.upload_damage: 1,
    Tenant.ask_all: 20,
    Tenant.ask_by_name: 10,
    Tenant.leave_a_stream: 3,
    Tenant.delete_under_an_answer: 2,
    Tenant.move: 3,
    Tenant.delete_version: 2,
    Tenant.peep: 2,
    Tenant.shaped: 3,
    Tenant.damage_on_disk: 1,
    Tenant.rotate: 0.3,
    Tenant.move_house: 0.2,
}


def settled(town: Town, num_tenants: int) -> dict[str, Any]:
    """Everybody rests; → what the server holds then."""
    town.running.clear()
    for _ in range(num_tenants):
        if not town.resting.acquire(timeout=4 * CLIENT_TIMEOUT_S):
            town.problem("a client does not come to rest")
            break
    town.server.wait_idle()

    def held() -> dict[str, float]:
        return {
            "kv_blocks": town.server.metric("vllm:kv_cache_usage_perc"),
            "pinned": town.server.metric("deltaserve:deltas", tier="pinned"),
            "incoming": sum(1 for _ in (town.server.store / "incoming").iterdir()),
        }

    try:  # what is written down a moment after the last reply is no leak
        wait_until(lambda: not any(held().values()), "nothing is held")
    except AssertionError:
        town.problem(f"at rest the server holds {held()}")
    cards = [card["id"] for card in town.admin.get("/v1/deltas").json()["data"]]
    owned = {
        version["sha256"]
        for called in cards
        for version in town.admin.get(f"/v1/deltas/{called}/versions").json()["data"]
    }
    stored = {path.stem for path in (town.server.store / "objects").glob("*/*")}
    if owned != stored:
        town.problem(f"{len(stored - owned)} objects of nobody, {len(owned - stored)} missing")
    return {**held(), "objects": len(stored), **common.process_figures(town.server.process.pid)}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--settle-s", type=float, default=60.0)
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--kinds", type=int, default=16, help="different fine-tunes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="churn-") as directory:
        world = World(Path(directory), args.kinds)
        server = ServerProcess(world.base, Path(directory) / "store", *FLAGS, api_key=ADMIN_KEY)
        server.wait_ready()
        town = Town(world, server)
        tenants = [Tenant(town, number) for number in range(args.tenants)]
        threads = [threading.Thread(target=tenant.live, daemon=True) for tenant in tenants]
        for thread in threads:
            thread.start()
        samples = []
        started_s = time.monotonic()
        while (elapsed_s := time.monotonic() - started_s) < 60 * args.minutes:
            town.running.set()
            town.ended.wait(min(args.settle_s, 60 * args.minutes - elapsed_s))
            samples.append({"minute": round((time.monotonic() - started_s) / 60, 1), **settled(town, len(tenants))})
            sys.stderr.write(f"{samples[-1]} {sum(town.seen.values())} requests, {len(town.problems)} problems\n")
        town.ended.set()
        for thread in threads:
            thread.join(CLIENT_TIMEOUT_S)
        status = server.stop()
        if status or "Traceback" in server.printed:
            town.problem(f"exit status {status}; its log:\n{server.printed[-4000:]}")
    figures = {"minutes": args.minutes, "tenants": args.tenants, "kinds": args.kinds, "flags": FLAGS}
    common.report(args, {**figures, "requests": dict(town.seen), "samples": samples, "problems": town.problems})
    return 1 if town.problems else 0


if __name__ == "__main__":
    sys.exit(main())
