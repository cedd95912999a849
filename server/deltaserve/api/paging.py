"""Lists as OpenAI's: `after` the id of the last page's last object, `limit`, and `has_more`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query

from deltaserve.errors import BadRequest

T = TypeVar("T")
After = Annotated[str | None, Query(max_length=512, description="the id of the object after which the page begins")]
Limit = Annotated[int | None, Query(ge=1, le=10_000, description="objects of a page (default: all)")]


def page(
    items: Sequence[T],
    called: Callable[[T], str],
    card: Callable[[T], dict[str, Any]],
    after: str | None,
    limit: int | None,
) -> dict[str, Any]:
    """The list's reply; `called` is an item's id in its `card`. Raises BadRequest for an `after` that is not there."""
    start = 0
    if after is not None:
        start = next((place for place, item in enumerate(items, 1) if called(item) == after), 0)
        if not start:
            raise BadRequest(f"after: this list has no {after[:200]!r}", param="after")
    shown = items[start:] if limit is None else items[start : start + limit]
    data = [card(item) for item in shown]
    ends = (
        {"first_id": called(shown[0]), "last_id": called(shown[-1])} if shown else {"first_id": None, "last_id": None}
    )
    return {"object": "list", "data": data, **ends, "has_more": start + len(shown) < len(items)}
