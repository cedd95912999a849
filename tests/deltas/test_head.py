"""Heads: the very logits of their models, scales and caps included, without the body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
)

from deltaserve.deltas.head import Head
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gpt2, tied": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
    "gemma2, capped": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "cohere, scaled": CohereConfig(**SMALL, logit_scale=0.25),
    "granite, scaled": GraniteConfig(**SMALL, logits_scaling=4.0),
    "mixtral, experts": MixtralConfig(**SMALL, num_local_experts=2),
    "opt, a body within a body": OPTConfig(**OPT, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64),
}
IDS = torch.tensor([[5, 9, 20, 31, 77, 4, 4, 12]])


def make_model(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return model


@torch.no_grad()
def run(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states and logits of IDS."""
    hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[0]
    return hidden, model(input_ids=IDS, use_cache=False).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model_which_stays_as_it_was(name: str) -> None:
    model = make_model(name)
    hidden, logits = run(model)
    head = Head(model)
    assert head.vocab_size == 97
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), logits)
        torch.testing.assert_close(head(hidden[:3]), logits[:3])
        torch.testing.assert_close(head.log_p(hidden), logits.log_softmax(-1))
    torch.testing.assert_close(run(model)[1], logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_logits_are_not_rounded_to_the_type_of_the_model(name: str) -> None:
    model = make_model(name).bfloat16()
    hidden, rounded = run(model)
    with torch.inference_mode():
        found = Head(model, exact=True)(hidden)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    with torch.no_grad():
        expected = Head(model.float())(hidden.float())
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (rounded - expected).norm() > 1e-4 * expected.norm()


def test_gradients_go_through_a_head_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma2, capped")
    hidden = run(model)[0].requires_grad_()
    (expected,) = torch.autograd.grad(model.lm_head(hidden).div(2).tanh().mul(2).square().sum(), hidden)
    monkeypatch.setattr("deltaserve.deltas.head.CHUNK_LOGITS", 3 * 97 + 1)
    head = Head(model)
    pieces = head.pieces(hidden)
    assert [len(piece) for piece in pieces] == [3, 3, 2]
    (found,) = torch.autograd.grad(torch.cat([head(piece) for piece in pieces]).square().sum(), hidden)
    torch.testing.assert_close(found, expected)


def test_logits_that_are_made_of_more_than_hidden_states_are_refused() -> None:
    model = make_model("llama")

    def from_tokens(_module: Any, _args: Any, kwargs: Any, out: Any) -> Any:
        out.logits = out.logits + 9 * ("input_ids" in kwargs)
        return out

    model.register_forward_hook(from_tokens, with_kwargs=True)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM: its logits are made of more than its final hidden"):
        Head(model)
