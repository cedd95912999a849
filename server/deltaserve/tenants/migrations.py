"""The registry's schema, as the steps that lead to it. A step that was released is never edited: add one.

`PRAGMA user_version` counts the steps a file has taken; each runs in a transaction of its own.
"""

from __future__ import annotations

import sqlite3

from deltaserve.errors import IncompatibleStore

DEFAULT_TENANT = 1  # owner of what was stored before there were tenants; the bootstrap key's and an open server's

FIRST = (
    """CREATE TABLE IF NOT EXISTS deltas (
        name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, created INTEGER NOT NULL,
        summary TEXT NOT NULL, PRIMARY KEY (name, version)
    ) STRICT""",
)
TENANTS = (
    """CREATE TABLE tenants (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL,
        limits TEXT NOT NULL DEFAULT '{}', deleted INTEGER
    ) STRICT""",
    f"INSERT INTO tenants (id, name, created) VALUES ({DEFAULT_TENANT}, 'default', unixepoch())",
    """CREATE TABLE keys (
        id TEXT PRIMARY KEY, tenant INTEGER NOT NULL REFERENCES tenants ON DELETE CASCADE, digest BLOB NOT NULL,
        scopes TEXT NOT NULL, label TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER, revoked INTEGER
    ) STRICT""",
    """CREATE TABLE models (
        id INTEGER PRIMARY KEY AUTOINCREMENT, tenant INTEGER NOT NULL REFERENCES tenants, name TEXT NOT NULL,
        active INTEGER NOT NULL, canary INTEGER, canary_percent REAL NOT NULL DEFAULT 0,
        pinned INTEGER NOT NULL DEFAULT 0, last_version INTEGER NOT NULL, revision INTEGER NOT NULL DEFAULT 1,
        created INTEGER NOT NULL, UNIQUE (tenant, name)
    ) STRICT""",
    """CREATE TABLE versions (
        model INTEGER NOT NULL REFERENCES models ON DELETE CASCADE, version INTEGER NOT NULL, digest TEXT NOT NULL,
        bytes INTEGER NOT NULL, created INTEGER NOT NULL, summary TEXT NOT NULL,
        PRIMARY KEY (model, version), UNIQUE (model, digest)
    ) STRICT""",
    "CREATE INDEX versions_by_digest ON versions (digest)",
    """CREATE TABLE shares (
        model INTEGER NOT NULL REFERENCES models ON DELETE CASCADE,
        tenant INTEGER NOT NULL REFERENCES tenants ON DELETE CASCADE, PRIMARY KEY (model, tenant)
    ) STRICT""",
    "CREATE INDEX shares_by_tenant ON shares (tenant)",
    """CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL,
        object TEXT NOT NULL, digest TEXT, detail TEXT NOT NULL
    ) STRICT""",
    f"""INSERT INTO models (tenant, name, active, last_version, created)
        SELECT {DEFAULT_TENANT}, name, MAX(version), MAX(version), MIN(created) FROM deltas GROUP BY name""",
    """INSERT OR IGNORE INTO versions
        SELECT m.id, d.version, d.digest, COALESCE(json_extract(d.summary, '$.disk_bytes'), 0), d.created, d.summary
        FROM deltas d JOIN models m ON m.name = d.name ORDER BY d.version DESC""",
    "DROP TABLE deltas",
)
USAGE = (
    """CREATE TABLE usage (
        tenant INTEGER NOT NULL, tenant_name TEXT NOT NULL, model TEXT NOT NULL, day TEXT NOT NULL,
        requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        PRIMARY KEY (tenant, model, day)
    ) STRICT""",
)
UPLOADS = (
    """CREATE TABLE uploads (
        id TEXT PRIMARY KEY, tenant INTEGER NOT NULL REFERENCES tenants, name TEXT NOT NULL, filename TEXT NOT NULL,
        purpose TEXT NOT NULL, bytes INTEGER NOT NULL, activates INTEGER NOT NULL, created INTEGER NOT NULL,
        expires INTEGER NOT NULL, status TEXT NOT NULL DEFAULT 'pending', result TEXT
    ) STRICT""",
    "CREATE INDEX uploads_by_status ON uploads (status, expires)",
    """CREATE TABLE upload_parts (
        upload TEXT NOT NULL REFERENCES uploads ON DELETE CASCADE, digest TEXT NOT NULL, bytes INTEGER NOT NULL,
        created INTEGER NOT NULL, PRIMARY KEY (upload, digest)
    ) STRICT""",
)
STEPS = (FIRST, TENANTS, USAGE, UPLOADS)


def migrate(connection: sqlite3.Connection) -> None:
    """Takes the steps that the file lacks. Raises IncompatibleStore for a file of a newer deltaserve."""
    (taken,) = connection.execute("PRAGMA user_version").fetchone()
    if taken > len(STEPS):
        raise IncompatibleStore(f"the registry has schema {taken}; this deltaserve knows up to {len(STEPS)}")
    for number, step in enumerate(STEPS[taken:], taken + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in step:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
