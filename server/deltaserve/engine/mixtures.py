"""Several models' next-token distributions → one: multi-objective decoding (MOD, Shi et al. 2024, arXiv 2406.18853).

With p_i the model's distribution, w_i its weight (positive, sum 1) and L_i the log-probability under model i of what
was generated so far, the log-probability of the next token is, up to a constant,

    linear, alpha = 0 (reverse KL)      Σ_i w_i · ln p_i
    alpha in (0, 1], 1 = forward KL     −1/alpha · ln Σ_i w_i · exp(−alpha · (L_i + ln p_i))

both as in the authors' code (github.com/srzer/MOD, `f_value`), which scores whole sequences greedily: hence the L_i,
which cancel out of the linear form. It leaves out the factor 1/alpha, which changes no argmax; with it, a mixture of
equal models is that model when sampled, too, and alpha → 0 is the linear form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.engine.types import Mixture


def combine(mixture: Mixture, logits: Sequence[Tensor], history: Sequence[float]) -> Tensor:
    """One float32 [R, V] a model, and its L_i → log-probabilities of the mixture [R, V]. NaN anywhere makes NaN."""
    logprobs = torch.stack(list(logits)).log_softmax(-1)  # [k, R, V]
    weights = torch.tensor(mixture.weights, device=logprobs.device)[:, None, None]
    if not mixture.alpha:
        return (weights * logprobs).sum(0).log_softmax(-1)
    past = torch.tensor(history, dtype=torch.float64, device=logprobs.device)
    past = (past - past.amin()).float()[:, None, None]  # differences alone matter
    terms = weights.log() - mixture.alpha * (past + logprobs)
    return (-terms.logsumexp(0) / mixture.alpha).log_softmax(-1)
