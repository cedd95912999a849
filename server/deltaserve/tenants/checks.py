"""What the registry's rows must be among themselves, as questions that find those that are not, and what mends them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from deltaserve.tenants.limits import Limits
from deltaserve.tenants.models import Models
from deltaserve.tenants.registry import Registry


@dataclass(frozen=True)
class Rule:
    """`find` selects (whose, what, key of the row); `mend` changes that row, with its key wherever it has a `?`, and
    loses nothing that anybody could reach. `says` is filled with `what`."""

    name: str
    is_error: bool  # does something fail for a tenant because of it?
    says: str
    find: str
    mend: str | None = None
    mends: str = ""


MODEL = "SELECT t.name || ':' || m.name, {what}, m.id FROM models m JOIN tenants t ON t.id = m.tenant WHERE {that}"
HAS_ANY = "EXISTS (SELECT 1 FROM versions v WHERE v.model = m.id)"
HAS = "EXISTS (SELECT 1 FROM versions v WHERE v.model = m.id AND v.version = {})"
NEWEST = "(SELECT MAX(version) FROM versions WHERE model = ?)"

RULES = (
    Rule(
        "pointer",
        True,
        "points to version {}, which there is not: every request for it is a 404",
        MODEL.format(what="m.active", that=f"NOT {HAS.format('m.active')} AND {HAS_ANY}"),
        f"UPDATE models SET active = {NEWEST}, revision = revision + 1 WHERE id = ?",
        "point it to its newest version",
    ),
    Rule(
        "pointer",
        True,
        "its canary points to version {}, which there is not: a share of its requests is a 404",
        MODEL.format(what="m.canary", that=f"m.canary IS NOT NULL AND NOT {HAS.format('m.canary')}"),
        "UPDATE models SET canary = NULL, revision = revision + 1 WHERE id = ?",
        "end the canary",
    ),
    Rule(
        "pointer",
        False,
        "has no version, so that nobody finds it",
        MODEL.format(what="0", that=f"NOT {HAS_ANY}"),
        "DELETE FROM models WHERE id = ?",
        "forget the name",
    ),
    Rule(
        "pointer",
        True,
        "counts {} versions and has a later one: the next upload fails",
        MODEL.format(what="m.last_version", that=f"m.last_version < {NEWEST.replace('?', 'm.id')}"),
        f"UPDATE models SET last_version = {NEWEST} WHERE id = ?",
        "count on from its newest version",
    ),
    Rule(
        "owner",
        False,
        "belongs to a tenant that was deleted; an admin can delete it",
        MODEL.format(what="0", that="t.deleted IS NOT NULL"),
    ),
    Rule(
        "owner",
        False,
        "is a key of a tenant that was deleted; it opens nothing",
        "SELECT t.name || '/' || k.id, 0, k.id FROM keys k JOIN tenants t ON t.id = k.tenant "
        "WHERE t.deleted IS NOT NULL",
        "DELETE FROM keys WHERE id = ?",
        "forget the key",
    ),
    Rule(
        "owner",
        False,
        "is shared with a tenant that was deleted",
        MODEL.format(
            what="0",
            that="m.id IN (SELECT s.model FROM shares s JOIN tenants o ON o.id = s.tenant WHERE o.deleted IS NOT NULL)",
        ),
        "DELETE FROM shares WHERE model = ? AND tenant IN (SELECT id FROM tenants WHERE deleted IS NOT NULL)",
        "end that share",
    ),
    Rule(
        "parts",
        False,
        "has ended, and parts of it are still listed",
        "SELECT DISTINCT u.id, 0, u.id FROM uploads u JOIN upload_parts p ON p.upload = u.id "
        "WHERE u.status != 'pending'",
        "DELETE FROM upload_parts WHERE upload = ?",
        "forget its parts",
    ),
    Rule(
        "usage",
        True,
        "counts less than nothing on {}: the bill of that day is wrong",
        "SELECT tenant_name || ':' || model, day, day FROM usage "
        "WHERE requests < 0 OR prompt_tokens < 0 OR completion_tokens < 0",
    ),
    Rule(
        "usage",
        False,
        "is billed on {}, and there never was such a tenant",
        "SELECT tenant_name, day, day FROM usage WHERE tenant NOT IN (SELECT id FROM tenants)",
    ),
)


def over_quota(registry: Registry) -> Iterator[tuple[str, str]]:
    """(tenant, what it holds beside what it may hold)"""
    models = Models(registry)
    for tenant, name, limits in registry.rows("SELECT id, name, limits FROM tenants WHERE deleted IS NULL"):
        bounds = Limits(**json.loads(limits))
        count, size = models.held_by(tenant)
        for what, held, most in (("models", count, bounds.max_models), ("bytes", size, bounds.max_bytes)):
            if most is not None and held > most:
                yield name, f"holds {held} {what} of at most {most}"
