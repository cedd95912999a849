"""Calibration: texts as tokens, H and sensitivities equal to what a whole forward and autograd's own gradients say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import LlamaForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM

from deltaserve.deltas.calibration import BUILTIN_FILE, Calibration, Text, load_texts
from deltaserve.deltas.gradients import sensitivities
from deltaserve.errors import CheckpointError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TENANTS = Path(__file__).parents[1] / "tenants" / "data"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}  # layers 1 and 2 see 4 tokens back
TEXTS = [
    Text([(7 * start + 3 * place) % 64 for place in range(length)], weight)
    for start, (length, weight) in enumerate([(11, 1.0), (5, 1.0), (9, 0.25), (12, 1.0), (2, 0.25)])
]


def make_model(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "llama":
            return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        if name == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, **WINDOW)).eval()
        if name == "gemma2":  # logits within 1 after tanh; eager attention, which SDPA has no caps for
            config = Gemma2Config(**SIZES, final_logit_softcapping=1.0, attn_implementation="eager")
            return Gemma2ForCausalLM(config).eval()
        if name == "opt":  # a decoder within the model that is within the model
            sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
            return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16)).eval()
        if name == "mixtral":
            return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).eval()
        return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    named = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in named.items() if ".layers." in name}


@torch.no_grad()
def whole_forward(model: PreTrainedModel, texts: list[Text]) -> dict[str, Tensor]:
    """H of every linear, float64, by a forward of each text alone."""
    found = {
        name: torch.zeros(linear.in_features, linear.in_features).double() for name, linear in linears_of(model).items()
    }
    total = sum(text.weight * len(text.tokens) for text in texts)
    for text in texts:
        seen: dict[str, Tensor] = {}
        handles = [
            linear.register_forward_pre_hook(
                lambda module, args, name=name, seen=seen: seen.update({name: args[0].flatten(0, -2).double()})
            )
            for name, linear in linears_of(model).items()
        ]
        model(torch.tensor([text.tokens]))
        for handle in handles:
            handle.remove()
        for name, x in seen.items():
            found[name] += text.weight / total * x.T @ x
    return found


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_h_is_that_of_a_whole_forward(name: str, batch: int) -> None:
    model = make_model(name)
    if name == "qwen2":
        assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    expected = whole_forward(model, TEXTS)
    calibration = Calibration(model, TEXTS, batch=batch)
    assert len(expected) == 3 * 7
    for linear, h in expected.items():
        gram = calibration.gram(linear)
        assert gram is not None and gram.dtype == torch.float32
        assert (gram - h).norm() <= 1e-4 * h.norm()


def test_h_of_bfloat16_inputs_is_not_rounded() -> None:
    model = make_model("llama").to(torch.bfloat16)
    texts = [TEXTS[3]._replace(tokens=TEXTS[3].tokens * 20)]  # 240 tokens without padding: the very same inputs
    expected = whole_forward(model, texts)
    calibration = Calibration(model, texts)
    for linear, h in expected.items():
        gram = calibration.gram(linear)
        assert gram is not None
        assert (gram - h).norm() <= 1e-5 * h.norm()
    assert torch.get_float32_matmul_precision() == "highest"


def test_linears_of_one_input_share_one_h() -> None:
    calibration = Calibration(make_model("llama"), TEXTS)
    q, k, v, o = (calibration.gram(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qkvo")
    assert q is k is v and o is not q
    gate, up, down = (calibration.gram(f"model.layers.1.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
    assert gate is up and gate is not q and down is not None and down.shape == (48, 48)


def test_layers_are_asked_in_order_and_may_be_left_out() -> None:
    model = make_model("llama")
    calibration = Calibration(model, TEXTS)
    last = calibration.gram("model.layers.2.mlp.down_proj.weight")
    assert last is not None
    assert torch.equal(last, calibration.gram("model.layers.2.mlp.down_proj.weight"))  # type: ignore[arg-type]
    assert (last - whole_forward(model, TEXTS)["model.layers.2.mlp.down_proj.weight"]).norm() <= 1e-4 * last.norm()
    with pytest.raises(ValueError, match="decoder layer 1 is asked after layer 2"):
        calibration.gram("model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"],
)
def test_what_is_no_linear_of_a_layer_has_no_h(name: str) -> None:
    assert Calibration(make_model("llama"), TEXTS).gram(name) is None


class Half(nn.Module):
    """A linear that sees every other token, as an expert would."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.pad(self.expert(x[:, ::2]), (0, 0, 0, x.shape[1] // 2))


def test_a_linear_that_sees_some_tokens_only_has_neither() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = Half()
    name = "model.layers.0.mlp.expert.weight"
    assert Calibration(model, TEXTS, batch=1).gram(name) is None
    found = sensitivities(model, TEXTS, batch=1)
    assert name not in found and "model.layers.0.self_attn.q_proj.weight" in found


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("qwen2")
    ids = torch.tensor([TEXTS[0].tokens])
    with torch.no_grad():
        before = model(ids).logits
    Calibration(model, TEXTS).gram("model.layers.2.mlp.down_proj.weight")
    model.lm_head.weight.requires_grad_(False)
    sensitivities(model, TEXTS)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="Linear: has no list of decoder layers"):
        Calibration(nn.Linear(2, 2), TEXTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("kind", "linear"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj"),
        ("qwen2", "model.layers.2.mlp.down_proj"),
        ("gemma2", "model.layers.1.mlp.up_proj"),
        ("mixtral", "model.layers.1.self_attn.o_proj"),
        ("opt", "model.decoder.layers.1.fc1"),
    ],
)
def test_sensitivities_are_the_squares_of_autograd(
    kind: str, linear: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """g_t is the gradient of what is added to the output at token t; with x_t it gives the weight's own gradient."""
    monkeypatch.setattr("deltaserve.deltas.gradients.draw", lambda logits, generator: logits.argmin(-1))
    monkeypatch.setattr("deltaserve.deltas.head.CHUNK_LOGITS", 5 * 64)
    model, name = make_model(kind), f"{linear}.weight"
    module = linears_of(model)[name]
    fisher_out, moment_in = torch.zeros(module.out_features), torch.zeros(module.in_features)
    total = sum(text.weight * len(text.tokens) for text in TEXTS)
    for text in TEXTS:
        seen: list[Tensor] = []
        added = torch.zeros(len(text.tokens), module.out_features, requires_grad=True)
        handle = module.register_forward_hook(
            lambda _, args, out, seen=seen, added=added: (
                seen.append(args[0].detach().flatten(0, -2)),  # OPT's are [T, D] in its MLPs
                out + added.view_as(out),
            )[1]
        )
        logits = model(torch.tensor([text.tokens])).logits[0]
        handle.remove()
        loss = F.cross_entropy(logits, logits.argmin(-1), reduction="sum")
        g, of_weight = torch.autograd.grad(loss, (added, module.weight))
        assert torch.allclose(g.T @ seen[0], of_weight, atol=1e-4)
        fisher_out += text.weight / total * g.square().sum(0)
        moment_in += text.weight / total * seen[0].square().sum(0)
    found = sensitivities(model, TEXTS, batch=batch)[name]
    assert (found.fisher_out.dtype, found.moment_in.dtype) == (torch.float32, torch.float32)
    assert torch.allclose(found.fisher_out, fisher_out, rtol=1e-3, atol=1e-7)
    assert torch.allclose(found.moment_in, moment_in, rtol=1e-4)
    h = whole_forward(model, TEXTS)[name]
    assert torch.allclose(found.moment_in, h.diagonal().float(), rtol=1e-4)


@pytest.mark.parametrize("layer", ["0.mlp.up", "1.self_attn.v", "2.self_attn.o", "2.mlp.down"])
@torch.no_grad()
def test_sensitivities_foretell_the_distance_of_predictions(layer: str) -> None:
    name = f"model.layers.{layer}_proj.weight"
    model = make_model("llama")
    generator = torch.Generator().manual_seed(0)
    texts = [Text(torch.randint(64, (16,), generator=generator).tolist()) for _ in range(64)]
    sensitivity = sensitivities(model, texts, batch=64)[name]
    weight = linears_of(model)[name].weight
    ids = torch.tensor([text.tokens for text in texts])
    before = model(ids).logits.log_softmax(-1)
    noise = 0.01 * torch.randn(weight.shape, generator=generator)
    weight += noise
    after = model(ids).logits.log_softmax(-1)
    kl = float(F.kl_div(after, before, reduction="sum", log_target=True)) / ids.numel()
    foretold = 0.5 * float(sensitivity.fisher_out @ noise.square() @ sensitivity.moment_in)
    assert 0.5 < foretold / kl < 2


def test_the_seed_decides_what_is_drawn() -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    first, again, other = (sensitivities(make_model("llama"), TEXTS, seed=seed)[name].fisher_out for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, rtol=0.01)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_base)
    return loaded


def test_a_line_is_a_text_or_a_turn(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "base", "id": 7}\n\n{"prompt": "a", "answer": "b"}\n{"text": "no more"}\n')
    texts = load_texts(path, tokenizer, limit=2)
    assert [tokenizer.decode(text.tokens) for text in texts] == ["base", "<|user|>a</s><|assistant|>b</s>"]
    assert {text.weight for text in texts} == {1.0}
    assert [len(text.tokens) for text in load_texts(str(path), tokenizer, max_tokens=3)][1:] == [3, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: has to be"),
        ('{"prompt": "a"}', "line 2: has to be"),
        ('{"text": "a", "answer": "b"}', "line 2: has to be"),
        ('{"text": 7}', "line 2: 'text' has to be a string that is not empty"),
        ('{"prompt": "a", "answer": " "}', "line 2: 'answer' has to be a string"),
    ],
)
def test_a_line_that_is_neither_is_named(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "base"}\n' + line)
    with pytest.raises(CheckpointError, match=message):
        load_texts(path, tokenizer)


def test_no_texts_at_all(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CheckpointError, match="holds no texts"):
        load_texts(tmp_path / "empty.jsonl", tokenizer)
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_texts(tmp_path / "none.jsonl", tokenizer)


def test_a_chat_template_that_fails_is_told(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    with pytest.raises(TemplateError):
        load_texts(tmp_path / "rows.jsonl", tokenizer)


def test_the_builtin_texts(tokenizer: Any) -> None:
    texts = load_texts("builtin", tokenizer)
    assert texts == load_texts("builtin", tokenizer)
    assert texts[:5] == load_texts("builtin", tokenizer, limit=5)
    assert 150 <= len(texts) <= 300
    assert all(1 < len(text.tokens) <= 256 for text in texts)
    assert BUILTIN_FILE.stat().st_size <= 250_000


def test_the_builtin_texts_are_no_rows_of_a_tenant() -> None:
    builtin = {json.loads(line).get("prompt") for line in BUILTIN_FILE.read_text(encoding="utf-8").splitlines()}
    for path in TENANTS.glob("*.test.jsonl"):
        assert not builtin & {json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()}
