"""A model run by transformers, not by the engine, and its tokens: what deltas are judged and calibrated against."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from deltaserve.deltas.restore import restored_names, restored_tensor
from deltaserve.errors import CheckpointError, TemplateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.checkpoint import Checkpoint


def load_reference(
    base: Checkpoint, artifact: Artifact | None, finetuned: Checkpoint | None, dtype: torch.dtype
) -> PreTrainedModel:
    """The fine-tune where it is given, else the base with the artifact restored, else the base alone.

    Tensors are made one by one and become the model's, without a copy; those of `dtype` stay mapped from the file.
    Raises CheckpointError when the directory does not load as a causal language model or tensors do not fill it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it has one of its own for loading
    source = finetuned or base
    restored = None if finetuned else artifact
    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=False)
        for name, value in restored.manifest.model_config_changes.items() if restored else ():
            setattr(config, name, value)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source.directory}: does not load as a causal language model: {error}") from None
    if restored:
        names = restored_names(base, restored)
        tensors = {name: restored_tensor(base, restored, name, dtype) for name in names}
    else:
        tensors = {name: source.tensor(name).to(dtype) for name in source.names}
    model: PreTrainedModel
    model, report = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    unfilled = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unfilled:
        raise CheckpointError(
            f"{source.name}: {len(unfilled)} tensors of the model are missing or of another shape: "
            + ", ".join(unfilled[:5])
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]
    return model


def encode_row(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """A user's turn in the chat template where there is one, raw otherwise; the answer with its end token.

    Raises TemplateError.
    """
    from jinja2 import TemplateError as JinjaError

    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (JinjaError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template fails on a user's message: {error}") from None
        before: list[int] = tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own
    else:
        before = tokenizer(prompt).input_ids
    after: list[int] = tokenizer(answer, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return before, after + end


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, modules run other functions; their hooks run as before."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """float32 products of numbers that are bfloat16 run on bfloat16 units where there are any (2.4 times as fast).

    Nothing is lost: such products are exact in float32, and they are summed in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
