"""A .gguf file is a base like any other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The order of rows that llama.cpp's rotary embedding wants of a query or key projection."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(base: Path, out: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """`base` as llama.cpp would store it: matrices in `kind`, norms in F32."""
    config = json.loads((base / "config.json").read_text())
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_token_list(tokens)
    types = (gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens)
    writer.add_token_types(list(types))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in load_file(base / "model.safetensors").items():
        weight = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            weight = interleaved(weight, heads)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        stored = kind if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTASERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def even_base(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in float32; its sizes are multiples of the 32 values that Q8_0 packs together."""
    return tiny.make_base(tmp_path_factory.mktemp("even") / "base", dtype=torch.float32)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "dtype", "step"), [("F16", torch.float16, 1e-3), ("Q8_0", torch.bfloat16, 1e-2)])
def test_a_gguf_base_has_the_tensors_it_was_written_from(
    even_base: Path, tmp_path: Path, cache: Path, kind: str, dtype: torch.dtype, step: float
) -> None:
    path = write_gguf(even_base, tmp_path / "base.gguf", gguf.GGMLQuantizationType[kind])
    base = Checkpoint.open(path)
    wanted = load_file(even_base / "model.safetensors")
    assert base.name == "base"
    assert base.names == sorted(wanted)
    for name in base.names:
        assert base.tensor(name).dtype == dtype
        torch.testing.assert_close(base.tensor(name).float(), wanted[name], atol=step, rtol=step)
    assert base.config["rms_norm_eps"] == json.loads((even_base / "config.json").read_text())["rms_norm_eps"]
    before = [file.stat().st_mtime_ns for file in sorted(cache.rglob("*"))]
    assert Checkpoint.open(path).fingerprint == base.fingerprint
    assert [file.stat().st_mtime_ns for file in sorted(cache.rglob("*"))] == before  # converted once


def test_a_fine_tune_of_a_gguf_base_comes_back(
    workshop: Any, make_finetune: Callable[..., Path], even_base: Path, tmp_path: Path
) -> None:
    path = write_gguf(even_base, tmp_path / "base.gguf", gguf.GGMLQuantizationType.Q8_0)
    tuned = make_finetune(
        Checkpoint.open(path).directory, tmp_path / "tuned", scale=0.02, seed=4, added_tokens=("<|end|>",)
    )
    out = workshop.restore(path, workshop.compress(path, tuned, "delta-svd", rank=96), torch.float32)
    tokens = AutoTokenizer.from_pretrained(out).encode("a delta is small<|end|>")
    assert tokens == AutoTokenizer.from_pretrained(tuned).encode("a delta is small<|end|>")
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for place in (out, tuned)]
        ours, theirs = (model(torch.tensor([tokens])).logits for model in models)
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("keep", [0, 3, 100, -100])
def test_a_broken_gguf_file_is_refused_and_leaves_no_conversion(
    even_base: Path, tmp_path: Path, cache: Path, keep: int
) -> None:
    path = write_gguf(even_base, tmp_path / "base.gguf", gguf.GGMLQuantizationType.F16)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"base\.gguf"):
        Checkpoint.open(path)
    assert list(cache.iterdir()) == []
