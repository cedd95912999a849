"""What transformers itself answers to a few tokens, and whether the served model says the same.

A layer that is replaced, attention that is ours, a state that is kept elsewhere: whatever an architecture does that is
not known here shows at start, and not in an answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaserve.errors import CheckpointError
from deltaserve.model.attention import Span
from deltaserve.model.step import Step
from deltaserve_kernels.segments import Segments

if TYPE_CHECKING:
    from deltaserve.model.served import ServedModel

NUM_TOKENS = 13  # no model has as many heads: the axis of this length is the one of the tokens
CUTS = (0, 4, 11, 12, NUM_TOKENS)  # a prompt in three chunks, the last of one token, and a decode step
DECODES = (0, *range(CUTS[1], NUM_TOKENS + 1))  # a prompt, and decode steps
TOLERANCE = {torch.float32: 1e-3}  # of a row's logits, relative
COARSE = 0.1  # in any other type: attention differs in its roundings


@dataclass(frozen=True)
class Reference:
    """Answers of the model before any layer is replaced."""

    ids: Tensor  # int64 [13]
    logits: Tensor  # float32 [13, vocabulary]
    axes: Mapping[str, int]  # of each module's first input, which axis counts tokens

    @classmethod
    @torch.inference_mode()
    def of(cls, model: nn.Module, vocab_size: int, device: torch.device) -> Reference:
        ids = torch.arange(1, NUM_TOKENS + 1, device=device) * 7919 % vocab_size
        axes: dict[str, int] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(_module: nn.Module, given: tuple[Any, ...]) -> None:
                if given and isinstance(given[0], Tensor) and NUM_TOKENS in given[0].shape:
                    axes[name] = given[0].shape.index(NUM_TOKENS)

            return look

        with ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.callback(module.register_forward_pre_hook(watch(name)).remove)
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        return cls(ids, logits, axes)

    def check(self, model: ServedModel, block_size: int, cuts: Sequence[int] = CUTS) -> None:
        """Raises CheckpointError where `model`, the whole KV cache free, does not answer the same; `cuts`: rows at
        which steps begin and end."""
        refusal = "this architecture cannot be served"
        try:
            answered = torch.cat(list(self._answers(model, block_size, cuts)))
        except Exception as error:
            raise CheckpointError(f"{refusal}: {type(error).__name__}: {error}") from error
        distance = (answered - self.logits).norm(dim=-1) / self.logits.norm(dim=-1)
        # The median: an expert that wins by a rounding changes a row, not most of them. Rows of the first chunk need
        # nothing that was kept, and would say yes to a model that keeps it elsewhere.
        kept = float(distance[CUTS[1] :].median())
        if not kept <= TOLERANCE.get(model.dtype, COARSE):
            raise CheckpointError(
                f"{refusal}: it answers otherwise than in transformers (relative error of the logits {kept:.1e})"
            )

    def _answers(self, model: ServedModel, block_size: int, cuts: Sequence[int]) -> Iterator[Tensor]:
        blocks = range(-(-NUM_TOKENS // block_size))
        for start, stop in itertools.pairwise(cuts):
            own = torch.arange(stop - start, device=model.device)
            base = Segments.of([-1] * len(own))
            step = Step(len(own), base, base, (), [Span(0, len(own), stop, blocks)], block_size, model.device)
            yield model.forward(step, self.ids[start:stop], own + start, own)
