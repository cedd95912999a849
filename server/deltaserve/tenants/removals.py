"""Files that no row names, not yet or not any more, and when they may go: what servers that share a store agree on.

Before a file comes it is noted here, so that whatever a crash leaves goes in time; the transaction that names it takes
the note back. The one that takes a file's last name notes it again. Rows only; `deltas.store` removes.
"""

from __future__ import annotations

from collections.abc import Iterable

from deltaserve.tenants.registry import Registry


class Removals:
    """Thread-safe. Times are the registry's: servers' clocks may differ."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def note(self, keys: Iterable[str], grace_s: int) -> None:
        """Unless one of them gets a name, it goes after `grace_s` seconds."""
        with self._registry.write() as db:
            for key in keys:
                db.execute(
                    "INSERT INTO removals VALUES (?, unixepoch() + ?) "
                    "ON CONFLICT (key) DO UPDATE SET due = excluded.due",
                    (key, grace_s),
                )

    def take_back(self, key: str) -> None:
        with self._registry.write() as db:
            db.execute("DELETE FROM removals WHERE key = ?", (key,))

    def due(self) -> list[str]:
        return [key for (key,) in self._registry.rows("SELECT key FROM removals WHERE due <= unixepoch() ORDER BY due")]

    def take(self, key: str) -> bool:
        """Within a transaction: is it due still, and without a name? It is noted no more, whatever the answer."""
        with self._registry.write() as db:
            is_due = db.execute("DELETE FROM removals WHERE key = ? AND due <= unixepoch()", (key,)).rowcount
        return bool(is_due) and not self._is_named(key)

    def _is_named(self, key: str) -> bool:
        kind, folder, name = key.split("/")
        if kind == "parts":
            return bool(self._registry.rows("SELECT 1 FROM upload_parts WHERE upload = ? AND digest = ?", folder, name))
        if kind == "files":
            return bool(self._registry.rows("SELECT 1 FROM files WHERE id = ?", folder))
        return bool(self._registry.rows("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", name.partition(".")[0]))
