"""How far a kernel may be from the float64 definition, by the dtype of its activations. The only such table.

relative RMS = ‖y − y₆₄‖ / ‖y₆₄‖        over the whole output, against decode(term) in float64
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_RMS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    error = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(error / torch.linalg.vector_norm(expected.double()))
