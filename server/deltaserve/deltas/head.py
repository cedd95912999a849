"""What makes logits of final hidden states: a causal language model without its body.

    logits = head(hidden)        hidden [T, D], logits float32 [T, V]

by the model's own code, its scales and caps among it, so that predictions are kept, compared and differentiated in the
memory of their hidden states: logits take V / D times as much (85 times for a vocabulary of 49 152 at width 576).
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK_LOGITS = 2**22  # made at once
TOLERANCE = 0.02  # relative, ‖·‖₂: several times what bfloat16 rounds


class Head:
    """In memory: the modules after the body, shared with the model; with `exact` copies of them in float32."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, *, exact: bool = False) -> None:
        """Runs one token through the model. Raises CheckpointError where its logits are of more than hidden states."""
        body = model.get_decoder()  # type: ignore[no-untyped-call]
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._answer = _Answer(body(input_ids=token, use_cache=False))
        path = next(name for name, module in model.named_modules() if module is body)
        self._rest = _without(model, path.split("."), self._answer)
        if exact:
            self._rest = deepcopy(self._rest).float()
            self._answer = self._rest.get_submodule(path)  # type: ignore[assignment]
        self._dtype = torch.float32 if exact else model.dtype
        expected = model(input_ids=token, use_cache=False).logits[0].float()
        found = self(self._answer.body.last_hidden_state[0])  # type: ignore[index]
        self.vocab_size = expected.shape[-1]
        if float((found - expected).norm()) > TOLERANCE * float(expected.norm()):
            raise CheckpointError(f"{type(model).__name__}: its logits are made of more than its final hidden states")

    def __call__(self, hidden: Tensor) -> Tensor:
        """float32 [T, V]"""
        self._answer.body.last_hidden_state = hidden.to(self._dtype)[None]
        logits: Tensor = self._rest(inputs_embeds=self._answer.body.last_hidden_state, use_cache=False).logits
        return logits[0].float()

    def log_p(self, hidden: Tensor) -> Tensor:
        """float32 [T, V]"""
        return F.log_softmax(self(hidden), dim=-1)

    def pieces(self, hidden: Tensor) -> Sequence[Tensor]:
        """[some tokens, D], so many that their logits may be made at once."""
        return torch.split(hidden, max(1, CHUNK_LOGITS // self.vocab_size))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), nats, summed over the positions [T, V]."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


class _Answer(nn.Module):
    """A body that answers what it is told to."""

    def __init__(self, body: BaseModelOutputWithPast) -> None:
        super().__init__()
        self.body = body

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return self.body


def _without(module: nn.Module, path: Sequence[str], answer: nn.Module) -> nn.Module:
    """The module again, with another one at the place; all others are shared."""
    if not path:
        return answer
    bare = copy(module)
    bare._modules = {**module._modules, path[0]: _without(getattr(module, path[0]), path[1:], answer)}
    return bare
