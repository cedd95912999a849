"""The registry on SQLite and on PostgreSQL: what a request waits for. 100 tenants with 100 models and a key each.

python tests/benchmarks/registry.py            # SQLite in a temporary folder
python tests/benchmarks/registry.py postgresql://… # an empty database
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deltaserve.tenants.accounts import Accounts, Scope
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.models import Change, Models
from deltaserve.tenants.postgres import PostgresRegistry
from deltaserve.tenants.registry import Registry
from deltaserve.tenants.sqlite import SqliteRegistry

TENANTS, MODELS = 100, 100


def timed(what: str, times: int, call: Callable[[int], object]) -> None:
    taken = []
    for i in range(times):
        began = time.perf_counter()
        call(i)
        taken.append((time.perf_counter() - began) * 1e3)
    cuts = statistics.quantiles(taken, n=100)
    sys.stdout.write(f"{what:44} p50 {cuts[49]:8.3f} ms   p99 {cuts[98]:8.3f} ms   n={times}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="postgresql://…")
    url = parser.parse_args().url
    with tempfile.TemporaryDirectory() as folder:

        def opened() -> Registry:
            return PostgresRegistry(url) if url else SqliteRegistry(Path(folder))

        registry = opened()
        accounts = Accounts(registry)
        keys, models = Keys(registry, accounts, "first"), Models(registry)
        with registry.write():
            tenants = [accounts.create(f"t{i}", "bench") for i in range(TENANTS)]
        texts = [keys.create(tenant, [Scope.MANAGE], "bench")[1] for tenant in tenants]
        with registry.write():
            for tenant in tenants:
                for i in range(MODELS):
                    models.add(tenant.id, f"m{i}", f"{tenant.id:032}{i:032}", 1, {})
        callers = [keys.authenticate(text) for text in texts]
        timed("key → caller, what is in memory", 5000, lambda i: keys.authenticate(texts[i % TENANTS]))
        timed("has another server changed anything?", 2000, lambda i: keys.refresh())
        timed("name → version", 2000, lambda i: models.find(callers[i % TENANTS], f"m{i % MODELS}"))
        timed("one's 100 models", 100, lambda i: models.visible(callers[i % TENANTS]))

        def move(i: int) -> None:
            with registry.write():
                model, _ = models.owned(callers[i % TENANTS], "m1")
                models.change(model, Change(pinned=bool(i % 2)))
                registry.audit("bench", "model.change", "m1")

        timed("a change, committed", 200, move)
        if url:
            other, ends = opened(), threading.Event()

            def write_on() -> None:
                while not ends.is_set():
                    other.audit("bench", "x", "y")

            writer = threading.Thread(target=write_on)
            writer.start()
            timed("a change, while another server writes on", 200, move)
            timed("name → version, while it does", 2000, lambda i: models.find(callers[i % TENANTS], f"m{i % MODELS}"))
            ends.set()
            writer.join()
            other.close()
        timed("all keys and tenants read again", 20, lambda i: (accounts.reload(), keys.reload()))
        registry.close()


if __name__ == "__main__":
    main()
