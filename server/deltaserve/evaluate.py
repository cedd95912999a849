"""How well a delta stands for its fine-tune on a task: answers, and the distance between the two models' predictions.

    exact match      share of rows whose greedy answer is the reference, by the chosen scoring
    nats per token   −log p of the reference answer and its end, mean over their tokens
    KL               Σ_v p(v) (log p(v) − log q(v)), p the fine-tune, q the restored model; mean over the same tokens
    top-1 agreement  share of the same tokens at which both models would say the same

Both models run by transformers, not by the engine: what is measured is the delta alone. Rows are JSON lines
{"prompt": …, "answer": …}.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from deltaserve.deltas.companions import end_ids, load_tokenizer
from deltaserve.deltas.restore import restored_names, restored_tensor
from deltaserve.deltas.tensorfile import DTYPES
from deltaserve.deltas.validate import check_against_base, check_numbers
from deltaserve.errors import CheckpointError, TemplateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from deltaserve.deltas.artifact import Artifact
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import Progress

Scoring = Literal["exact", "last-number"]
SPARE_TOKENS = 2  # an answer may be this much longer than the reference before it is cut off


class Row(NamedTuple):
    prompt: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """None: needs the fine-tune, which was not given."""

    rows: int
    exact_match: float
    nats_per_token: float
    finetuned_exact_match: float | None = None
    finetuned_nats_per_token: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


class _Example(NamedTuple):
    prompt: list[int]
    answer: list[int]  # with the end token
    reference: str


def load_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a JSON-lines file. Raises CheckpointError naming the line at fault."""
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: line {number}: no JSON: {error}") from None
            for name in Row._fields:
                value = fields.get(name) if isinstance(fields, dict) else None
                if not isinstance(value, str) or not value.strip():
                    raise CheckpointError(f"{path}: line {number}: {name!r} has to be a string that is not empty")
            rows.append(Row(fields["prompt"], fields["answer"]))
    if not rows:
        raise CheckpointError(f"{path}: holds no rows")
    return rows


def is_match(got: str, want: str, scoring: Scoring) -> bool:
    """exact: the same text, whatever its case; last-number: the same after the last "="."""
    if scoring == "last-number":
        return got.split("=")[-1].strip() == want.split("=")[-1].strip()
    return got.strip().lower() == want.strip().lower()


def evaluate(
    base: Checkpoint,
    artifact: Artifact,
    rows: Sequence[Row],
    *,
    finetuned: Checkpoint | None = None,
    batch: int = 16,
    dtype: torch.dtype | None = None,
    scoring: Scoring = "exact",
    progress: Progress | None = None,
) -> Evaluation:
    """Both models on `rows`; `dtype` None = the fine-tune's. Raises ArtifactError, CheckpointError, TemplateError."""
    check_against_base(artifact, base)
    check_numbers(artifact, base)
    tokenizer = load_tokenizer(base.directory, artifact.manifest)
    examples = sorted((_encode(tokenizer, row) for row in rows), key=lambda e: len(e.prompt) + len(e.answer))
    parts = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    sources = [None, finetuned] if finetuned else [None]  # None: the base with the artifact
    advance = _counter(progress, len(sources) * (1 + len(parts)) + len(parts))
    chosen = dtype or _finetuned_dtype(base, artifact)
    loaded = []
    for source in sources:
        advance("loading the fine-tune" if source else "restoring the model")
        loaded.append(_load(base, artifact, source, chosen))
    ends = sorted(end_ids(base, artifact.manifest, tokenizer))
    hits, nats = [0, 0], [0.0, 0.0]  # of the restored model, of the fine-tune
    positions, agreeing, divergence = 0, 0, 0.0
    for part in parts:
        for index, model in enumerate(loaded):
            advance(("answers of the restored model", "answers of the fine-tune")[index])
            hits[index] += _count_matches(model, tokenizer, part, ends, scoring)
        advance("predictions")
        for example, *predicted in zip(part, *(_predictions(model, part) for model in loaded), strict=True):
            answer = torch.tensor(example.answer, device=predicted[0].device)
            positions += len(answer)
            for index, log_p in enumerate(predicted):
                nats[index] += float(F.nll_loss(log_p, answer, reduction="sum"))
            if finetuned:
                ours, theirs = predicted
                divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
                agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    advance("")
    measured = Evaluation(len(rows), hits[0] / len(rows), nats[0] / positions)
    if not finetuned:
        return measured
    return replace(
        measured,
        finetuned_exact_match=hits[1] / len(rows),
        finetuned_nats_per_token=nats[1] / positions,
        kl=divergence / positions,
        top1_agreement=agreeing / positions,
    )


def _counter(progress: Progress | None, total: int) -> Callable[[str], None]:
    """A function that reports the step that begins."""
    done = itertools.count()
    return lambda name: progress(name, next(done), total) if progress else None


def _encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> _Example:
    """A prompt in the tenant's chat template where there is one, raw otherwise; the answer ends with its eos."""
    from jinja2 import TemplateError as JinjaError

    if tokenizer.chat_template:
        messages = [{"role": "user", "content": row.prompt}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (JinjaError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template fails on a user's message: {error}") from None
        prompt: list[int] = tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own
    else:
        prompt = tokenizer(row.prompt).input_ids
    answer: list[int] = tokenizer(row.answer, add_special_tokens=False).input_ids
    return _Example(prompt, answer + _eos(tokenizer), row.answer)


def _eos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _finetuned_dtype(base: Checkpoint, artifact: Artifact) -> torch.dtype:
    named = next(iter(artifact.manifest.layers.values()), None)
    return DTYPES[named.dtype] if named else base.entries[base.names[0]].dtype


def _load(base: Checkpoint, artifact: Artifact, finetuned: Checkpoint | None, dtype: torch.dtype) -> PreTrainedModel:
    """The restored model, or the fine-tune. Its tensors are made one by one and become the model's, without a copy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = finetuned or base
    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=False)
        for name, value in () if finetuned else artifact.manifest.model_config_changes.items():
            setattr(config, name, value)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source.directory}: does not load as a causal language model: {error}") from None
    if finetuned is None:
        names = restored_names(base, artifact)
        tensors = {name: restored_tensor(base, artifact, name, dtype) for name in names}
    else:
        tensors = {name: finetuned.tensor(name).to(dtype) for name in finetuned.names}
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


def _padded(model: PreTrainedModel, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids and attention mask, int64 [B, T] on the model's device, padded on the left."""
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences], device=model.device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=model.device)
    return ids, mask


@torch.inference_mode()
def _count_matches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, part: list[_Example], ends: list[int], scoring: Scoring
) -> int:
    """Greedy answers that match their reference."""
    from transformers import GenerationConfig

    ids, mask = _padded(model, [example.prompt for example in part])
    longest = max(len(example.answer) for example in part)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=longest + SPARE_TOKENS, eos_token_id=ends or None, pad_token_id=(ends or [0])[0]
    )
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(is_match(text, example.reference, scoring) for text, example in zip(texts, part, strict=True))


@torch.inference_mode()
def _predictions(model: PreTrainedModel, part: list[_Example]) -> Iterator[Tensor]:
    """log p of every token of the answer, the answer before it given: float32 [tokens, V] an example."""
    ids, mask = _padded(model, [example.prompt + example.answer for example in part])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    keep = max(len(example.answer) for example in part) + 1  # padded on the left: all answers end in the last column
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
    ).logits
    for row, example in enumerate(part):
        yield F.log_softmax(logits[row, -len(example.answer) - 1 : -1].float(), dim=-1)
