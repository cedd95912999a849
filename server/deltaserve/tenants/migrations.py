"""The registry's schema, as the steps that lead to it. A step that was released is never edited: add one.

They are written for SQLite, in words that `tenants.postgres` knows how to put for PostgreSQL. The registry counts the
steps it has taken; each runs in a transaction of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from deltaserve.errors import IncompatibleStore

DEFAULT_TENANT = 1  # owner of what was stored before there were tenants; the bootstrap key's and an open server's

FIRST = (
    """CREATE TABLE IF NOT EXISTS deltas (
        name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, created INTEGER NOT NULL,
        summary TEXT NOT NULL, PRIMARY KEY (name, version)
    ) STRICT""",
)
CARRY_OVER = (  # from SQLite files of before there were tenants
    f"""INSERT INTO models (tenant, name, active, last_version, created)
        SELECT {DEFAULT_TENANT}, name, MAX(version), MAX(version), MIN(created) FROM deltas GROUP BY name""",
    """INSERT OR IGNORE INTO versions
        SELECT m.id, d.version, d.digest, COALESCE(json_extract(d.summary, '$.disk_bytes'), 0), d.created, d.summary
        FROM deltas d JOIN models m ON m.name = d.name ORDER BY d.version DESC""",
)
TENANTS = (
    """CREATE TABLE tenants (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL,
        limits TEXT NOT NULL DEFAULT '{}', deleted INTEGER
    ) STRICT""",
    "INSERT INTO tenants (name, created) VALUES ('default', unixepoch())",  # the first: DEFAULT_TENANT
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
    *CARRY_OVER,
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
PLACES = ("ALTER TABLE upload_parts ADD COLUMN place INTEGER NOT NULL DEFAULT 0",)
BILLS = (
    "ALTER TABLE usage ADD COLUMN cached_tokens INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE usage ADD COLUMN resident_s REAL NOT NULL DEFAULT 0",
    "ALTER TABLE models ADD COLUMN expires INTEGER",
)
SHARED = (
    "CREATE TABLE identity (id TEXT NOT NULL) STRICT",
    "CREATE TABLE removals (key TEXT PRIMARY KEY, due INTEGER NOT NULL) STRICT",
)
JOBS = (
    """CREATE TABLE files (
        id TEXT PRIMARY KEY, tenant INTEGER NOT NULL REFERENCES tenants, filename TEXT NOT NULL, purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL, digest TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER NOT NULL
    ) STRICT""",
    "CREATE INDEX files_by_tenant ON files (tenant)",
    """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant INTEGER NOT NULL REFERENCES tenants,
        name TEXT NOT NULL, asked_by TEXT NOT NULL, activates INTEGER NOT NULL, asked TEXT NOT NULL,
        request TEXT NOT NULL, request_key TEXT, created INTEGER NOT NULL, started INTEGER, ended INTEGER,
        status TEXT NOT NULL DEFAULT 'queued', attempts INTEGER NOT NULL DEFAULT 0, beat INTEGER NOT NULL DEFAULT 0,
        progress TEXT, result TEXT, error TEXT, UNIQUE (tenant, request_key)
    ) STRICT""",
    "CREATE INDEX jobs_by_status ON jobs (status)",
    "CREATE TABLE job_files (job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, file TEXT NOT NULL) STRICT",
    "CREATE INDEX job_files_by_file ON job_files (file)",
    "CREATE INDEX job_files_by_job ON job_files (job)",
    """CREATE TABLE job_events (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, number INTEGER NOT NULL, at INTEGER NOT NULL,
        level TEXT NOT NULL, message TEXT NOT NULL, PRIMARY KEY (job, number)
    ) STRICT""",
)
STEPS = (FIRST, TENANTS, USAGE, UPLOADS, PLACES, BILLS, SHARED, JOBS)


def missing(taken: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(number, statements) of every step after `taken`. Raises IncompatibleStore for a registry of a newer
    deltaserve."""
    if taken > len(STEPS):
        raise IncompatibleStore(f"the registry has schema {taken}; this deltaserve knows up to {len(STEPS)}")
    return enumerate(STEPS[taken:], taken + 1)
