"""What the server asks of its worker (`deltaserve.worker`), as one line of JSON; and what it is told, a line each:

{"log": "info" | "warning", "message": str}
{"step": str, "fraction": float, "seconds_left": int | null}
{"report": {…}}                            the artifact lies at `out`; the last line
{"error": {"code": str, "message": str}}   or this
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Order:
    """`recipe`: fields of `deltas.recipe.Recipe`. `rows`: the file for its `keep`. `memory_bytes`: of address space."""

    base_directory: str
    base_name: str
    base_files: list[str]
    checkpoint: str
    out: str
    recipe: dict[str, Any]
    rows: str | None
    threads: int
    memory_bytes: int | None

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def parse(cls, line: str) -> Order:
        return cls(**json.loads(line))
