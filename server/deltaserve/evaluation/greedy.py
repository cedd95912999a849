"""Greedy answers, mostly known before they are generated.

With the reference as the draft, a model has said all of it up to the first token that it would not have said
(speculative decoding with one draft); only what comes after that token is generated.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from deltaserve.evaluation.predictions import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from deltaserve.evaluation.rows import Example

SPARE_TOKENS = 2  # an answer may be this much longer than the reference before it is cut off


def greedy_answers(
    model: PreTrainedModel, examples: Sequence[Example], said: Sequence[Tensor], ends: frozenset[int], rows: int
) -> list[list[int]]:
    """Tokens without their end. `said[i]` int64: what the model says in the place of each token of answer i."""
    from transformers import GenerationConfig

    known = [_agreed(own.tolist(), example.answer) for own, example in zip(said, examples, strict=True)]
    room = [len(e.answer) + SPARE_TOKENS - len(tokens) for tokens, e in zip(known, examples, strict=True)]
    unended = [index for index, tokens in enumerate(known) if not ends & set(tokens)]
    unended.sort(key=lambda index: (room[index], len(examples[index].prompt) + len(known[index])))
    for start in range(0, len(unended), rows):
        part = unended[start : start + rows]
        ids, mask = padded(model, [examples[index].prompt + known[index] for index in part])
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            max_new_tokens=room[part[-1]],
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        for index, new in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
            known[index] += new[: room[index]]
    return [list(takewhile(lambda token: token not in ends, tokens)) for tokens in known]


def _agreed(said: list[int], reference: list[int]) -> list[int]:
    """The answer as far as the reference tells it: up to and with the first token that is not the reference's."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, reference, strict=True)))
    return said[: same + 1]
