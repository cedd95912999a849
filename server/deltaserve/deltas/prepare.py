"""What a codec has to know before the first layer is coded: activations, curvature, a plan for the whole model.

Data-free codecs are given nothing and load no model. A codec that needs gram matrices gets those of the fine-tune on
the calibration texts; a planner sees all layers first, with their curvature where it asks for it: mean Fisher
information of an output times mean square of an input, what an entry of Δ means to the loss (deltas.gradients).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deltaserve.codecs.auto import LEAST_FILE, Auto
from deltaserve.codecs.base import Planner
from deltaserve.deltas.compress import compress, layer_stats, make_manifest
from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from deltaserve.codecs.base import Codec, LayerStats
    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.calibration import Text
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Grams, Progress

GRAM_TEXTS, GRADIENT_TEXTS = 64, 16
EXACT_VECTORS_FROM = 0.25  # bits per parameter: below, norms and biases are a noticeable part of the file
CODED_VECTOR_BITS = 4
FITTING_ROUNDS = 3


class Preparation:
    """The fine-tune at work on the calibration texts, loaded when something asks for it."""

    def __init__(self, base: Checkpoint, finetuned: Checkpoint, codec: Codec, calibration: str) -> None:
        self._model: PreTrainedModel | None = None
        self._texts: Sequence[Text] = ()
        self.layers: list[LayerStats] = []
        wants_curvature = isinstance(codec, Planner) and codec.needs_sensitivity
        if codec.needs_gram or wants_curvature:
            self._load(base, finetuned, codec, calibration)
        if isinstance(codec, Planner):
            self.layers = layer_stats(base, finetuned)
        if wants_curvature:
            self.layers = _with_curvature(self.layers, self._curvature())

    def grams(self) -> Grams | None:
        """New at every call: they are asked for layer by layer, once."""
        from deltaserve.deltas.calibration import Calibration

        return Calibration(self._model, self._texts) if self._model is not None else None

    def _load(self, base: Checkpoint, finetuned: Checkpoint, codec: Codec, calibration: str) -> None:
        from transformers.utils import logging

        from deltaserve.deltas.calibration import load_texts
        from deltaserve.deltas.companions import load_tokenizer
        from deltaserve.deltas.reference_model import load_reference

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it has one of its own for loading
        manifest = make_manifest(base, finetuned, codec.name, codec.config())  # the fine-tune's tokens and template
        self._texts = load_texts(calibration, load_tokenizer(base.directory, manifest), limit=GRAM_TEXTS)
        self._model = load_reference(base, None, finetuned, torch.bfloat16)

    def _curvature(self) -> dict[str, float]:
        from deltaserve.deltas.gradients import sensitivities

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
    calibration: str = "builtin",
    vector_bits: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """`compress` with what the codec needs; `auto`'s whole file is made to fit its bits.

    `calibration`: "builtin" or a JSON-lines file, read by codecs that are calibrated alone. `vector_bits` None: 4 where
    the codec has less than a quarter of a bit, else 16.
    """
    if progress:
        progress("measuring activations and curvature" if codec.needs_gram else "", 0, 1)
    ready = Preparation(base, finetuned, codec, calibration)
    bits: float | None = codec.budget(ready.layers) if isinstance(codec, Auto) else codec.config().get("bits")
    if vector_bits is None:
        vector_bits = CODED_VECTOR_BITS if isinstance(bits, float) and bits < EXACT_VECTORS_FROM else 16
    planned = codec
    for _ in range(FITTING_ROUNDS):
        artifact = compress(
            base,
            finetuned,
            planned,
            out,
            seed=seed,
            vector_bits=vector_bits,
            grams=ready.grams() if codec.needs_gram else None,
            per_layer=planned.plan(ready.layers) if isinstance(planned, Planner) else None,
            progress=progress,
        )
        if not isinstance(planned, Auto) or planned.bits is None or bits is None or artifact.bits_per_parameter <= bits:
            break
        less = planned.bits - (artifact.bits_per_parameter - bits)
        if less < LEAST_FILE:
            out.unlink()
            least = artifact.bits_per_parameter - planned.bits + LEAST_FILE
            raise CodecError(
                f"auto: a file of {bits:g} bits per parameter cannot be had; the least is about {least:.3g}"
            )
        planned = replace(planned, bits=less)
    return artifact


def _with_curvature(layers: list[LayerStats], curvature: Mapping[str, float]) -> list[LayerStats]:
    """A layer that the texts did not reach gets the mean of those that they did."""
    if not curvature:
        return layers
    mean = sum(curvature.values()) / len(curvature)
    return [replace(layer, sensitivity=curvature.get(layer.name, mean)) for layer in layers]
