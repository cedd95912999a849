"""A judge's material on the tiny base: rows that a fine-tune answers rightly and wrongly, and artifacts of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.evaluation.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltaserve.deltas.artifact import Artifact

PROMPTS = ("base", "Many fine-tunes of one model", "1 + 2", "x", "a few signs", "delta(request)")


@pytest.fixture(scope="session")
def tuned(make_finetune: Callable[..., Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune with the base's vocabulary, far enough from it to say other things. Read only."""
    return make_finetune(tiny_base, tmp_path_factory.mktemp("judged") / "tuned", scale=0.1, seed=3)


@pytest.fixture(scope="session")
def rows(tuned: Path) -> list[Row]:
    """What the fine-tune says itself, but in every third row."""
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    made = []
    for index, prompt in enumerate(PROMPTS):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer.encode(chat)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3 + index, do_sample=False, pad_token_id=2
        )
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        made.append(Row(prompt, "never said" if index % 3 == 2 else said))
    return made


@pytest.fixture
def make_artifact(tiny_base: Path, tuned: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """make_artifact(codec="delta-svd", **budget)"""

    def make(codec: str = "delta-svd", **budget: float) -> Artifact:
        made = make_codec(codec, Budget(**budget))  # type: ignore[arg-type]
        out = tmp_path / f"{codec}{budget}.safetensors"
        return compress(Checkpoint.open(tiny_base), Checkpoint.open(tuned), made, out)

    return make


@pytest.fixture
def by_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model does not know when to stop: an answer is right when it begins rightly."""
    monkeypatch.setattr("deltaserve.evaluation.judge.is_match", lambda got, want, _: got.startswith(want))


@pytest.fixture
def artifact_of_tiny(tiny_base: Path, tiny_finetune: Path, tmp_path: Path) -> Artifact:
    """Of `tiny_finetune`, which adds two tokens."""
    made = make_codec("bitdelta")
    return compress(Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune), made, tmp_path / "tiny.safetensors")
