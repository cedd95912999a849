"""Evaluation: zero distance where nothing is lost, the textbook's numbers where something is, whatever the batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.restore import restore
from deltaserve.errors import CheckpointError, TemplateError
from deltaserve.evaluation.evaluate import Evaluation, evaluate
from deltaserve.evaluation.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltaserve.deltas.artifact import Artifact

ROWS = [
    Row("base", "delta"),
    Row("Many fine-tunes of one model", "a few signs"),
    Row("1 + 2", "3"),
    Row("x", "y z y z"),
]


def artifact_of(base: Path, finetuned: Path, out: Path, codec: str = "bitdelta", **budget: float) -> Artifact:
    made = make_codec(codec, Budget(**budget))  # type: ignore[arg-type]
    return compress(Checkpoint.open(base), Checkpoint.open(finetuned), made, out)


@pytest.fixture
def artifact(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> Artifact:
    return artifact_of(tiny_base, tiny_finetune, tmp_path / "delta.safetensors")


def log_probabilities(directory: Path, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, alone and unpadded: log p over the answer's places, and the answer with its end."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": row.prompt}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    answer = [*tokenizer.encode(row.answer, add_special_tokens=False), tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return F.log_softmax(logits.double(), -1), torch.tensor(answer)


def test_a_delta_that_loses_nothing_has_no_distance_to_its_fine_tune(
    make_finetune: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    """New tokens, a head of its own, another end and template: all of it travels as it is."""
    finetuned = make_finetune(
        tiny_base,
        tmp_path / "tuned",
        scale=0,
        seed=1,
        untie=True,
        added_tokens=["<|a|>", "<|end|>"],
        eos="<|end|>",
        chat_template="{{ messages[0].content }}<|a|>",
    )
    artifact = artifact_of(tiny_base, finetuned, tmp_path / "delta.safetensors")
    result = evaluate(Checkpoint.open(tiny_base), artifact, ROWS, finetuned=Checkpoint.open(finetuned), batch=3)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    assert result.nats_per_token == result.finetuned_nats_per_token
    assert result.exact_match == result.finetuned_exact_match
    assert result.rows == len(ROWS)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_distances_are_those_of_rows_computed_one_by_one(
    artifact: Artifact, tiny_base: Path, tiny_finetune: Path, tmp_path: Path, batch: int
) -> None:
    base, finetuned = Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune)
    restore(base, artifact, tmp_path / "restored", dtype=torch.float32)
    kl, nats, agreeing = [], [], []
    for row in ROWS:
        p, answer = log_probabilities(tiny_finetune, row)
        q, _ = log_probabilities(tmp_path / "restored", row)
        kl.append((p.exp() * (p - q)).sum(-1))
        nats.append(-q.gather(1, answer[:, None])[:, 0])
        agreeing.append((p.argmax(-1) == q.argmax(-1)).double())
    result = evaluate(base, artifact, ROWS, finetuned=finetuned, batch=batch, dtype=torch.float32)
    assert result.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert result.kl and result.kl > 1e-3
    assert result.nats_per_token == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float(torch.cat(agreeing).mean()))


def test_the_base_itself_is_far_from_the_fine_tune(
    tiny_base: Path, make_finetune: Callable[..., Path], tmp_path: Path
) -> None:
    finetuned = make_finetune(tiny_base, tmp_path / "tuned", scale=0.1, seed=3)
    nothing = artifact_of(tiny_base, tiny_base, tmp_path / "nothing.safetensors")
    base = Checkpoint.open(tiny_base)
    far = evaluate(base, nothing, ROWS, finetuned=Checkpoint.open(finetuned))
    delta = artifact_of(tiny_base, finetuned, tmp_path / "delta.safetensors", "delta-svd", rank=48)
    near = evaluate(base, delta, ROWS, finetuned=Checkpoint.open(finetuned))
    assert near.kl is not None and far.kl is not None and 0 < near.kl < far.kl / 4


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_answers_are_those_of_prompts_alone_and_matched_with_their_own_row(
    make_finetune: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    finetuned = make_finetune(tiny_base, tmp_path / "tuned", scale=0.3, seed=3)
    artifact = artifact_of(tiny_base, finetuned, tmp_path / "delta.safetensors")
    base = Checkpoint.open(tiny_base)
    restore(base, artifact, tmp_path / "restored", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "restored")
    prompts = {"a": "base", "b": "Many fine-tunes of one base model", "c": "1 + 2", "d": "a few signs"}
    alone = {}
    for answer, prompt in prompts.items():
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text)])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        alone[answer] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(alone.values())) > 1
    monkeypatch.setattr("deltaserve.evaluation.greedy.SPARE_TOKENS", 6)  # an answer, its end and 6 more: 8 tokens
    seen = {}

    def match(got: str, want: str, scoring: str) -> bool:
        seen[want] = got
        return want == "c" and scoring == "last-number"

    monkeypatch.setattr("deltaserve.evaluation.judge.is_match", match)
    rows = [Row(prompt, answer) for answer, prompt in prompts.items()]
    result = evaluate(base, artifact, rows, batch=batch, dtype=torch.float32, scoring="last-number")
    assert seen == alone
    assert result.exact_match == 1 / 4


def test_without_the_fine_tune_there_is_no_distance(artifact: Artifact, tiny_base: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = evaluate(Checkpoint.open(tiny_base), artifact, ROWS, batch=2, progress=lambda *step: steps.append(step))
    assert result == Evaluation(4, result.exact_match, result.nats_per_token)
    assert [done for _, done, _ in steps] == list(range(len(steps)))
    assert {total for _, _, total in steps} == {steps[-1][1]}


def test_a_model_without_a_template_gets_the_bare_prompt(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> None:
    for source, name in ((tiny_base, "base"), (tiny_finetune, "tuned")):
        (tmp_path / name).mkdir()
        for file in source.iterdir():
            if file.name != "chat_template.jinja":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    artifact = artifact_of(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta.safetensors")
    result = evaluate(Checkpoint.open(tmp_path / "base"), artifact, ROWS, finetuned=Checkpoint.open(tmp_path / "tuned"))
    assert result.kl and result.kl > 0


def test_a_template_that_fails_is_named(make_finetune: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> None:
    broken = "{{ raise_exception('no users here') }}"
    finetuned = make_finetune(tiny_base, tmp_path / "tuned", scale=0.01, seed=1, chat_template=broken)
    artifact = artifact_of(tiny_base, finetuned, tmp_path / "delta.safetensors")
    with pytest.raises(TemplateError, match="no users here"):
        evaluate(Checkpoint.open(tiny_base), artifact, ROWS)


def test_a_fine_tune_of_another_model_is_refused(artifact: Artifact, tiny_base: Path, untied_base: Path) -> None:
    other = Checkpoint.open(untied_base)
    fields = {name: entry for name, entry in other.entries.items() if "q_proj" not in name}
    with pytest.raises(CheckpointError, match=r"missing or of another shape: .*q_proj"):
        evaluate(Checkpoint.open(tiny_base), artifact, ROWS, finetuned=Checkpoint(other.directory, "other", fields))
