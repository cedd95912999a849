"""Calibration: texts, and the second moments of what every linear sees when the fine-tune reads them.

    H = Σ_t w_t · x_t·x_tᵀ / Σ_t w_t        float32 [in, in]
    x_t  input of the linear at token t     w_t  weight of its text

so that the mean error of an output is read off a matrix: E‖(Δ − Δ̂)·x‖² = tr((Δ − Δ̂)·H·(Δ − Δ̂)ᵀ), as in GPTQ
(arXiv 2210.17323, section 3, there H = 2·X·Xᵀ). The inputs are those of the uncompressed fine-tune.

The model runs one decoder layer at a time over the hidden states of all texts: in memory are those, and H of one layer.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaserve.deltas.reference_model import encode_row, exact_products, replaced_forwards
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is given besides hidden states: masks, rotations, …

BUILTIN = "builtin"
BUILTIN_FILE = Path(__file__).parents[1] / "data" / "calibration.jsonl"


class Text(NamedTuple):
    tokens: list[int]
    weight: float = 1.0  # of each of its tokens, against those of other texts
    start: int = 1  # the first token that is predicted: of an answer, the first after the prompt


class Batch(NamedTuple):
    """Texts of one weight, padded on the right, where causal layers never look."""

    ids: Tensor  # int64 [B, T]
    kept: Tensor  # int64 [kept tokens]: places in B · T that are no padding
    share: float  # of each kept token; over all batches the shares of tokens sum to 1
    predicting: Tensor  # int64 [n]: the places before predicted tokens

    def rows(self, tensor: Tensor) -> Tensor | None:
        """[kept tokens, …, D] of a tensor [B, T, D] or [B · T, D]; None where it holds not one row a token."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        return rows.index_select(0, self.kept) if len(rows) == self.ids.numel() else None

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """The final hidden states [n, D], at `predicting`."""
        hidden: Tensor = model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, self.predicting)


def load_texts(
    source: str | Path, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int = 256, limit: int | None = None
) -> list[Text]:
    """The first `limit` lines of a JSON-lines file, or of the one that is part of the product ("builtin").

    A line is {"text": …}, or {"prompt": …, "answer": …} for a turn in the chat template; what is longer than
    `max_tokens` is cut off. Raises CheckpointError naming the line at fault, TemplateError.
    """
    path = BUILTIN_FILE if source == BUILTIN else Path(source).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{source}: there is no such file (or {BUILTIN!r}, the texts of the product)")
    texts: list[Text] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(texts) == limit:
                break
            if line.strip():
                tokens, start = _encode(tokenizer, _fields(line, f"{path}: line {number}"), max_tokens)
                texts.append(Text(tokens[:max_tokens], start=start))
    if not texts:
        raise CheckpointError(f"{path}: holds no texts")
    return texts


def _fields(line: bytes, where: str) -> dict[str, str]:
    """{"text"} or {"prompt", "answer"} of a line; other fields are left out."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: no JSON: {error}") from None
    names = set(content) & {"text", "prompt", "answer"} if isinstance(content, dict) else set()
    if names not in ({"text"}, {"prompt", "answer"}):
        raise CheckpointError(f'{where}: has to be {{"text": …}} or {{"prompt": …, "answer": …}}')
    for name in sorted(names):
        if not isinstance(content[name], str) or not content[name].strip():
            raise CheckpointError(f"{where}: {name!r} has to be a string that is not empty")
    return {name: content[name] for name in names}


def _encode(tokenizer: PreTrainedTokenizerFast, fields: dict[str, str], max_tokens: int) -> tuple[list[int], int]:
    """Tokens, and the first that is predicted."""
    if "text" in fields:
        return tokenizer(fields["text"], truncation=True, max_length=max_tokens).input_ids, 1
    prompt, answer = encode_row(tokenizer, fields["prompt"], fields["answer"])
    return prompt + answer, len(prompt)


def make_batches(texts: Sequence[Text], size: int, device: torch.device) -> list[Batch]:
    """Texts of similar length together, the longest first: what they leave has room for all that follows."""
    total = sum(text.weight * len(text.tokens) for text in texts)
    batches = []
    ordered = sorted(texts, key=lambda text: (text.weight, len(text.tokens)), reverse=True)
    for weight, alike in groupby(ordered, key=lambda text: text.weight):
        group = list(alike)
        for first in range(0, len(group), size):
            part = group[first : first + size]
            width = len(part[0].tokens)
            ids = torch.tensor([text.tokens + [0] * (width - len(text.tokens)) for text in part], device=device)
            lengths = torch.tensor([[len(text.tokens)] for text in part], device=device)
            starts = torch.tensor([[text.start] for text in part], device=device)
            places = torch.arange(width, device=device)
            kept = (places < lengths).flatten().nonzero().squeeze(1)
            predicting = ((places >= starts - 1) & (places < lengths - 1)).flatten().nonzero().squeeze(1)
            batches.append(Batch(ids, kept, weight / total, predicting))
    return batches


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules that is in no other list, and its name."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in name.split("."))
    }
    if not lists:
        raise CheckpointError(f"{type(model).__name__}: has no list of decoder layers to calibrate")
    return max(lists.items(), key=lambda item: len(item[1]))


def layer_linears(prefix: str, layer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a module, by the names of their weights."""
    return {f"{prefix}.{n}.weight": module for n, module in layer.named_modules() if isinstance(module, nn.Linear)}


class Calibration:
    """H by the name of a weight, for a model that is the fine-tune. Layers are asked in their order."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, texts: Sequence[Text], *, batch: int = 8) -> None:
        name, self._layers = decoder_layers(model)
        self._linears = [layer_linears(f"{name}.{index}", layer) for index, layer in enumerate(self._layers)]
        self._layer_of = {name: index for index, names in enumerate(self._linears) for name in names}
        self._batches = make_batches(texts, batch, model.device)
        self._hidden, self._calls = _record(model, self._layers, self._batches)
        self._num_run = 0
        self._grams: dict[str, Tensor] = {}  # of layer _num_run − 1

    def gram(self, name: str) -> Tensor | None:
        """H of the linear whose weight is `name`, on the CPU; those of one input are one tensor.

        None for what is no linear of a decoder layer, or one that sees some tokens only (an expert). Raises ValueError
        for a layer before the one that was asked last.
        """
        index = self._layer_of.get(name)
        if index is None:
            return None
        if index < self._num_run - 1:
            raise ValueError(f"{name}: decoder layer {index} is asked after layer {self._num_run - 1}")
        while self._num_run <= index:
            self._grams = {}
            self._run(self._num_run, self._linears[index] if self._num_run == index else {})
            self._num_run += 1
        gram = self._grams.get(name)
        return None if gram is None else gram.cpu()

    @torch.no_grad()
    def _run(self, index: int, linears: dict[str, nn.Linear]) -> None:
        """The hidden states of all texts through one layer, what `linears` see added up on the way."""
        moments = _InputMoments()
        handles = [
            linear.register_forward_pre_hook(lambda module, args, name=name: moments.add(name, *args))
            for name, linear in linears.items()
        ]
        try:
            for number, batch in enumerate(self._batches):
                moments.batch = batch
                args, kwargs = self._calls[index][number]
                out = self._layers[index](self._hidden[number], *args, **kwargs)
                self._hidden[number] = out[0] if isinstance(out, tuple) else out
        finally:
            for handle in handles:
                handle.remove()
        self._calls[index] = []
        self._grams = moments.sums


class _InputMoments:
    """Σ share · x·xᵀ by linear; linears that are given the same tensor one after the other share one sum."""

    def __init__(self) -> None:
        self.batch: Batch
        self.sums: dict[str, Tensor] = {}
        self._latest: tuple[Tensor, str] | None = None

    def add(self, name: str, x: Tensor) -> None:
        if self._latest and self._latest[0] is x:
            self.sums[name] = self.sums[self._latest[1]]
            return
        rows = self.batch.rows(x)
        if rows is None:
            return
        self._latest = x, name
        if name not in self.sums:
            self.sums[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        with exact_products(x.dtype):
            # float32 [in, tokens], laid out so: twice as fast to multiply as rows of tokens
            columns = rows.T.to(torch.float32, memory_format=torch.contiguous_format)
            self.sums[name].addmm_(columns, columns.T, alpha=self.batch.share)


def _record(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """What the first layer reads, by batch, and what else every layer is called with, by layer and batch.

    The model runs with layers that note their arguments and hand their input on: masks may differ from layer to layer,
    but do not depend on what a layer returns.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in layers]

    def forward(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if index == 0:
            hidden.append(hidden_states)
        calls[index].append((args, kwargs))
        return hidden_states

    with replaced_forwards({layer: partial(forward, index) for index, layer in enumerate(layers)}):
        for batch in batches:
            model.base_model(input_ids=batch.ids, use_cache=False)  # without the output head
    return hidden, calls
