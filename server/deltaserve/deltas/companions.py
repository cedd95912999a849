"""What a fine-tune changes beside its weights: tokens, chat template, generation defaults, a few fields of config.json.

Only differences from the base travel. A difference that a delta cannot carry is refused at compression, by name.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, get_args

from deltaserve.deltas.manifest import AddedToken, ConfigSpec, GenerationSpec, Manifest, SpecialToken
from deltaserve.errors import ArtifactMismatch, CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from deltaserve.deltas.checkpoint import Checkpoint

SPECIAL_TOKENS: tuple[str, ...] = get_args(SpecialToken)
GENERATION_FIELDS = tuple(GenerationSpec.__annotations__)
CARRIED_CONFIG = set(ConfigSpec.__annotations__)
# Fields that do not change what the model computes.
INERT_CONFIG = {
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "auto_map",  # code is never loaded
    "attention_dropout",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
TOKENIZER_SECTIONS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def changed_companions(base: Checkpoint, finetuned: Checkpoint) -> dict[str, Any]:
    """The manifest's fields for everything but tensors. Raises CheckpointError for what cannot travel."""
    return {
        "model_config_changes": _config_changes(base, finetuned),
        "chat_template": _changed(chat_template(base.directory), chat_template(finetuned.directory)),
        "added_tokens": _added_tokens(base, finetuned),
        "special_tokens": _special_token_changes(base, finetuned),
        "generation": _generation_changes(base, finetuned),
    }


def chat_template(directory: Path) -> str | None:
    """The default chat template of a model directory, None where it has none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template if isinstance(template, str) else None


def generation_defaults(directory: Path) -> dict[str, Any]:
    """The fields of generation_config.json that sampling uses."""
    fields = _read_json(directory / "generation_config.json")
    return {name: fields[name] for name in GENERATION_FIELDS if fields.get(name) is not None}


def end_ids(base: Checkpoint, manifest: Manifest | None, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of generation_config.json or else of config.json."""
    generation = {**generation_defaults(base.directory), **(manifest.generation if manifest else {})}
    config = {**base.config, **(manifest.model_config_changes if manifest else {})}
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return frozenset(int(token) for token in ids if token is not None)


def load_tokenizer(directory: Path, manifest: Manifest | None = None) -> PreTrainedTokenizerFast:
    """The base's tokenizer, with a delta's additions where one is given. Raises ArtifactMismatch, CheckpointError."""
    from tokenizers import AddedToken as FastToken
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: its tokenizer does not load: {error}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{directory}: only fast tokenizers (tokenizer.json) are served")
    if manifest is None:
        return tokenizer
    for token in manifest.added_tokens:
        fields = token.model_dump(exclude={"id", "content"})
        tokenizer.add_tokens([FastToken(token.content, **fields)])
        given = tokenizer.convert_tokens_to_ids(token.content)
        if given != token.id:
            raise ArtifactMismatch(f"added token {token.content!r}: id {token.id} in the delta, {given} on this base")
    for name, content in manifest.special_tokens.items():
        setattr(tokenizer, name, content)
    if manifest.chat_template is not None:
        tokenizer.chat_template = manifest.chat_template
    return tokenizer


def _config_changes(base: Checkpoint, finetuned: Checkpoint) -> dict[str, Any]:
    if "model_type" not in base.config or "model_type" not in finetuned.config:
        return {}
    ours, theirs = _normalised_config(base), _normalised_config(finetuned)
    changed = {name for name in {*ours, *theirs} - INERT_CONFIG if ours.get(name) != theirs.get(name)}
    refused = sorted(changed - CARRIED_CONFIG)
    if refused:
        lines = [f"  {name}: {theirs.get(name)!r}, base {ours.get(name)!r}" for name in refused]
        raise CheckpointError(
            f"{finetuned.name}: config.json differs from the base in what a delta cannot carry:\n" + "\n".join(lines)
        )
    return {name: theirs.get(name) for name in sorted(changed)}


def _normalised_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json as this version of transformers reads it, so that an older spelling is no difference."""
    from transformers import AutoConfig

    try:
        fields: dict[str, Any] = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.directory}: config.json does not load: {error}") from None
    return fields


def _tokenizer_json(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """tokenizer.json as this version of tokenizers writes it."""
    from tokenizers import Tokenizer

    path = checkpoint.directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(Tokenizer.from_file(str(path)).to_str())
    except Exception as error:  # tokenizers has no class of its own for it
        raise CheckpointError(f"{checkpoint.name}: tokenizer.json does not load: {error}") from None
    return fields


def _added_tokens(base: Checkpoint, finetuned: Checkpoint) -> list[AddedToken]:
    ours, theirs = _tokenizer_json(base), _tokenizer_json(finetuned)
    if ours is None or theirs is None:
        return []
    differing = [section for section in TOKENIZER_SECTIONS if ours.get(section) != theirs.get(section)]
    if differing:
        raise CheckpointError(
            f"{finetuned.name}: tokenizer.json differs from the base in {', '.join(differing)}; a delta carries added "
            "tokens, special tokens and a chat template"
        )
    before = {token["id"]: token for token in ours["added_tokens"]}
    after = {token["id"]: token for token in theirs["added_tokens"]}
    vocabulary = {number: content for content, number in ours["model"].get("vocab", {}).items()}
    problems = [
        f"  token {number}: {after.get(number)}, in the base {token}"
        for number, token in sorted(before.items())
        if after.get(number) != token
    ]
    new = [token for number, token in sorted(after.items()) if number not in before]
    for token in new:
        if vocabulary.get(token["id"], token["content"]) != token["content"]:
            problems.append(f"  token {token['id']}: {token['content']!r}, in the base {vocabulary[token['id']]!r}")
    if problems:
        raise CheckpointError(
            f"{finetuned.name}: tokenizer.json changes tokens of the base; a delta can only add tokens:\n"
            + "\n".join(problems[:50])
        )
    return [AddedToken(**token) for token in new]


def _special_token_changes(base: Checkpoint, finetuned: Checkpoint) -> dict[str, str]:
    ours, theirs = (_special_tokens(checkpoint.directory) for checkpoint in (base, finetuned))
    return {name: content for name, content in theirs.items() if ours.get(name) != content}


def _special_tokens(directory: Path) -> dict[str, str]:
    fields = _read_json(directory / "tokenizer_config.json")
    contents = {name: fields.get(name) for name in SPECIAL_TOKENS}
    plain = {name: value["content"] if isinstance(value, dict) else value for name, value in contents.items()}
    return {name: value for name, value in plain.items() if isinstance(value, str)}


def _generation_changes(base: Checkpoint, finetuned: Checkpoint) -> dict[str, Any]:
    ours, theirs = generation_defaults(base.directory), generation_defaults(finetuned.directory)
    return {name: value for name, value in theirs.items() if ours.get(name) != value}


def _changed(ours: str | None, theirs: str | None) -> str | None:
    return theirs if theirs != ours else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from None
    return fields if isinstance(fields, dict) else {}
