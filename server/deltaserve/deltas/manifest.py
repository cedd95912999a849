"""The manifest of an artifact: what the JSON under `__metadata__["deltaserve"]` says. Format version 1.

Strict: unknown fields are refused, so that a newer format cannot be half-read.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

FORMAT: Literal["deltaserve-delta"] = "deltaserve-delta"
VERSION: Literal[1] = 1
METADATA_KEY = "deltaserve"

Natural: TypeAlias = Annotated[int, Field(ge=0, lt=2**48)]
Positive: TypeAlias = Annotated[int, Field(ge=1, lt=2**48)]
Shape: TypeAlias = Annotated[list[Natural], Field(max_length=8)]
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
TokenIds: TypeAlias = Annotated[list[Natural], Field(min_length=1, max_length=64)]
Label: TypeAlias = Annotated[str, Field(max_length=256)]
TokenText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]
SpecialToken: TypeAlias = Literal["bos_token", "eos_token", "pad_token", "unk_token"]


STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class Strict(BaseModel):
    model_config = STRICT


class MaskSpec(Strict):
    """terms.SeededMask; the seed is the artifact's, the site follows from the tensor's name."""

    kind: Literal["seeded-1-of-n"] = "seeded-1-of-n"
    group: Annotated[int, Field(ge=1, le=2**20)]


class CodedSpec(Strict):
    """terms.Coded: which tensors it has, and how they read. Tensors: NAME.codes, NAME.row, NAME.col."""

    kind: Literal["coded"] = "coded"
    rows: Positive
    cols: Positive
    bits: Literal[1, 4, 16, 32]
    grid: Literal["sign", "int", "float"]
    row: Literal["tensor", "row"] | None = None
    col: bool = False
    mask: MaskSpec | None = None


class LowRankSpec(Strict):
    """terms.LowRank. Tensors: NAME.s and those of NAME.left and NAME.right."""

    kind: Literal["low-rank"] = "low-rank"
    left: CodedSpec
    right: CodedSpec


TermSpec: TypeAlias = Annotated[CodedSpec | LowRankSpec, Field(discriminator="kind")]


class ErrorSpec(Strict):
    """codecs.base.CodingError."""

    relative: Finite
    gain: Finite
    cosine: Finite


class LayerSpec(Strict):
    """A compressed matrix: term j has the tensors LAYER#j.…; shape is the checkpoint's, rows × the rest for a term."""

    shape: Shape
    dtype: str  # of the fine-tune's tensor, safetensors' name
    terms: Annotated[list[TermSpec], Field(min_length=1, max_length=16)]
    error: ErrorSpec | None = None


class OverrideSpec(Strict):
    """A tensor that travels as it is.

    replace: tensor NAME. rows: NAME#rows int64 [n], ascending, and NAME#values [n, …].
    """

    kind: Literal["replace", "rows"]
    shape: Shape  # of the fine-tune's tensor: more rows than the base's where tokens were added
    dtype: str
    num_rows: Natural | None = None  # rows: how many are stored


class BaseSpec(Strict):
    """The base this delta was made against."""

    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    name: Label


class AddedToken(Strict):
    """One token that the fine-tune's tokenizer has and the base's has not (tokenizers.AddedToken)."""

    id: Natural
    content: TokenText
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class GenerationSpec(TypedDict, total=False):
    """Fields of generation_config.json that a delta may change, in the ranges that sampling takes."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Natural
    min_p: Annotated[float, Field(ge=0, le=1)]
    repetition_penalty: Annotated[float, Field(gt=0, le=10)]
    max_new_tokens: Natural
    eos_token_id: Natural | TokenIds


class ConfigSpec(TypedDict, total=False):
    """Fields of config.json that a delta may change."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    vocab_size: Positive
    tie_word_embeddings: bool
    bos_token_id: Natural | TokenIds | None
    eos_token_id: Natural | TokenIds | None
    pad_token_id: Natural | None
    max_position_embeddings: Positive


class Manifest(Strict):
    """Everything about an artifact but its tensors. Holds no time and no path: same inputs, same bytes."""

    format: Literal["deltaserve-delta"] = FORMAT
    version: Literal[1] = VERSION
    base: BaseSpec
    codec: Label
    config: dict[Label, bool | int | Finite | Label | None]
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    layers: dict[str, LayerSpec]
    overrides: dict[str, OverrideSpec] = {}
    chat_template: Annotated[str, Field(max_length=2**18)] | None = None
    added_tokens: Annotated[list[AddedToken], Field(max_length=65536)] = []
    special_tokens: dict[SpecialToken, TokenText] = {}  # that differ from the base: {"eos_token": "<|end|>"}
    generation: GenerationSpec = {}  # generation defaults that differ from the base
    model_config_changes: ConfigSpec = {}  # fields of config.json that differ from the base
    created_by: Label = ""
