"""Other decoders than Llama: served exactly as transformers runs them, or refused with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.resident import ResidentDelta
from deltaserve.deltas.restore import restore
from deltaserve.errors import ArtifactMismatch, CheckpointError

from ..isolation.rig import Rig, load, make_request

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROMPTS = [[5, 9, 20, 31, 77, 4, 4, 12, 25, 66, 13], [8], [3, 90, 51, 7, 7, 42]]
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-one-kv-head": LlamaConfig(**{**SMALL, "num_key_value_heads": 1, "head_dim": 10}),
    "llama3-rope": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=12),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral-window": MistralConfig(**SMALL, sliding_window=5),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    "gemma2": Gemma2Config(
        **SMALL, head_dim=8, sliding_window=5, attn_logit_softcapping=0.5, final_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "gpt-oss": GptOssConfig(**SMALL, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2),
    "longrope": Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters=LONG_ROPE),
    "dynamic-rope": LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
}


def save(config: Any, out: Path, change: float = 0.0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)  # norms of one would hide mistakes
        for parameter in model.parameters():
            parameter += change * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)
    return out


def greedy(directory: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Tokens of transformers with its own attention, and the logits they came from: the whole sequence each time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokens, rows = list(prompt), []
    for _ in range(num_tokens):
        with torch.no_grad():
            rows.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(rows)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("budget", [3, 64])
def test_prompts_and_answers_in_one_batch_are_those_of_transformers(name: str, budget: int, tmp_path: Path) -> None:
    base = save(CONFIGS[name], tmp_path / "base")
    rig = Rig.of(load(base, kv_slots=192), budget=budget, block_size=3)
    requests = [make_request(prompt, max_tokens=8) for prompt in PROMPTS]
    answers = rig.run(*requests)
    for prompt, request, answer in zip(PROMPTS, requests, answers, strict=True):
        expected, logits = greedy(base, prompt, 8)
        assert answer == expected
        torch.testing.assert_close(rig.logits(request), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["llama-tied", "qwen2", "qwen3", "mistral-window", "gemma2", "gemma3", "cohere", "granite"]
)
def test_a_tenant_among_base_rows_is_its_restored_checkpoint(name: str, tmp_path: Path) -> None:
    base = save(CONFIGS[name], tmp_path / "base")
    tuned = save(CONFIGS[name], tmp_path / "tuned", change=0.05)
    codec = make_codec("delta-svd", Budget(rank=4))
    artifact = compress(Checkpoint.open(base), Checkpoint.open(tuned), codec, tmp_path / "delta.safetensors")
    restore(Checkpoint.open(base), artifact, tmp_path / "restored", dtype=torch.float32)
    model = load(base, kv_slots=192)
    model.check_servable(artifact)
    if name in ("qwen3", "gemma3"):
        assert "model.layers.0.self_attn.q_norm.weight" in artifact.manifest.overrides
    rig = Rig.of(model, {"a": ResidentDelta.load(artifact)}, budget=7)
    requests = [make_request(prompt, digest, max_tokens=6) for prompt in PROMPTS for digest in (None, "a")]
    rig.run(*requests)
    for request in requests:
        directory = base if request.digest is None else tmp_path / "restored"
        tokens, logits = greedy(directory, list(request.prompt_ids), 6)
        torch.testing.assert_close(rig.logits(request), logits, rtol=1e-3, atol=1e-3)
        assert rig.answer(request) == tokens


def test_weights_of_a_layer_that_is_no_linear_one_are_refused_by_name(tmp_path: Path) -> None:
    base = save(CONFIGS["gpt2"], tmp_path / "base")
    tuned = save(CONFIGS["gpt2"], tmp_path / "tuned", change=0.05)
    codec = make_codec("bitdelta")
    artifact = compress(Checkpoint.open(base), Checkpoint.open(tuned), codec, tmp_path / "delta.safetensors")
    with pytest.raises(ArtifactMismatch, match=r"transformer\.h\.0\.attn\.c_attn\.weight: no linear layer"):
        load(base, kv_slots=16).check_servable(artifact)


def test_a_cap_on_logits_opens_no_token_that_another_tenant_added(tmp_path: Path) -> None:
    base = save(CONFIGS["gemma2"], tmp_path / "base")
    config = Gemma2Config(**{**CONFIGS["gemma2"].to_dict(), "vocab_size": 101})
    tuned = save(config, tmp_path / "tuned")
    codec = make_codec("bitdelta")
    artifact = compress(Checkpoint.open(base), Checkpoint.open(tuned), codec, tmp_path / "delta.safetensors")
    rig = Rig.of(load(base, kv_slots=64), {"a": ResidentDelta.load(artifact)})
    own, other = make_request(PROMPTS[0], "a"), make_request(PROMPTS[0])
    rig.run(own, other)
    assert rig.logits(own).shape[1] == 101 and rig.logits(own).isfinite().all()
    assert (rig.logits(other)[:, 97:] == -torch.inf).all() and rig.logits(other)[:, :97].isfinite().all()


def test_rope_that_changes_with_length_is_served_up_to_there(tmp_path: Path) -> None:
    assert load(save(CONFIGS["longrope"], tmp_path / "phi3"), kv_slots=64).max_positions == 64
    assert load(save(CONFIGS["dynamic-rope"], tmp_path / "llama"), kv_slots=64).max_positions == 128


REFUSED = {
    "attention_chunk_size": LlamaConfig(**SMALL, attention_chunk_size=8),
    "BloomForCausalLM has attention of its own": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "answers otherwise than in transformers": MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
    r"otherwise than in transformers \(relative": DiffLlamaConfig(**SMALL),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_answered_wrongly_is_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    base = save(REFUSED[reason], tmp_path / "base")
    with pytest.raises(CheckpointError, match=reason):
        load(base, kv_slots=16)


def test_a_directory_that_holds_no_decoder_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    (tmp_path / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not load"):
        load(tmp_path, kv_slots=16)


def test_two_models_in_one_process_keep_their_own_cache(tmp_path: Path) -> None:
    bases = [save(CONFIGS[name], tmp_path / name) for name in ("qwen2", "mistral")]
    rigs = [Rig.of(load(base, kv_slots=64)) for base in bases]
    for rig, base in zip(rigs, bases, strict=True):
        assert rig.run(make_request(PROMPTS[0], max_tokens=4))[0] == greedy(base, PROMPTS[0], 4)[0]
