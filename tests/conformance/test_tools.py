"""Tool calls through the official client: templates, forced and free choices, streams, and the way back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import jsonschema
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import openai

TURNS = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments.city }}</tool_call>{% endfor %}"
    "{{ m.content }}{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{% endfor %}[assistant]"
)
HERMES = "{% for t in tools or [] %}{{ t.function.name }},{% endfor %}" + TURNS
LLAMA = (
    '{% if tools %}Environment: ipython {"name": "", "parameters": {}} {{ tools | length }}{% endif %}'
    + TURNS.replace("<tool_call>", "").replace("</tool_call>", "")
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["CET", "UTC"]}}, "required": ["zone"]}
TIME |= {"additionalProperties": False}
SCHEMAS = {"weather": WEATHER, "time": TIME}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "…", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASK: Any = [{"role": "user", "content": "How is the weather?"}]
ASKED: Any = {"messages": ASK, "tools": TOOLS, "temperature": 1.0, "seed": 1, "max_tokens": 200}
MODELS = ["hermes", "llama"]


@pytest.fixture(scope="module")
def callers(make_tenant: Callable[..., Any]) -> dict[str, Any]:
    templates = {"hermes": HERMES, "llama": LLAMA}
    return {
        name: make_tenant(name, "bitdelta", seed=8 + place, chat_template=template)
        for place, (name, template) in enumerate(templates.items())
    }


@pytest.fixture(scope="module")
def client(
    process: Any, tiny_base: Any, callers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    with process.ServerProcess(tiny_base, tmp_path_factory.mktemp("tools") / "store") as server:
        server.wait_ready()
        for name, caller in callers.items():
            assert server.upload(name, caller.artifact).status_code == 201
        with server.client() as made:
            yield made


def check(calls: Any) -> list[str]:
    """Names of the calls; the arguments of each are valid."""
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in calls]


@pytest.mark.parametrize("model", MODELS)
def test_a_required_call_is_made_in_every_choice(model: str, client: openai.OpenAI) -> None:
    asked = {**ASKED, "temperature": 2, "n": 12}
    reply = client.chat.completions.create(model=model, tool_choice="required", parallel_tool_calls=False, **asked)
    names = []
    for choice in reply.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        names += check(choice.message.tool_calls)
    assert len(names) == 12
    assert set(names) == {"weather", "time"}


@pytest.mark.parametrize("model", MODELS)
def test_a_named_call_is_that_one(model: str, client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "time"}}
    reply = client.chat.completions.create(model=model, tool_choice=choice, **ASKED).choices[0]
    assert check(reply.message.tool_calls) == ["time"]
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_of_calls_is_the_whole_answer(model: str, client: openai.OpenAI) -> None:
    asked = {**ASKED, "model": model, "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls
    calls: dict[int, Any] = {}
    reasons, pieces = [], 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        assert not choice.delta.content
        reasons.append(choice.finish_reason)
        for delta in choice.delta.tool_calls or []:
            if delta.id:
                assert delta.type == "function" and delta.function.arguments == ""
                calls[delta.index] = [delta.function.name, ""]
            else:
                calls[delta.index][1] += delta.function.arguments
                pieces += 1
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])
    assert [calls[index] for index in sorted(calls)] == [[c.function.name, c.function.arguments] for c in whole or []]
    assert pieces > 2


@pytest.mark.parametrize(("model", "first"), [("hermes", "<"), ("llama", "{")])
def test_the_model_chooses_between_a_call_and_an_answer(
    model: str, first: str, client: openai.OpenAI, callers: dict[str, Any]
) -> None:
    """A strict tool, and JSON otherwise; the bias is what a trained model would know."""
    strict: Any = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [["a"]]}}}

    def ask(start: str) -> Any:
        bias = {str(callers[model].tokenizer.convert_tokens_to_ids(start)): 100}
        asked = {**ASKED, "tools": strict, "logit_bias": bias, "response_format": schema}
        return client.chat.completions.create(model=model, parallel_tool_calls=False, **asked).choices[0]

    called, answered = ask(first), ask("[")
    assert called.finish_reason == "tool_calls" and len(check(called.message.tool_calls)) == 1
    assert (answered.finish_reason, answered.message.tool_calls) == ("stop", None)
    assert json.loads(answered.message.content) == ["a"]


def test_text_without_a_call_is_text(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(model="hermes", **{**ASKED, "max_tokens": 12}).choices[0]
    assert free.message.content and not free.message.tool_calls
    pieces = client.chat.completions.create(model="hermes", stream=True, **{**ASKED, "max_tokens": 12})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == free.message.content


def test_a_conversation_with_calls_and_results_reaches_the_template(
    client: openai.OpenAI, callers: dict[str, Any]
) -> None:
    first = client.chat.completions.create(
        model="hermes", tool_choice="required", parallel_tool_calls=False, **ASKED
    ).choices[0]
    call = first.message.tool_calls[0]  # type: ignore[index]
    messages = [*ASK, first.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    reply = client.chat.completions.create(
        model="hermes", messages=messages, tools=TOOLS, tool_choice="auto", temperature=0, max_tokens=4
    )
    arguments = json.loads(call.function.arguments)
    plain = [
        *ASK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {**call.function.model_dump(), "arguments": arguments}}],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    text = callers["hermes"].tokenizer.apply_chat_template(plain, tools=TOOLS, tokenize=False)
    assert "[tool]sunny#call_" in text and "<tool_call>" in text
    assert reply.usage.prompt_tokens == len(callers["hermes"].tokenizer(text, add_special_tokens=False).input_ids)


def test_a_pydantic_tool_is_parsed_by_the_client(client: openai.OpenAI) -> None:
    import openai
    from pydantic import BaseModel, ConfigDict

    class Weather(BaseModel):
        model_config = ConfigDict(extra="forbid")
        city: Literal["Bonn", "Ulm"]
        warm: bool

    asked = {**ASKED, "tools": [openai.pydantic_function_tool(Weather)]}
    reply = client.chat.completions.parse(model="llama", tool_choice="required", parallel_tool_calls=False, **asked)
    call = reply.choices[0].message.tool_calls[0]  # type: ignore[index]
    assert isinstance(call.function.parsed_arguments, Weather)
