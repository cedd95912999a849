"""Two full checkpoints → one artifact, tensor by tensor: Δ = W_ft − W_base → codec → packed terms and their error.

One tensor's worth of memory above the mapped inputs, whatever the model's size. What is no matrix of a linear or
convolution layer (norms, biases, embeddings, lm_head) travels as an override, unchanged tensors do not travel at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from deltaserve import __version__
from deltaserve.codecs.base import Codec, CodingError, LayerStats, Site, decode
from deltaserve.codecs.lossless import Lossless
from deltaserve.deltas.artifact import (
    MAX_MANIFEST_BYTES,
    Artifact,
    Override,
    deflated,
    override_spec,
    override_tensors,
    packed_order,
    restored_weight,
)
from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint, non_finite
from deltaserve.deltas.companions import changed_companions
from deltaserve.deltas.manifest import METADATA_KEY, PACKED, BaseSpec, ErrorSpec, LayerSpec, Manifest, OverrideSpec
from deltaserve.deltas.specs import term_spec, term_tensors
from deltaserve.deltas.specs.coded import CodedSpec
from deltaserve.deltas.tensorfile import DTYPE_NAMES, TensorFileWriter, atomic_file
from deltaserve.errors import CheckpointError, CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, Term, site_number

if TYPE_CHECKING:
    from pathlib import Path

Progress = Callable[[str, int, int], None]  # tensor name, tensors done, tensors in all
NAMED_BYTES = 20_000  # a tensor costs some 200 bytes of names and offsets: under 1 % where tensors are larger than this
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|position_embeddings|embed_in|embed_out|lm_head)\.")


class Grams(Protocol):
    """Input second moments, asked for in natural order: deltas.calibration."""

    def gram(self, name: str) -> Tensor | None: ...


def is_embedding(name: str) -> bool:
    """Input embeddings and output heads, by the names that the model families use."""
    return bool(EMBEDDING.search(name))


@dataclass(frozen=True)
class Scalars:
    """DBMS' two numbers of a layer: see manifest.LayerSpec."""

    gamma: float = 1.0
    base_shift: float = 0.0


def compress(
    base: Checkpoint,
    finetuned: Checkpoint,
    codec: Codec,
    out: Path,
    *,
    seed: int = 0,
    vector_bits: int = 16,
    grams: Grams | None = None,
    per_layer: Mapping[str, Codec] | None = None,
    scalars: Mapping[str, Scalars] | None = None,
    packed: bool | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Writes the artifact `out` (whole or not at all) and opens it. Raises CheckpointError listing every mismatch.

    `vector_bits` 16: norms and biases travel as they are; 1 … 8: as coded differences to the base's. `grams` gives each
    layer's H and is asked in natural order of names. `per_layer` overrides `codec` by name. `packed`: all
    tensors in one; None: where the file is small enough for names to matter.
    """
    if vector_bits != 16 and not 1 <= vector_bits <= 8:
        raise CodecError(f"vector bits {vector_bits}: not 1 … 8 or 16")
    if vector_bits != 16 and isinstance(codec, Lossless):
        raise CodecError(f"lossless: vector bits {vector_bits}: norms and biases travel as they are")
    check_pair(base, finetuned)
    manifest = make_manifest(base, finetuned, codec.name, codec.config(), seed)
    layers: dict[str, LayerSpec] = {}
    overrides: dict[str, OverrideSpec] = {}
    writer = TensorFileWriter(out.parent)
    try:
        names = sorted({*base.names, *finetuned.names}, key=natural_order)
        for done, name in enumerate(names):
            if progress:
                progress(name, done, len(names))
            before, after = read_pair(base, finetuned, name)
            if _is_same(before, after):
                continue
            if is_layer(name, after):
                chosen = (per_layer or {}).get(name, codec)
                gram = grams.gram(name) if grams and chosen.needs_gram else None
                layers[name] = _compress_layer(
                    name, before, after, chosen, Site(site_number(name), seed, gram), (scalars or {}).get(name), writer
                )
            else:
                overrides[name] = _override(name, before, after, vector_bits, writer)
        write_artifact(
            out, manifest.model_copy(update={"layers": layers, "overrides": overrides}), writer, packed=packed
        )
    finally:
        writer.close()
    if progress:
        progress("", len(names), len(names))
    return Artifact.open(out)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_pair(base: Checkpoint, finetuned: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """The tensor before and after, over mapped memory. Raises CheckpointError where one is not finite."""
    before, after = base.tensor(name), finetuned.tensor(name)
    if problem := non_finite(after) or non_finite(before):
        raise CheckpointError(f"{name}: {problem}")
    return before, after


def is_layer(name: str, tensor: Tensor) -> bool:
    """Is it compressed as a matrix? What is not travels as an override."""
    return tensor.dim() >= 2 and tensor.is_floating_point() and not is_embedding(name)


def layer_deltas(base: Checkpoint, finetuned: Checkpoint) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, Δ float32 [rows, cols], W_base float32 [rows, cols]) of every changed layer, in natural order."""
    for name in sorted({*base.names, *finetuned.names}, key=natural_order):
        before, after = read_pair(base, finetuned, name)
        if is_layer(name, after) and not _is_same(before, after):
            wide = before.float().flatten(1)
            yield name, after.float().flatten(1) - wide, wide


def layer_stats(base: Checkpoint, finetuned: Checkpoint) -> list[LayerStats]:
    """Of every changed layer, without sensitivities."""
    return [
        LayerStats(
            name=name,
            rows=len(delta),
            cols=delta.shape[1],
            norm=float(delta.norm()),
            std=float(delta.std(correction=0)),
            base_norm=float(before.norm()),
        )
        for name, delta, before in layer_deltas(base, finetuned)
    ]


def vector_parameters(base: Checkpoint, finetuned: Checkpoint) -> int:
    """Of the norms and biases that changed."""
    pairs = ((base.tensor(n), finetuned.tensor(n)) for n in base.names if len(base.entries[n].shape) == 1)
    return sum(after.numel() for before, after in pairs if not _is_same(before, after))


def _is_same(before: Tensor, after: Tensor) -> bool:
    """Bit by bit: the sign of a zero counts."""
    return before.shape == after.shape and torch.equal(_bits(before.to(after.dtype)), _bits(after))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _comes_back(before: Tensor, after: Tensor, terms: Sequence[Term], scalars: Scalars) -> bool:
    """Is what these terms are restored to the fine-tune's tensor, bit by bit?"""
    return _is_same(restored_weight(before, terms, scalars.gamma, scalars.base_shift, after.dtype), after)


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


def write_artifact(out: Path, manifest: Manifest, writer: TensorFileWriter, *, packed: bool | None = None) -> None:
    """Tensors and manifest → the file `out`, whole or not at all; `packed` None: where that saves a hundredth of it.

    Raises CodecError where it shall be packed and cannot be.
    """
    canonical = {name: types[0] for name, (_, types) in manifest.layout().items()}
    text = manifest.model_copy(update={"packed": True}).model_dump_json()
    possible = writer.dtypes == canonical and len(text.encode()) <= MAX_MANIFEST_BYTES
    if packed and not possible:
        raise CodecError("cannot be packed: a tensor is not of its canonical type, or the manifest is too long")
    if packed is None:
        packed = possible and writer.num_bytes < NAMED_BYTES * len(canonical)
    with atomic_file(out) as file:
        if packed:
            writer.write_as_one(file, PACKED, packed_order(canonical), {METADATA_KEY: deflated(text)})
        else:
            writer.write(file, {METADATA_KEY: manifest.model_dump_json()})


def _compress_layer(
    name: str,
    before: Tensor,
    after: Tensor,
    codec: Codec,
    site: Site,
    scalars: Scalars | None,
    writer: TensorFileWriter,
) -> LayerSpec:
    scalars = scalars or Scalars()
    delta = (after.float() - before.float()).flatten(1)
    terms = codec.encode(delta, site)
    if isinstance(codec, Lossless) and not _comes_back(before, after, terms, scalars):
        terms, scalars = codec.encode(after.float().flatten(1), site), Scalars(base_shift=-1)
        if not _comes_back(before, after, terms, scalars):
            raise CodecError(f"{name}: lossless holds float32, and its {DTYPE_NAMES[after.dtype]} numbers need more")
    specs = [term_spec(term) for term in terms]
    if problems := [problem for spec in specs for problem in spec.problems()]:
        raise CodecError(f"{name}: what {codec.name} makes of it cannot be served: {'; '.join(problems)}")
    for index, term in enumerate(terms):
        for key, tensor in term_tensors(term, f"{name}#{index}").items():
            writer.add(key, tensor)
    if isinstance(codec, Lossless):
        error = CodingError(relative=0.0, gain=1.0, cosine=1.0)
    else:
        error = CodingError.of(delta, scalars.gamma * decode(terms) + scalars.base_shift * before.float().flatten(1))
    return LayerSpec(
        shape=list(after.shape),
        dtype=DTYPE_NAMES[after.dtype],
        terms=specs,
        gamma=scalars.gamma,
        base_shift=scalars.base_shift,
        error=ErrorSpec(**{key: float(f"{value:.4g}") for key, value in asdict(error).items()}),
    )


def _override(name: str, before: Tensor, after: Tensor, vector_bits: int, writer: TensorFileWriter) -> OverrideSpec:
    dtype = DTYPE_NAMES[after.dtype]
    if vector_bits < 16 and after.dim() == 1 and after.is_floating_point() and len(after):
        coded = code_vector(after.float() - before.float(), vector_bits)
        for key, tensor in term_tensors(coded, f"{name}#difference").items():
            writer.add(key, tensor)
        return OverrideSpec(kind="add", shape=list(after.shape), dtype=dtype, coded=CodedSpec.of(coded))
    override = _make_override(before, after)
    for key, tensor in override_tensors(name, override).items():
        writer.add(key, tensor)
    return override_spec(override, dtype)


def code_vector(difference: Tensor, bits: int) -> Coded:
    """float32 [n] → a row of odd levels with one unbiased scale: ⟨v, v̂⟩ = ‖v‖². Ours."""
    peak = difference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    unit = difference / peak * 2**bits  # −2^b … 2^b, levels −2^b + 1, …, −1, 1, …, 2^b − 1
    codes = ((unit + 2**bits) / 2).floor().clamp(0, 2**bits - 1)
    levels = 2 * codes - (2**bits - 1)
    dot = (unit.double() * levels).sum()
    scale = peak / 2**bits * (unit.double().square().sum() / dot.clamp(min=1)).float()
    if not bool(difference.any()):
        scale = torch.zeros(())
    return Coded(1, len(difference), bits, "sign" if bits == 1 else "odd", layout.pack(codes[None], bits), row=scale)


def _make_override(before: Tensor, after: Tensor) -> Override:
    """Only the changed rows where that is shorter."""
    shape = tuple(after.shape)
    if after.dim() == 2:
        common = before.shape[0]
        changed = torch.ones(after.shape[0], dtype=torch.bool)
        changed[:common] = (_bits(before.to(after.dtype)) != _bits(after[:common])).any(1)
        rows = changed.nonzero().flatten()  # int64 [n]
        if len(rows) * (after.shape[1] * after.element_size() + 8) < after.nbytes:
            return Override(after[rows], rows, shape)
    return Override(after, None, shape)


def check_pair(base: Checkpoint, finetuned: Checkpoint) -> None:
    """Raises CheckpointError listing every tensor that does not pair up."""
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
