"""The manifest of an artifact: what the JSON under `__metadata__["deltaserve"]` says. Format version 1.

Strict: unknown fields are refused, so that a newer format cannot be half-read.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import AfterValidator, Field, model_validator
from typing_extensions import TypedDict

from deltaserve.deltas.specs import TermSpec
from deltaserve.deltas.specs.base import SINGLE_FLOATS, STRICT, Layout, Positive, Strict
from deltaserve.deltas.specs.coded import CodedSpec
from deltaserve.deltas.tensorfile import DTYPES, MAX_NAME_CHARS

FORMAT: Literal["deltaserve-delta"] = "deltaserve-delta"
VERSION: Literal[1] = 1
METADATA_KEY = "deltaserve"
PACKED = "packed"
BASE_ROWS, BASE_COLS = "base_rows", "base_cols"


def checked_name(name: str) -> str:
    """As the names in a header."""
    if len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise ValueError(f"names are up to {MAX_NAME_CHARS} printable characters")
    return name


Natural: TypeAlias = Annotated[int, Field(ge=0, lt=2**48)]
Shape: TypeAlias = Annotated[list[Natural], Field(max_length=8)]
TypeName: TypeAlias = Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]  # safetensors' name
TensorName: TypeAlias = Annotated[str, AfterValidator(checked_name)]
Factor: TypeAlias = Annotated[float, Field(ge=-65536, le=65536, allow_inf_nan=False)]
Stored: TypeAlias = Annotated[bool, Field(exclude_if=lambda stored: not stored)]
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
TokenIds: TypeAlias = Annotated[list[Natural], Field(min_length=1, max_length=64)]
Label: TypeAlias = Annotated[str, Field(max_length=256)]
TokenText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]
SpecialToken: TypeAlias = Literal["bos_token", "eos_token", "pad_token", "unk_token"]


class ErrorSpec(Strict):
    """codecs.base.CodingError."""

    relative: Finite
    gain: Finite
    cosine: Finite


class LayerSpec(Strict):
    """A compressed matrix: term j has the tensors LAYER#j.…; shape is the checkpoint's, rows × the rest for a term.

    W = (1 + base_shift) · diag(rows) · W_base · diag(cols) + gamma · Σ_j Term_j

    gamma and base_shift are the two numbers of DBMS, arXiv 2505.11344; rows and cols the factors of (IA)³, arXiv
    2205.05638, 1 where not stored. A layer with factors may have no term.
    """

    shape: Shape
    dtype: TypeName  # of the fine-tune's tensor
    terms: Annotated[list[TermSpec], Field(max_length=16)]
    gamma: Factor = 1.0
    base_shift: Factor = 0.0
    base_rows: Stored = False  # LAYER#base_rows [rows]
    base_cols: Stored = False  # LAYER#base_cols [cols]
    error: ErrorSpec | None = None

    def layout(self, name: str) -> Layout:
        """Names in the file."""
        terms = enumerate(self.terms)
        named: Layout = {f"{name}#{i}.{key}": what for i, term in terms for key, what in term.layout().items()}
        if self.base_rows:
            named[f"{name}#{BASE_ROWS}"] = ((self.shape[0],), SINGLE_FLOATS)
        if self.base_cols:
            named[f"{name}#{BASE_COLS}"] = ((self.shape[1],), SINGLE_FLOATS)
        return named

    @model_validator(mode="after")
    def _changes_the_base(self) -> LayerSpec:
        if not (self.terms or self.base_rows or self.base_cols):
            raise ValueError("a layer has at least one term, or factors on the base's rows or columns")
        if (self.base_rows or self.base_cols) and len(self.shape) != 2:
            raise ValueError("only a matrix has factors on its rows and columns")
        return self


class OverrideSpec(Strict):
    """A tensor that travels as it is, or as a coded difference to the base's.

    replace: tensor NAME. rows: NAME#rows int64 [n], ascending, and NAME#values [n, …]. add: the tensors of `coded`, a
    matrix of one row, under NAME#difference.…
    """

    kind: Literal["replace", "rows", "add"]
    shape: Shape  # of the fine-tune's tensor: more rows than the base's where tokens were added
    dtype: TypeName
    num_rows: Natural | None = None  # rows: how many are stored
    coded: CodedSpec | None = None  # add

    def layout(self, name: str) -> Layout:
        """Names in the file."""
        shape, types = tuple(self.shape), (DTYPES[self.dtype],)
        if self.kind == "replace":
            return {name: (shape, types)}
        if self.kind == "rows":
            rows = self.num_rows or 0
            return {f"{name}#rows": ((rows,), (torch.int64,)), f"{name}#values": ((rows, *shape[1:]), types)}
        assert self.coded is not None
        return {f"{name}#difference.{key}": what for key, what in self.coded.layout().items()}

    @model_validator(mode="after")
    def _coded_where_added(self) -> OverrideSpec:
        if (self.kind == "add") != (self.coded is not None):
            raise ValueError("coded belongs to the kind add, and to no other")
        return self


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
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)]
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
    layers: dict[TensorName, LayerSpec]
    overrides: dict[TensorName, OverrideSpec] = {}
    chat_template: Annotated[str, Field(max_length=2**18)] | None = None
    added_tokens: Annotated[list[AddedToken], Field(max_length=65536)] = []
    special_tokens: dict[SpecialToken, TokenText] = {}  # that differ from the base: {"eos_token": "<|end|>"}
    generation: GenerationSpec = {}  # generation defaults that differ from the base
    model_config_changes: ConfigSpec = {}  # fields of config.json that differ from the base
    created_by: Label = ""
    packed: bool = False  # all tensors in one, PACKED: see artifact.py

    def layout(self) -> Layout:
        """Every tensor of the file."""
        named: Layout = {}
        specs: dict[str, LayerSpec | OverrideSpec] = {**self.layers, **self.overrides}
        for name, spec in specs.items():
            named |= spec.layout(name)
        return named
