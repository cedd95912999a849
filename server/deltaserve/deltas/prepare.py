"""What a codec has to know before the first layer is coded: activations, curvature, a plan for the whole model.

Data-free codecs are given nothing and load no model. A codec that needs gram matrices gets those of the fine-tune on
the calibration texts; a planner sees all layers first, with their curvature where it asks for it: mean Fisher
information of an output times mean square of an input, what an entry of Δ means to the loss (deltas.gradients).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from deltaserve.codecs.auto import LEAST_FILE, MOST_FILE, TURNED_FROM, Auto
from deltaserve.codecs.base import Planner
from deltaserve.deltas.allocate import allocated, check_allocatable
from deltaserve.deltas.base_shift import find_gamma, fit_scalars, rescaled
from deltaserve.deltas.calibration import BUILTIN, Calibration, load_texts
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.deltas.compress import Scalars, compress, layer_stats, make_manifest, vector_parameters
from deltaserve.deltas.gradients import sensitivities
from deltaserve.deltas.lone_layers import LoneLayers
from deltaserve.deltas.reference_model import load_reference
from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from deltaserve.codecs.base import Codec, LayerStats
    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.calibration import Text
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Grams, Progress

GRAM_TEXTS, GRADIENT_TEXTS = 64, 16
LONE_TEXTS, LONE_TOKENS = 8, 16  # of a text so many before the first that is predicted, and so many predicted
CODED_VECTORS = ((0.02, 1), (0.25, 4))  # below so many bits per parameter, bits of an entry of norms and biases
FITTING_ROUNDS = 2
LAYER_BYTES = 36  # of a layer in a compressed manifest
ROOM, MOST_ROOM = 0.028, 0.007  # of a file's bits, and bits per parameter, for boosts and a header that no plan counts
SLACK = 0.03  # of a file's bits that may be left unused
SHIFT_BELOW = 0.02  # bits per parameter
SHIFT_TEXTS = 256
LOUD = 0.08  # of the weights: noise from which on auto looks for a smaller γ
SCALAR_BYTES = 12  # of the two numbers of a layer in a compressed manifest

BaseShift: TypeAlias = Literal["none", "task", "layer"]


class Preparation:
    """The fine-tune at work on the calibration texts, loaded when something asks for it."""

    def __init__(
        self, base: Checkpoint, finetuned: Checkpoint, codec: Codec, calibration: str, *, allocate: bool = False
    ) -> None:
        self._model: PreTrainedModel | None = None
        self._texts: Sequence[Text] = ()
        self.layers: list[LayerStats] = []
        wants_curvature = allocate or (isinstance(codec, Planner) and codec.needs_sensitivity)
        if codec.needs_gram or wants_curvature:
            self._load(base, finetuned, codec, calibration)
        if allocate or isinstance(codec, Planner):
            self.layers = layer_stats(base, finetuned)
        if wants_curvature:
            self.layers = _with_curvature(self.layers, self._curvature())

    def grams(self) -> Grams | None:
        """New at every call: they are asked for layer by layer, once."""
        return Calibration(self._model, self._texts) if self._model is not None else None

    def lone_layers(self, base: Checkpoint, finetuned: Checkpoint) -> LoneLayers:
        """A second fine-tune, in float32, on windows of some texts: every layer that is tried runs them again."""
        every = max(1, len(self._texts) // LONE_TEXTS)
        windows = [_window(text) for text in self._texts[::every][:LONE_TEXTS]]
        return LoneLayers(load_reference(base, None, finetuned, torch.float32), windows)

    def forget(self) -> None:
        """The model's memory back."""
        self._model = None

    def _load(self, base: Checkpoint, finetuned: Checkpoint, codec: Codec, calibration: str) -> None:
        manifest = make_manifest(base, finetuned, codec.name, codec.config())  # the fine-tune's tokens and template
        self._texts = load_texts(calibration, load_tokenizer(base.directory, manifest), limit=GRAM_TEXTS)
        self._model = load_reference(base, None, finetuned, torch.bfloat16)

    def _curvature(self) -> dict[str, float]:
        assert self._model is not None
        every = max(1, len(self._texts) // GRADIENT_TEXTS)
        measured = sensitivities(self._model, self._texts[::every][:GRADIENT_TEXTS])
        return {name: float(s.fisher_out.mean() * s.moment_in.mean()) for name, s in measured.items()}


def make_delta(
    base: Checkpoint,
    finetuned: Checkpoint,
    codec: Codec,
    out: Path,
    *,
    seed: int = 0,
    calibration: str = BUILTIN,
    base_shift: BaseShift | None = None,
    vector_bits: int | None = None,
    allocate: str | None = None,
    ready: Preparation | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """`compress` with what the codec needs; `auto`'s whole file is made to fit its bits.

    `calibration`: "builtin" or a JSON-lines file, read by codecs that are calibrated, and for `base_shift` (None:
    "layer" for `auto` below `SHIFT_BELOW` bits on texts of the user's, else "none"; then `auto` looks for one γ where
    its noise is `LOUD`). `vector_bits` None: fewer below a quarter of a bit, else 16. `allocate`: which of
    allocate.ALLOCATORS shares out the codec's bits among layers.
    `ready`: of an earlier call for the same pair and calibration. Raises CodecError, CheckpointError.
    """
    if allocate is not None:
        check_allocatable(codec, allocate)
    if progress:
        progress("measuring activations and curvature" if codec.needs_gram else "", 0, 1)
    lent = ready is not None
    if ready is None or allocate is not None:  # allocators need more than a lent one may have measured
        ready = Preparation(base, finetuned, codec, calibration, allocate=allocate is not None)
    bits: float | None = codec.budget(ready.layers) if isinstance(codec, Auto) else codec.config().get("bits")
    if vector_bits is None:
        vector_bits = _vector_bits(bits)
    if base_shift not in (None, "none") and codec.name == "lossless":
        raise CodecError("lossless: --base-shift would change what is exact")
    if base_shift is None:
        told = isinstance(codec, Auto) and bits is not None and bits < SHIFT_BELOW and calibration != BUILTIN
        base_shift = "layer" if told else "none"

    if allocate is not None:
        codec = allocated(
            base,
            finetuned,
            codec,
            allocate,
            ready.layers,
            seed=seed,
            grams=ready.grams() if codec.needs_gram else None,
            lone=lambda: ready.lone_layers(base, finetuned),
            progress=progress,
        )

    def once(planned: Codec) -> Artifact:
        return compress(
            base,
            finetuned,
            codec,
            out,
            seed=seed,
            vector_bits=vector_bits,
            grams=ready.grams() if codec.needs_gram else None,
            per_layer=planned.plan(ready.layers) if isinstance(planned, Planner) else None,
            progress=progress,
        )

    if isinstance(codec, Auto) and codec.bits is not None:
        scalars = SCALAR_BYTES if base_shift != "none" else 0
        parameters = max(sum(layer.parameters for layer in ready.layers), 1)
        beside = 8 * LAYER_BYTES * len(ready.layers) + vector_bits * vector_parameters(base, finetuned)
        artifact = _fitted(once, codec, 8 * scalars * len(ready.layers) / parameters, beside / parameters)
    else:
        artifact = once(codec)
    is_loud = base_shift == "none" and isinstance(codec, Auto) and codec.noise_of(ready.layers) > LOUD
    if artifact.manifest.layers and (base_shift != "none" or is_loud):
        limit = GRADIENT_TEXTS if is_loud else SHIFT_TEXTS
        texts = load_texts(calibration, load_tokenizer(base.directory, artifact.manifest), limit=limit)
        if not lent:
            ready.forget()
        if base_shift != "none":
            found = fit_scalars(base, finetuned, artifact, texts, span=base_shift, progress=progress).scalars
        else:
            gamma = find_gamma(base, finetuned, artifact, texts, progress=progress)
            found = dict.fromkeys(artifact.manifest.layers, Scalars(gamma=gamma)) if gamma < 1 else {}
        if found:
            artifact = rescaled(base, finetuned, artifact, found)
    return artifact


def _fitted(once: Callable[[Codec], Artifact], codec: Auto, reserved: float, beside: float) -> Artifact:
    """The file nearest below `codec.bits` − `reserved` that a few tries find, the first without what stands `beside`
    codes; all in bits per parameter. Raises CodecError naming the least."""
    assert codec.bits is not None
    limit = codec.bits - reserved
    room = ROOM * limit if limit >= TURNED_FROM else min(ROOM * limit, MOST_ROOM)
    planned = replace(codec, bits=max(limit - room - beside, LEAST_FILE))
    artifact, best = once(planned), None
    for _ in range(FITTING_ROUNDS):
        assert planned.bits is not None
        left = limit - artifact.bits_per_parameter
        if left >= 0:
            best = planned
            if left <= SLACK * limit:
                return artifact
        wanted = planned.bits + left - (SLACK / 2 * limit if left < 0 else 0)
        if wanted < LEAST_FILE:
            artifact.file.path.unlink()
            least = artifact.bits_per_parameter - planned.bits + LEAST_FILE + reserved
            raise CodecError(
                f"auto: a file of {codec.bits:g} bits per parameter cannot be had; the least is about {least:.3g}"
            )
        planned = replace(planned, bits=min(wanted, MOST_FILE))
        if best and planned == best:
            return artifact
        artifact = once(planned)
    if artifact.bits_per_parameter > limit and best:
        artifact = once(best)
    return artifact


def _window(text: Text) -> Text:
    first = max(0, text.start - LONE_TOKENS)
    return text._replace(tokens=text.tokens[first : text.start + LONE_TOKENS], start=text.start - first)


def _vector_bits(bits: object) -> int:
    """Norms and biases are a noticeable part of a small file."""
    if not isinstance(bits, float):
        return 16
    return next((coded for below, coded in CODED_VECTORS if bits < below), 16)


def _with_curvature(layers: list[LayerStats], curvature: Mapping[str, float]) -> list[LayerStats]:
    """A layer that the texts did not reach gets the mean of those that they did."""
    if not curvature:
        return layers
    mean = sum(curvature.values()) / len(curvature)
    return [replace(layer, sensitivity=curvature.get(layer.name, mean)) for layer in layers]
