"""A fine-tune and a recipe → an artifact: one entry for the command line and for the server's worker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deltaserve.deltas.adapters import import_adapter, is_adapter
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.prepare import make_delta
from deltaserve.evaluation import enough

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.compress import Progress
    from deltaserve.deltas.recipe import Recipe
    from deltaserve.evaluation.rows import Row
    from deltaserve.evaluation.search import Tried


class Made(NamedTuple):
    artifact: Artifact
    full_bytes: int  # of a full copy
    tried: list[Tried]  # the sizes that were measured, where `auto` looked for one


def make(
    recipe: Recipe,
    base: Checkpoint,
    source: str | Path,
    out: Path,
    *,
    rows: Sequence[Row] = (),
    progress: Progress | None = None,
) -> Made:
    """Writes the artifact `out`, whole or not at all. An adapter is kept as it is, whatever the recipe says; `rows` are
    those of `keep`. Raises CheckpointError, CodecError."""
    finetuned = Checkpoint.open(source)
    if is_adapter(Path(source)):
        return Made(import_adapter(base, Path(source), out, progress=progress), base.num_bytes, [])
    codec = recipe.make_codec()
    if not recipe.is_probed and recipe.keep is None and recipe.max_kl is None:
        artifact = make_delta(
            base,
            finetuned,
            codec,
            out,
            seed=recipe.seed,
            calibration=recipe.calibration,
            base_shift=recipe.base_shift,
            allocate=recipe.allocate,
            progress=progress,
        )
        return Made(artifact, finetuned.num_bytes, [])
    given = enough.Given(
        base=base,
        finetuned=finetuned,
        options=recipe.options,
        calibration=recipe.calibration,
        base_shift=recipe.base_shift,
        seed=recipe.seed,
        progress=progress,
    )
    if recipe.keep is not None:
        artifact, tried = enough.keep(given, recipe.keep, rows, recipe.scoring, out)
    elif recipe.max_kl is not None:
        artifact, tried = enough.stay_near(given, recipe.max_kl, out)
    else:
        artifact, tried = enough.probe(given, out)
    return Made(artifact, finetuned.num_bytes, tried)
