"""Fixtures for every test: a tiny base and a maker of real fine-tunes of it (tests/support/tiny.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def _support(name: str) -> ModuleType:
    """tests/support/NAME.py; under --import-mode=importlib a test folder is on no path."""
    spec = importlib.util.spec_from_file_location(f"support_{name}", Path(__file__).parent / "support" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/support/tiny.py: `make_base`, `make_finetune`."""
    import torch

    torch.set_num_threads(1)
    return _support("tiny")


@pytest.fixture(scope="session")
def tiny_base(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: 2-layer random Llama, tied, bf16, real tokenizer, chat template. Read only."""
    return Path(tiny.make_base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture(scope="session")
def untied_base(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_base`, with a head of its own and attention biases. Read only."""
    return Path(tiny.make_base(tmp_path_factory.mktemp("untied") / "base", tied=False, attention_bias=True))


@pytest.fixture(scope="session")
def make_finetune(tiny: ModuleType) -> Callable[..., Path]:
    """tiny.make_finetune(base_dir, out_dir, *, scale, seed, …)."""
    maker: Callable[..., Any] = tiny.make_finetune
    return maker


@pytest.fixture(scope="session")
def tiny_finetune(
    make_finetune: Callable[..., Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fine-tune of `tiny_base` that changes everything a delta carries but the untied head. Read only."""
    return make_finetune(
        tiny_base,
        tmp_path_factory.mktemp("tiny") / "tuned",
        scale=0.02,
        seed=1,
        embedding_rows=(3, 7),
        added_tokens=("<|tool|>", "<|end_of_turn|>"),
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end_of_turn|>{% endfor %}",
        generation={"temperature": 0.5, "top_p": 0.9, "do_sample": True},
        eos="<|end_of_turn|>",
    )
