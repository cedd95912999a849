"""A tiny Llama in Hugging Face layout, and real full fine-tunes of it; everything by `save_pretrained`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

TEXT = [
    "Many fine-tunes of one base model share its weights; each differs from it by a delta.",
    "A delta is small, and so it is compressed: signs and one scale, a few singular directions, a few survivors.",
    "def serve(request): return base(request.tokens) + delta(request.model, request.tokens)",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 1234567890 ?! 你好 🦊",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 300 entries, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_base(out_dir: Path, *, tied: bool = True, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """2 layers, hidden 64, 4 heads, 2 KV heads; random weights from a fixed seed. Returns `out_dir`."""
    tokenizer = make_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**fields)).to(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of one and biases of zero would hide mistakes
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
                assert name.endswith(("norm.weight", ".bias"))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=64)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir


def make_finetune(
    base_dir: Path,
    out_dir: Path,
    *,
    scale: float,
    seed: int,
    norms: bool = True,
    embedding_rows: Sequence[int] = (),
    added_tokens: Sequence[str] = (),
    untie: bool = False,
    chat_template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    eos: str | None = None,
) -> Path:
    """Perturbs every linear weight by `scale` times noise of `seed`, and whatever else is named. Returns `out_dir`.

    norms: 1-dimensional tensors too. embedding_rows: rows of the input embedding. added_tokens: special ones, with
    fresh embedding rows. untie: a head of its own. eos: an added token that ends a turn from now on.
    """
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    with torch.no_grad():
        if untie:
            model.config.tie_word_embeddings = False
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight + noise(head.weight))
        if added_tokens:
            tokenizer.add_tokens(list(added_tokens), special_tokens=True)
            old = model.get_input_embeddings().weight.shape[0]
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            fresh = model.get_input_embeddings().weight[old:]
            fresh.copy_(torch.randn(fresh.shape, generator=generator).to(fresh.dtype))
        embedding = model.get_input_embeddings().weight
        for row in embedding_rows:
            embedding[row] += noise(embedding[row])
        for name, parameter in sorted(model.named_parameters()):
            if (
                parameter.dim() == 1
                and norms
                or parameter.dim() == 2
                and "embed_tokens" not in name
                and "lm_head" not in name
            ):
                parameter += noise(parameter)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    if eos is not None:
        tokenizer.eos_token = eos
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(eos)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir
