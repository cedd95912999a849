"""Two full checkpoints → one artifact, tensor by tensor: Δ = W_ft − W_base → codec → packed terms and their error.

One tensor's worth of memory above the mapped inputs, whatever the model's size. What is no matrix of a linear or
convolution layer (norms, biases, embeddings, lm_head) travels as an override, unchanged tensors do not travel at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from deltaserve import __version__
from deltaserve.codecs.base import Codec, CodingError, Site, decode
from deltaserve.deltas.artifact import (
    Artifact,
    Override,
    override_spec,
    override_tensors,
    term_spec,
    term_tensors,
)
from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint, non_finite
from deltaserve.deltas.companions import changed_companions
from deltaserve.deltas.manifest import METADATA_KEY, BaseSpec, ErrorSpec, LayerSpec, Manifest, OverrideSpec
from deltaserve.deltas.tensorfile import DTYPE_NAMES, TensorFileWriter, atomic_file
from deltaserve.errors import CheckpointError
from deltaserve_kernels.terms import site_number

if TYPE_CHECKING:
    from pathlib import Path

Progress = Callable[[str, int, int], None]  # tensor name, tensors done, tensors in all
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|position_embeddings|embed_in|embed_out|lm_head)\.")


def is_embedding(name: str) -> bool:
    """Input embeddings and output heads, by the names that the model families use."""
    return bool(EMBEDDING.search(name))


def compress(
    base: Checkpoint,
    finetuned: Checkpoint,
    codec: Codec,
    out: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """Writes the artifact `out` (whole or not at all) and opens it. Raises CheckpointError listing every mismatch."""
    _check_names(base, finetuned)
    manifest = make_manifest(base, finetuned, codec.name, codec.config(), seed)
    layers: dict[str, LayerSpec] = {}
    overrides: dict[str, OverrideSpec] = {}
    writer = TensorFileWriter(out.parent)
    try:
        names = sorted({*base.names, *finetuned.names})
        for done, name in enumerate(names):
            if progress:
                progress(name, done, len(names))
            before, after = base.tensor(name), finetuned.tensor(name)
            if problem := non_finite(after) or non_finite(before):
                raise CheckpointError(f"{name}: {problem}")
            if before.shape == after.shape and torch.equal(before.to(after.dtype), after):
                continue
            dtype = DTYPE_NAMES[after.dtype]
            if after.dim() >= 2 and after.is_floating_point() and not is_embedding(name):
                layers[name] = _compress_layer(name, before, after, codec, seed, dtype, writer)
            else:
                override = _make_override(before, after)
                overrides[name] = override_spec(override, dtype)
                for key, tensor in override_tensors(name, override).items():
                    writer.add(key, tensor)
        write_artifact(out, manifest.model_copy(update={"layers": layers, "overrides": overrides}), writer)
    finally:
        writer.close()
    if progress:
        progress("", len(names), len(names))
    return Artifact.open(out)


def make_manifest(
    base: Checkpoint, finetuned: Checkpoint, codec: str, config: dict[str, Any], seed: int = 0
) -> Manifest:
    """Everything but layers and overrides, known before the work begins. Raises CheckpointError."""
    try:
        return Manifest(
            base=BaseSpec(fingerprint=base.fingerprint, name=base.name),
            codec=codec,
            config=config,
            seed=seed,
            layers={},
            created_by=f"deltaserve {__version__}",
            **changed_companions(base, finetuned),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{finetuned.name}: a delta cannot carry its {where}: {first['msg']}") from None


def write_artifact(out: Path, manifest: Manifest, writer: TensorFileWriter) -> None:
    """Tensors and manifest → the file `out`, whole or not at all."""
    with atomic_file(out) as file:
        writer.write(file, {METADATA_KEY: manifest.model_dump_json(exclude_defaults=False)})


def _compress_layer(
    name: str, before: Tensor, after: Tensor, codec: Codec, seed: int, dtype: str, writer: TensorFileWriter
) -> LayerSpec:
    delta = (after.float() - before.float()).flatten(1)
    terms = codec.encode(delta, Site(site_number(name), seed))
    for index, term in enumerate(terms):
        for key, tensor in term_tensors(term, f"{name}#{index}").items():
            writer.add(key, tensor)
    error = CodingError.of(delta, decode(terms))
    return LayerSpec(
        shape=list(after.shape),
        dtype=dtype,
        terms=[term_spec(term) for term in terms],
        error=ErrorSpec(**asdict(error)),
    )


def _make_override(before: Tensor, after: Tensor) -> Override:
    """Only the changed rows where that is shorter."""
    shape = tuple(after.shape)
    if after.dim() == 2:
        common = before.shape[0]
        changed = torch.ones(after.shape[0], dtype=torch.bool)
        changed[:common] = (before.to(after.dtype) != after[:common]).any(1)
        rows = changed.nonzero().flatten()  # int64 [n]
        if len(rows) * (after.shape[1] * after.element_size() + 8) < after.nbytes:
            return Override(after[rows], rows, shape)
    return Override(after, None, shape)


def _check_names(base: Checkpoint, finetuned: Checkpoint) -> None:
    ours_by_name, theirs_by_name = _shapes(base), _shapes(finetuned)
    problems = [f"{name}: only in {base.name}" for name in base.names if name not in theirs_by_name]
    for name in sorted({*base.names, *finetuned.names} & theirs_by_name.keys()):
        if name not in ours_by_name:
            problems.append(f"{name}: only in {finetuned.name}")
            continue
        ours, theirs = ours_by_name[name], theirs_by_name[name]
        grown = is_embedding(name) and ours[1:] == theirs[1:] and theirs[0] > ours[0]
        if ours != theirs and not grown:
            problems.append(f"{name}: shape {theirs}, base has {ours}")
        types = [checkpoint.entries[name].dtype for checkpoint in (base, finetuned) if name in checkpoint.entries]
        if len({dtype.is_floating_point for dtype in types}) == 2:
            problems.append(f"{name}: type {DTYPE_NAMES[types[1]]}, base has {DTYPE_NAMES[types[0]]}")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:50])
        more = f"\n  … and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise CheckpointError(
            f"{finetuned.name} is no fine-tune of {base.name}; {len(problems)} differ:\n{shown}{more}"
        )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """By name, a tied head as the embedding that it is."""
    shapes = {name: checkpoint.entries[name].shape for name in checkpoint.names}
    if checkpoint.ties_lm_head and checkpoint.embedding_name:
        shapes[LM_HEAD] = shapes[checkpoint.embedding_name]
    return shapes
