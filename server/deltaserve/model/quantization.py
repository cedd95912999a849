"""The base's matrices in fewer bits, by torchao; deltas ride on top of what is left of them.

    y = x·Q(W_base)ᵀ + Σ x·Termᵀ        a fine-tune is then wrong by what its base is wrong by, and by no more

Weights alone: activations stay as they are, and so do embeddings, head and norms. int8: one scale a row. fp8: e4m3, one
scale a row. int4: a scale and a zero for each group of columns, on a GPU of 128; on a CPU of 32, as in many GGUF files
(SmolLM2's own: 0.004 nats a token, 0.34 in groups of 64), by torch's int4 product, a prototype of torchao 0.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

from deltaserve.errors import BadRequest, CheckpointError

if TYPE_CHECKING:
    from deltaserve.deltas.checkpoint import Checkpoint

Quantization: TypeAlias = Literal["none", "int8", "fp8", "int4"]


def check_stored_whole(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a base that is stored quantised: deltas are against what it was made of."""
    if (stored := checkpoint.config.get("quantization_config")) is not None:
        method = stored.get("quant_method", "quantised") if isinstance(stored, dict) else "quantised"
        raise CheckpointError(
            f"{checkpoint.directory}: its weights are stored as {method}; give the checkpoint that it was made of, and "
            "--quantization int8, fp8 or int4"
        )


def quantise(model: nn.Module, head: nn.Module | None, kind: Quantization) -> None:
    """Changes the linear layers of `model` but for its head. Raises BadRequest where that cannot be had."""
    if kind == "none":
        return
    try:
        from torchao import quantization as ao
    except ImportError:
        raise BadRequest(f"--quantization {kind} needs torchao: pip install 'deltaserve[quantization]'") from None
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "fp8": lambda: ao.Float8WeightOnlyConfig(),
        "int4": lambda: _int4(on_cpu=next(model.parameters()).device.type == "cpu"),
    }
    try:
        ao.quantize_(model, configs[kind](), lambda module, name: name in layers)
    except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise BadRequest(f"--quantization {kind}: torchao cannot do that here: {error}") from None
    if left := [name for name, layer in layers.items() if type(layer.weight) is nn.Parameter]:
        shape = tuple(layers[left[0]].weight.shape)  # torchao itself says nothing of them
        raise BadRequest(
            f"--quantization {kind}: torchao leaves {len(left)} matrices as they are, the first {left[0]} {shape}"
        )


def _int4(*, on_cpu: bool) -> Any:
    """torchao's configuration. Raises ImportError for a torchao that lacks it."""
    if on_cpu:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=128)
