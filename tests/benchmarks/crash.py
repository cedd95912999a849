"""kill -9 under uploads, changes and load, again and again on one store: is anything lost that was acknowledged?

Each life of the real server ends at a random moment, or at a random step of what changes the disk. Every name has one
client, which knows the state that was acknowledged and the one change that was under way: after the restart the name is
in one of the two, every version of it answers as its weights do, and every part that was acknowledged is there. After
every `--doctor-every`th kill `deltaserve doctor --repair` comes before the next start, and leaves nothing that is
wrong; after every such start, beside the running server, it finds nothing at all.

`--matrix` instead: every operation, killed at every one of its steps (tests/support/kills.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

import deltaserve.cli

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import common
from kills import OPERATIONS, Scene
from nursery import Nursery, nursery
from small_world import MAX_TOKENS, Delta, World

KEEP = 3
FLAGS = ("--keep-versions", str(KEEP), "--max-deltas", "8")
LONGEST_LIFE_S = 8.0
MOST_STEPS = 400  # of a life that ends at a step


@dataclass
class State:
    """Of a name: what each version is, where it points, and how far it has counted."""

    versions: dict[int, str] = field(default_factory=dict)
    active: int = 0
    last: int = 0

    def uploaded(self, digest: str) -> State:
        number = next((number for number, told in self.versions.items() if told == digest), self.last + 1)
        after = State({**self.versions, number: digest}, number, max(self.last, number))
        kept = {*sorted(after.versions, reverse=True)[:KEEP], number}
        return State({n: d for n, d in after.versions.items() if n in kept}, number, after.last)

    def moved(self, number: int) -> State:
        return State(dict(self.versions), number, self.last)

    def without(self, number: int) -> State:
        return State({n: d for n, d in self.versions.items() if n != number}, self.active, self.last)


class Name:
    """One model and its client."""

    def __init__(self, called: str, world: World, seed: int) -> None:
        self.called = called
        self.world = world
        self.rng = random.Random(seed)
        self.told = State()
        self.under_way: State | None = None
        self.deltas: dict[str, Delta] = {}
        self.upload: str | None = None
        self.parts: set[str] = set()
        self.counts: Counter[str] = Counter()

    def live(self, http: httpx.Client) -> None:
        """Until the server is gone."""
        while True:
            try:
                self._change(http)
            except httpx.TransportError:
                return

    def _change(self, http: httpx.Client) -> None:
        path, numbers = f"/v1/deltas/{self.called}", sorted(self.told.versions)
        draw = self.rng.random()
        if draw < 0.5 or not numbers:
            delta = self._drawn()
            after = self.told.uploaded(delta.sha256)
            self._do("upload", after, lambda: http.put(path, content=delta.data))
        elif draw < 0.7:
            self._in_parts(http)
        elif draw < 0.85:
            number = self.rng.choice(numbers)
            self._do("move", self.told.moved(number), lambda: http.patch(path, json={"version": number}))
        elif draw < 0.95 and (others := [number for number in numbers if number != self.told.active]):
            number = self.rng.choice(others)
            self._do("delete a version", self.told.without(number), lambda: http.delete(f"{path}@{number}"))
        elif draw > 0.97:
            self._do("delete", State(), lambda: http.delete(path))

    def _in_parts(self, http: httpx.Client) -> None:
        delta = self._drawn()
        body = {"bytes": len(delta.data), "filename": f"{self.called}.safetensors", "mime_type": "x"}
        self.upload = http.post("/v1/uploads", json={**body, "purpose": "fine-tune"}).raise_for_status().json()["id"]
        for piece in (delta.data[:2000], delta.data[2000:]):
            reply = http.post(f"/v1/uploads/{self.upload}/parts", files={"data": piece})
            self.parts.add(reply.raise_for_status().json()["id"])
            self.counts["part"] += 1
        given = [_part_id(piece) for piece in (delta.data[:2000], delta.data[2000:])]
        path = f"/v1/uploads/{self.upload}/complete"
        after = self.told.uploaded(delta.sha256)
        self._do("upload in parts", after, lambda: http.post(path, json={"part_ids": given}))
        self.upload, self.parts = None, set()

    def _drawn(self) -> Delta:
        delta = self.world.delta(self.rng.randrange(self.world.num_kinds), fresh=self.rng.random() < 0.8)
        self.deltas[delta.sha256] = delta
        return delta

    def _do(self, what: str, after: State, call: Callable[[], httpx.Response]) -> None:
        self.under_way = after
        call().raise_for_status()
        self.told, self.under_way = after, None
        self.counts[what] += 1

    def check(self, http: httpx.Client) -> list[str]:
        """After a restart: what is wrong."""
        card = http.get(f"/v1/deltas/{self.called}")
        listed = http.get(f"/v1/deltas/{self.called}/versions").json().get("data", [])
        versions = {version["version"]: version["sha256"] for version in listed}
        active = card.json()["version"] if card.is_success else 0
        states = [state for state in (self.told, self.under_way) if state is not None]
        found = next((state for state in states if (state.versions, state.active) == (versions, active)), None)
        if found is None:
            return [f"{self.called}: found {versions} at {active}; acknowledged {self.told}, then {self.under_way}"]
        self.counts["changes found though unacknowledged"] += found is not self.told
        self.told, self.under_way = found, None
        return [*self._ask_all(http), *self._check_parts(http)]

    def _ask_all(self, http: httpx.Client) -> list[str]:
        problems = []
        for number, digest in self.told.versions.items():
            prompt, text = self.rng.choice(list(self.world.answers[self.deltas[digest].kind].items()))
            body = {"model": f"{self.called}@{number}", "prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS}
            reply = http.post("/v1/completions", json=body)
            self.counts["versions checked"] += 1
            if reply.status_code != 200 or reply.json()["choices"][0]["text"] != text:
                problems.append(f"{self.called}@{number} answers {reply.status_code} {reply.text}")
        return problems

    def _check_parts(self, http: httpx.Client) -> list[str]:
        if self.upload is None:
            return []
        upload = http.get(f"/v1/uploads/{self.upload}").json()
        here = {part["id"] for part in upload["parts"]}
        lost = self.parts - here if upload["status"] == "pending" else set()
        if upload["status"] == "pending":
            http.post(f"/v1/uploads/{self.upload}/cancel").raise_for_status()
        elif upload["status"] != "completed":
            lost = self.parts
        self.counts["parts checked"] += len(self.parts)
        self.upload, self.parts = None, set()
        return [f"{self.called}: parts {lost} were acknowledged and are gone"] if lost else []


def _part_id(piece: bytes) -> str:
    return f"part_{sha256(piece).hexdigest()}"


def doctor(store: Path, *flags: str) -> dict[str, Any]:
    """What the command says, in this process: importing takes longer than looking."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        status = deltaserve.cli.main(["doctor", "--store", str(store), "--json", *flags])
    if status not in (0, 3, 4):
        return {"findings": [{"subject": "doctor", "message": f"exit status {status}"}], "mended": []}
    found: dict[str, Any] = json.loads(told.getvalue())
    found["findings"] = [one for one in found["findings"] if one["severity"] != "note"]
    return found


def random_kills(args: argparse.Namespace, world: World, folder: Path, bred: Nursery) -> dict[str, Any]:
    store, rng = folder / "store", random.Random(args.seed)
    names = [Name(f"delta-{index}", world, index) for index in range(args.names)]
    totals: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    problems: list[str] = []
    started_s, starts_s = time.monotonic(), []
    while True:
        began_s = time.monotonic()
        life = bred.start(world.base, store, *FLAGS)
        starts_s.append(time.monotonic() - began_s)
        for name in names:
            problems += [f"kill {totals['kills']}: {problem}" for problem in name.check(life.http)]
        if totals["kills"] % args.doctor_every == 0:
            found = doctor(store, "--online")["findings"]
            problems += [f"kill {totals['kills']}: {one['subject']} {one['message']}" for one in found]
        if time.monotonic() - started_s > 60 * args.minutes:
            problems += [f"exit status {status}"] if (status := life.stop()) else []
            break
        clients = [httpx.Client(base_url=life.url, timeout=60) for _ in range(len(names) + 2)]
        threads = [threading.Thread(target=name.live, args=(http,)) for name, http in zip(names, clients, strict=False)]
        threads += [threading.Thread(target=_ask, args=(clients[-1 - i], names, totals)) for i in range(2)]
        if totals["kills"] % 2:
            life.die_at(rng.randint(1, MOST_STEPS))
        for thread in threads:
            thread.start()
        if totals["kills"] % 2:
            life.ended()
        else:
            time.sleep(rng.uniform(0.1, LONGEST_LIFE_S))
            life.kill()
        totals["kills"] += 1
        for thread in threads:
            thread.join(70)
            problems += [f"kill {totals['kills']}: a client hangs"] if thread.is_alive() else []
        for http in clients:
            http.close()
        if totals["kills"] % args.doctor_every == 0:
            told = doctor(store, "--repair")
            totals["doctor runs"] += 1
            mended.update(one["check"] for one in told["mended"])
            problems += [f"kill {totals['kills']}: left after repair: {one}" for one in told["findings"]]
        if totals["kills"] % 10 == 0:
            sys.stderr.write(f"{(time.monotonic() - started_s) / 60:.1f} min {dict(totals)} {len(problems)} problems\n")
    for name in names:
        totals += name.counts
    starts_s.sort()
    figures = {"start_s_median": round(starts_s[len(starts_s) // 2], 2), "start_s_longest": round(starts_s[-1], 2)}
    return {"minutes": args.minutes, **totals, **figures, "mended": dict(mended), "problems": problems}


def _ask(http: httpx.Client, names: list[Name], totals: Counter[str]) -> None:
    rng = random.Random(0)
    while True:
        called = rng.choice(["tiny", *(name.called for name in names)])
        body = {"model": called, "prompt": "A delta", "temperature": 0, "max_tokens": MAX_TOKENS}
        try:
            totals[f"answers {http.post('/v1/completions', json=body).status_code}"] += 1
        except httpx.TransportError:
            return


def matrix(world: World, folder: Path, bred: Nursery) -> dict[str, Any]:
    files = [world.delta(kind) for kind in range(4)]
    answers = {delta.sha256: next(iter(world.answers[delta.kind].items())) for delta in files}

    def check(store: Path) -> list[str]:
        return [one["message"] for one in doctor(store)["findings"]]

    checkpoint = {path.name: path.read_bytes() for path in sorted((folder / "0" / "tuned").iterdir())}
    scene = Scene(bred, world.base, folder, [delta.data for delta in files], answers, checkpoint, check)
    scene.build()
    steps: dict[str, int] = {}
    problems = []
    for name in OPERATIONS:
        steps[name], commit, after = scene.measure(name)
        allowed = scene.allowed(name, after)
        for step in range(1, steps[name] + 1):
            found = scene.kill(name, step)
            if found not in allowed or ((step > commit or scene.is_acknowledged) and found != after):
                problems.append(f"{name}, killed at step {step} of {steps[name]} ({commit} commits): {found}")
        sys.stderr.write(f"{name}: {steps[name]} steps, {len(problems)} problems\n")
    steps["migrate"] = 0
    while scene.migrate(folder / "old", steps["migrate"] + 1):
        steps["migrate"] += 1
    return {"kills": scene.num_kills, "versions_checked": scene.num_versions, "steps": steps, "problems": problems}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--names", type=int, default=4, help="models, each with a client that changes it")
    parser.add_argument("--doctor-every", type=int, default=3, metavar="K", help="kills from one doctor to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix", action="store_true", help="every step of every operation, instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-") as directory, nursery() as bred:
        world = World(Path(directory), 6)
        folder = Path(directory)
        figures = matrix(world, folder, bred) if args.matrix else random_kills(args, world, folder, bred)
    common.report(args, figures)
    return 1 if figures["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
