"""Is an artifact sound, and is it a delta of this base? Run on the CPU before anything else sees its tensors.

Every mismatch is listed, not only the first. Numbers are checked too: finite floats, row numbers in range and
ascending; stored places in range and in order; streams of the right length. Codes need no check: every bit pattern of
a code is a valid level, and a seeded mask's columns are computed, not stored.
"""

from __future__ import annotations

import math

from torch import Tensor

from deltaserve.deltas.artifact import Artifact, term_shape
from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint, non_finite
from deltaserve.deltas.compress import is_embedding
from deltaserve.deltas.manifest import LayerSpec, OverrideSpec
from deltaserve.deltas.specs import AnySpec
from deltaserve.deltas.specs.base import Layout
from deltaserve.deltas.specs.blocks import CodebookSpec
from deltaserve.deltas.tensorfile import DTYPE_NAMES, DTYPES
from deltaserve.errors import ArtifactMismatch, ArtifactNotFinite, ArtifactTooLarge, BaseMismatch

SHOWN = 1000  # more than any real model has layers to get wrong
MAX_TABLE_BYTES = 3 * 2**28  # of the codebooks that a delta needs in memory
MAX_RESIDENT = 4  # times the base: more than a full fine-tune, so that a small file cannot fill the memory


def check_against_base(artifact: Artifact, base: Checkpoint) -> None:
    """Raises BaseMismatch, ArtifactMismatch listing every wrong name, shape and type, or ArtifactTooLarge.

    Reads no tensor: what passes is safe to decode.
    """
    manifest = artifact.manifest
    if manifest.base.fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"made against the base {manifest.base.name!r} with fingerprint {manifest.base.fingerprint}; "
            f"this base is {base.name!r} with fingerprint {base.fingerprint}"
        )
    shapes = {name: entry.shape for name, entry in base.entries.items()}
    if base.ties_lm_head and base.embedding_name:
        shapes.setdefault(LM_HEAD, shapes[base.embedding_name])
    problems, expected = _expected_tensors(artifact, shapes)
    problems += _check_types(artifact, base) + _check_vocabulary(artifact, base, shapes)
    entries = artifact.entries
    for name, (shape, dtypes) in expected.items():
        if name not in entries:
            problems.append(f"{name}: missing")
        elif entries[name].shape != shape:
            problems.append(f"{name}: shape {entries[name].shape}, expected {shape}")
        elif entries[name].dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            problems.append(f"{name}: type {str(entries[name].dtype).removeprefix('torch.')}, expected {allowed}")
    problems += [f"{name}: the manifest does not mention it" for name in entries if name not in expected]
    _raise_all(problems)
    _check_memory(artifact, base)


def check_numbers(artifact: Artifact, base: Checkpoint) -> None:
    """Raises ArtifactNotFinite or ArtifactMismatch, naming every tensor at fault. Reads every float once."""
    bad = [f"{name}: {what}" for name in artifact.entries if (what := non_finite(artifact.read(name)))]
    if bad:
        raise ArtifactNotFinite(f"{len(bad)} tensors hold numbers that are not finite:\n" + _listed(bad))
    problems = [
        f"{name}#{index}: {problem}"
        for name in artifact.manifest.layers
        for index, term in enumerate(artifact.terms(name))
        for problem in term.problems()
    ]
    for name, spec in artifact.manifest.overrides.items():
        if spec.kind != "rows":
            continue
        rows, known = artifact.read(f"{name}#rows"), len(base.tensor(name))
        if not _ascending(rows, spec.shape[0]):
            problems.append(f"{name}#rows: not ascending row numbers below {spec.shape[0]}")
        elif int((rows >= known).sum()) != spec.shape[0] - known:
            problems.append(f"{name}#rows: rows {known} … {spec.shape[0] - 1} are new, and not all of them are stored")
    _raise_all(problems)


def _expected_tensors(artifact: Artifact, shapes: dict[str, tuple[int, ...]]) -> tuple[list[str], Layout]:
    problems: list[str] = []
    expected: Layout = {}
    for name, layer in artifact.manifest.layers.items():
        if name not in shapes:
            problems.append(f"{name}: the base has no such tensor")
            continue
        if tuple(layer.shape) != shapes[name] or len(layer.shape) < 2:
            problems.append(f"{name}: shape {tuple(layer.shape)}, base has {shapes[name]}")
        for index, term in enumerate(layer.terms):
            problems += _check_term(f"{name}#{index}", term, term_shape(layer))
        expected |= layer.layout(name)
    for name, override in artifact.manifest.overrides.items():
        problems += _check_override(name, override, shapes.get(name), expected)
        if name in artifact.manifest.layers:
            problems.append(f"{name}: both compressed and overridden")
    return problems, expected


def _check_memory(artifact: Artifact, base: Checkpoint) -> None:
    """A file may be far smaller than what it is decoded to, but that has an end."""
    if (resident := artifact.resident_bytes) > MAX_RESIDENT * base.num_bytes:
        raise ArtifactTooLarge(
            f"takes {resident} bytes in memory, over {MAX_RESIDENT} × the {base.num_bytes} of its base"
        )
    terms = [term for layer in artifact.manifest.layers.values() for term in layer.terms]
    books = [book for term in terms if isinstance(book := getattr(term, "term", term), CodebookSpec)]
    tables = {(book.book, book.stream, book.table_bits, book.tile * book.length): book.table_entries for book in books}
    if (num_bytes := 4 * sum(tables.values())) > MAX_TABLE_BYTES:
        raise ArtifactTooLarge(f"{len(tables)} codebooks of {num_bytes} bytes, at most {MAX_TABLE_BYTES}")


def _check_types(artifact: Artifact, base: Checkpoint) -> list[str]:
    """A weight stays a weight: floating where the base's tensor is, and only floating tensors are compressed."""
    problems = []
    manifest = artifact.manifest
    specs: list[tuple[str, LayerSpec | OverrideSpec]] = [*manifest.layers.items(), *manifest.overrides.items()]
    for name, spec in specs:
        if name in base.entries:
            ours, theirs = base.entries[name].dtype, DTYPES[spec.dtype]
            if ours.is_floating_point != theirs.is_floating_point:
                problems.append(f"{name}: type {spec.dtype}, base has {DTYPE_NAMES[ours]}")
            elif isinstance(spec, LayerSpec) and not ours.is_floating_point:
                problems.append(f"{name}: type {spec.dtype}, but only floating types are compressed")
            elif isinstance(spec, OverrideSpec) and spec.kind == "add" and not ours.is_floating_point:
                problems.append(f"{name}: type {spec.dtype}, but only floating types have differences")
    return problems


def _check_vocabulary(artifact: Artifact, base: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Every token has an embedding, the head has as many rows, and config.json says as many."""
    manifest, embedding = artifact.manifest, base.embedding_name
    if embedding is None:
        return []

    def rows(name: str) -> int:
        spec = manifest.overrides.get(name)
        return (spec.shape if spec and spec.shape else shapes[name])[0]

    size = rows(embedding)
    problems = [
        f"added token {token.content!r}: id {token.id}, but {embedding} has {size} rows"
        for token in manifest.added_tokens
        if token.id >= size
    ]
    if (not base.ties_lm_head or LM_HEAD in manifest.overrides) and LM_HEAD in shapes and rows(LM_HEAD) != size:
        problems.append(f"{LM_HEAD}: {rows(LM_HEAD)} rows, but {embedding} has {size}")
    unties = manifest.model_config_changes.get("tie_word_embeddings") is False
    if base.ties_lm_head and not unties and (LM_HEAD in manifest.overrides or LM_HEAD in manifest.layers):
        problems.append(f"{LM_HEAD}: changed, but it is the embedding unless tie_word_embeddings is false")
    said = manifest.model_config_changes.get("vocab_size", size)
    if said != size:
        problems.append(f"vocab_size: {said}, but {embedding} has {size} rows")
    return problems


def _check_term(name: str, term: AnySpec, shape: tuple[int, int]) -> list[str]:
    problems = [f"{name}: {problem}" for problem in term.problems()]
    if (term.rows, term.cols) != shape:
        problems.append(f"{name}: term of shape {(term.rows, term.cols)}, its layer needs {shape}")
    return problems


def _check_override(name: str, spec: OverrideSpec, base_shape: tuple[int, ...] | None, expected: Layout) -> list[str]:
    if base_shape is None:
        return [f"{name}: the base has no such tensor"]
    shape = tuple(spec.shape)
    grown = is_embedding(name) and len(shape) == 2 and shape[1:] == base_shape[1:] and shape[0] > base_shape[0]
    if shape != base_shape and not grown:
        return [f"{name}: shape {shape}, base has {base_shape}"]
    expected |= spec.layout(name)
    if spec.coded is not None and len(shape) != 1:
        return [f"{name}: only a vector is overridden by a difference, not {shape}"]
    if spec.coded is not None and spec.coded.mask is not None:
        return [f"{name}: a difference has no mask"]
    if spec.coded is not None:
        return _check_term(f"{name}#difference", spec.coded, (1, math.prod(shape)))
    if spec.kind == "replace":
        return []
    if len(shape) != 2:
        return [f"{name}: only a matrix is overridden by rows, not {shape}"]
    rows = spec.num_rows or 0
    if rows < shape[0] - base_shape[0]:
        return [f"{name}: {rows} rows stored, but {shape[0] - base_shape[0]} are new"]
    return []


def _ascending(rows: Tensor, limit: int) -> bool:
    if not len(rows):
        return True
    return bool(rows[0] >= 0) and bool(rows[-1] < limit) and bool((rows[1:] > rows[:-1]).all())


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ArtifactMismatch(f"{len(problems)} mismatches:\n{_listed(problems)}")


def _listed(problems: list[str]) -> str:
    more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "\n".join(f"  {problem}" for problem in problems[:SHOWN]) + more
