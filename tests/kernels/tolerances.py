"""How far a kernel may be from the float64 definition, by the dtype of its activations. The only such table.

relative RMS = ‖y − y₆₄‖ / ‖y₆₄‖        over the whole output, against decode(term) in float64
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_RMS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}

# The native kernels take x in bfloat16 and answer in float32; against bfloat16(x) · decode(term)ᵀ in float64.
# exact: only sums are rounded. split: 32-bit values as two of bfloat16, 16 bits of mantissa. rounded: to bfloat16,
# once: what is made of x before the product (column scales, transforms, between factors), values of tables and groups.
NATIVE_RELATIVE_RMS = {"exact": 2e-6, "split": 2e-5, "rounded": 8e-3}

# The fused kernels take x as float16 numbers of a common exponent (exact for bfloat16). rounded: to float16, once: what
# is made of x before the product, projections on a book, what lies between factors; tables.
FUSED_RELATIVE_RMS = {"exact": 1e-6, "rounded": 6e-4}

# Attention against its definition in float32: shares of the context are rounded to the type of the values.
ATTENTION_RELATIVE_RMS = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    error = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(error / torch.linalg.vector_norm(expected.double()))
