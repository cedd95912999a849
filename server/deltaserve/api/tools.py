"""What a chat may call, and how: the request's tools, the model's way to write calls, the grammar that forces them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaserve.api.constraints import ANY_OBJECT
from deltaserve.api.schemas import ChatIn, JsonObjectFormat, JsonSchemaFormat, NamedTool, Tool
from deltaserve.engine.grammars import Grammar
from deltaserve.engine.text import Profile
from deltaserve.engine.tool_calls import FORMATS, CallParser, ToolFormat, calls_grammar, detect_format
from deltaserve.errors import BadRequest

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolUse:
    """The tools that one chat may call."""

    form: ToolFormat
    tools: tuple[Tool, ...]
    grammar: Grammar | None  # None: the model writes what it likes
    is_named: bool

    @property
    def for_template(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]

    def parser(self) -> CallParser:
        return CallParser(self.form, {tool.function.name for tool in self.tools})


def read_tools(body: ChatIn, profile: Profile, parser: str) -> ToolUse | None:
    """None where no tool may be called. `parser`: a format's name, or auto. Raises BadRequest."""
    choice = body.tool_choice or "auto"
    if body.tools is None:
        if choice not in ("auto", "none") or body.parallel_tool_calls is not None:
            raise BadRequest("tool_choice and parallel_tool_calls need tools", param="tools")
        return None
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise BadRequest("two tools have the same name", param="tools")
    if choice == "none":
        return None
    if body.structured_outputs is not None:
        raise BadRequest("tools and structured_outputs exclude each other", param="structured_outputs")
    callable_tools = [
        t for t in body.tools if not isinstance(choice, NamedTool) or t.function.name == choice.function.name
    ]
    if not callable_tools:
        raise BadRequest("tool_choice names none of the tools", param="tool_choice")
    form = _format(profile, parser)
    grammar = _grammar(body, form, callable_tools, forced=choice != "auto")
    return ToolUse(form, tuple(body.tools), grammar, isinstance(choice, NamedTool))


def _format(profile: Profile, parser: str) -> ToolFormat:
    template = profile.chat_template or ""
    if "tools" not in template:
        raise BadRequest("this model's chat template takes no tools", param="tools")
    form = detect_format(template) if parser == "auto" else FORMATS[parser]
    if form is None:
        raise BadRequest(
            f"this model's chat template writes tool calls in no known way; known are {', '.join(FORMATS)}",
            param="tools",
        )
    return form


def _grammar(body: ChatIn, form: ToolFormat, tools: list[Tool], *, forced: bool) -> Grammar | None:
    answer: dict[str, Any] | None = None
    match body.response_format:
        case JsonObjectFormat():
            answer = ANY_OBJECT
        case JsonSchemaFormat(json_schema=named):
            answer = named.schema_
    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    if not forced and several and answer is None and not any(tool.function.strict for tool in tools):
        return None
    schemas = {
        t.function.name: NO_PARAMETERS if t.function.parameters is None else t.function.parameters for t in tools
    }
    return Grammar("lark", calls_grammar(form, schemas, forced=forced, several=several, answer=answer))
