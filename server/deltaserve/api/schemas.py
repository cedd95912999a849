"""Wire types of requests. Unknown fields are refused: what is not supported is a 400 that says so, never ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from deltaserve.engine.types import MAX_LOGPROBS

MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_MIXED = 8
MAX_TOOLS = 128


ONE_FAULT = Field(fail_fast=True)  # of a list: a report of a million faults takes a gigabyte
MAX_FIELDS = 1024  # of an object, for the same reason


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_FIELDS:
        raise ValueError(f"over {MAX_FIELDS} fields")
    return given


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is a lone surrogate") from None
    return text


Text: TypeAlias = Annotated[str, AfterValidator(_encodable)]
StopString: TypeAlias = Annotated[Text, Field(min_length=1, max_length=1024)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1), ONE_FAULT]
Texts: TypeAlias = Annotated[list[Text], ONE_FAULT]
Batch: TypeAlias = Annotated[list[TokenIds], ONE_FAULT]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    _bounded = model_validator(mode="before")(_few)


def example(**fields: Any) -> ConfigDict:
    """A model_config whose OpenAPI schema shows a body of these fields."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class StreamOptions(Wire):
    include_usage: bool | None = None


class TextFormat(Wire):
    type: Literal["text"]


class JsonObjectFormat(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Wire):
    """vLLM's fields; one of them is given."""

    json_: Annotated[dict[str, Any] | Text | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: (
        Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1024), ONE_FAULT] | None
    ) = None
    grammar: Text | None = None


class MixedModel(Wire):
    model: Text
    weight: Annotated[float, Field(ge=0, le=1e6)]


class Generation(Wire):
    """The fields that both endpoints share. None = the model's own default, else the server's."""

    model: Text
    mixture: Annotated[list[MixedModel], Field(min_length=1, max_length=MAX_MIXED), ONE_FAULT] | None = None
    mixture_divergence: Literal["reverse_kl", "forward_kl", "alpha"] | None = None
    mixture_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024), BeforeValidator(_few)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16), ONE_FAULT] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128), ONE_FAULT] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer that the request names."""
        longest: int | None = getattr(self, "max_completion_tokens", None)
        return longest if longest is not None else getattr(self, "max_tokens", None)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionIn(Generation):
    """POST /v1/completions"""

    model_config = example(model="acme", prompt="Once upon a time", max_tokens=32, temperature=0)

    prompt: Text | TokenIds | Annotated[Texts | Batch, Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        whole = [item for item in self.prompt if isinstance(item, int)]
        return [whole] if whole else [item for item in self.prompt if not isinstance(item, int)]


class TextPart(Wire):
    type: Literal["text"]
    text: Text


FunctionName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class CalledFunction(Wire):
    name: FunctionName
    arguments: Text

    @property
    def parsed(self) -> Any:
        """Templates write the arguments themselves."""
        return json.loads(self.arguments or "{}")

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, text: str) -> str:
        try:
            json.loads(text or "{}")
        except (ValueError, RecursionError):
            raise ValueError("no JSON") from None
        return text


class ToolCall(Wire):
    id: Annotated[Text, Field(max_length=128)]
    type: Literal["function"]
    function: CalledFunction


class Message(Wire):
    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], ONE_FAULT] | None = None
    name: Annotated[Text, Field(max_length=128)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS), ONE_FAULT] | None = None
    tool_call_id: Annotated[Text, Field(max_length=128)] | None = None
    # What the openai client sends back of an earlier answer: fields that this server leaves empty.
    refusal: None = None
    function_call: None = None
    annotations: None = None
    audio: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def for_template(self) -> dict[str, Any]:
        content = self.content or ""
        made: dict[str, Any] = {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.parsed},
                }
                for call in self.tool_calls or ()
            ],
        }
        return {key: value for key, value in made.items() if value or key == "content"}


class Function(Wire):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    name: FunctionName


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


class ChatIn(Generation):
    """POST /v1/chat/completions"""

    model_config = example(model="acme", messages=[{"role": "user", "content": "Hello"}], max_tokens=32, stream=True)

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096), ONE_FAULT]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS), ONE_FAULT] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
