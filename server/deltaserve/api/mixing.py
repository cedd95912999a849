"""Which models answer a request, and with which weight."""

from __future__ import annotations

from deltaserve.api.schemas import Generation
from deltaserve.engine.types import Mixture
from deltaserve.errors import BadRequest


def read_mixture(body: Generation) -> tuple[tuple[str, ...], Mixture | None]:
    """Names of the models whose tokens are computed, and how they are combined: None for one model alone. Models of
    weight 0 are left out. Raises BadRequest."""
    alpha = _alpha(body)
    if body.mixture is None:
        return (body.model,), None
    names = [member.model for member in body.mixture]
    if body.model not in names:
        raise BadRequest(
            f"model {body.model!r} is none of the mixture's; name the one whose chat template and defaults are used",
            param="model",
        )
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(f"the mixture names {name!r} more than once", param="mixture")
    weights = {member.model: member.weight for member in body.mixture if member.weight}
    total = sum(weights.values())
    if not total:
        raise BadRequest("the mixture's weights are all 0", param="mixture")
    if len(weights) == 1:
        return tuple(weights), None
    return tuple(weights), Mixture(tuple(weight / total for weight in weights.values()), alpha)


def _alpha(body: Generation) -> float:
    divergence = body.mixture_divergence or "reverse_kl"
    if body.mixture is None and (body.mixture_divergence is not None or body.mixture_alpha is not None):
        raise BadRequest("mixture_divergence and mixture_alpha need a mixture", param="mixture")
    if (divergence == "alpha") != (body.mixture_alpha is not None):
        raise BadRequest('mixture_alpha belongs to mixture_divergence "alpha", which needs it', param="mixture_alpha")
    return {"reverse_kl": 0.0, "forward_kl": 1.0, "alpha": body.mixture_alpha or 0.0}[divergence]
