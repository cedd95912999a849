"""A server killed at any moment, on a PostgreSQL and an S3 that another server goes on with."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

from deltaserve.deltas.places import open_places
from deltaserve.deltas.store import DeltaStore
from deltaserve.tenants.accounts import Accounts, Caller

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KILLS, MOST_KILLS = 12, 100
LONGEST_S = 0.6  # a life; an upload takes about 0.05 on an idle machine


def test_what_was_acknowledged_is_whole_and_the_rest_goes(
    support: Callable[[str], Any], postgres_url: str, s3_url: str, tmp_path: Path
) -> None:
    chance, last, kept = random.Random(7), 0, dict[str, int]()
    registry, files = open_places(s3_url, postgres_url, tmp_path / "b", 1 << 20)
    store, me = DeltaStore(registry, files), Caller(Accounts(registry).default, "-", frozenset())

    def look() -> None:
        """The other server: every acknowledged version or the one after it is there, and is what it was."""
        nonlocal last, kept
        models = store.models.visible(me)
        found: dict[str, int] = {model.name: model.active.summary["i"] for model in models}
        assert all(found[name] in (i, last + 1) for name, i in kept.items())
        for model in models:
            with store.reading(model.active.digest) as path:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == model.active.digest
        registry.audit("b", "looked", "x")  # nobody holds a dead server's turn
        last, kept = max([last, *found.values()]), found

    with support("uploader").Uploader(s3_url, postgres_url, tmp_path / "a") as uploader:
        for life in range(MOST_KILLS):  # more than KILLS where a life is too short for an upload, on a busy machine
            if life >= KILLS and last > 3:
                break
            said = uploader.live(last, chance.uniform(0.0, LONGEST_S))
            last, kept = max([last, *said.values()]), kept | said
            look()
    with registry.write() as db:  # an hour and more passes
        db.execute("UPDATE removals SET due = 0")
    store.sweep()
    named = {model.active.digest for model in store.models.visible(me)}
    assert {key.rpartition("/")[2].partition(".")[0] for key in files.keys("objects")} == named
    assert registry.rows("SELECT * FROM removals") == []
    assert last > 3
    registry.close()
    files.close()
