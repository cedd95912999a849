"""Answers are what their schema, expression or grammar says, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import openai

PROMPT = "Many fine-tunes of one base"
MESSAGES: Any = [{"role": "user", "content": "What is a delta?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["sparse", "low rank", "größer"]},
        "bits": {"type": "integer", "minimum": 0, "maximum": 16},
        "name": {"type": "string", "maxLength": 8},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "bits", "name", "flags"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "delta", "strict": True, "schema": SCHEMA}}
LIMITS: Any = {"temperature": 1.0, "max_tokens": 300}


def check(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("model", ["tiny", "sign", "sparse", "chatty"])
def test_a_chat_follows_its_schema_in_every_model(model: str, client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, response_format=FORMAT, n=3, seed=1, **LIMITS
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content or "")
    assert len({choice.message.content for choice in reply.choices}) == 3


def test_a_pydantic_class_is_a_schema(client: openai.OpenAI) -> None:
    from typing import Literal

    from pydantic import BaseModel, ConfigDict

    class Delta(BaseModel):
        model_config = ConfigDict(extra="forbid")
        kind: Literal["sparse", "dense"]
        good: bool

    reply = client.chat.completions.parse(model="sign", messages=MESSAGES, response_format=Delta, **LIMITS)
    assert isinstance(reply.choices[0].message.parsed, Delta)


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="sparse", messages=MESSAGES, response_format={"type": "json_object"}, temperature=0, max_tokens=40
    )
    assert (reply.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[0-9]{2}:[0-9]{2}"}, "[0-9]{2}:[0-9]{2}"),
        ({"choice": ["yes", "no", "c++ (?)"]}, r"yes|no|c\+\+ \(\?\)"),
        ({"grammar": 'start: "a" ("," "a")~2'}, "a,a,a"),
        ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"json": {"type": "boolean"}}, "true|false"),
        ({"json": '{"const": 7}'}, "7"),
    ],
    ids=["regex", "choice", "lark", "gbnf", "json", "json-text"],
)
def test_the_other_forms_work_in_completions_too(fields: dict[str, Any], pattern: str, complete: Any) -> None:
    for seed in range(3):
        choice = complete("sign", temperature=1.5, seed=seed, max_tokens=40, structured_outputs=fields).choices[0]
        assert re.fullmatch(pattern, choice.text), choice.text
        assert choice.finish_reason == "stop"


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "sign", "messages": MESSAGES, "response_format": FORMAT, "seed": 3, **LIMITS}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole
    assert len(pieces) > 5


def test_seeded_answers_do_not_depend_on_the_crowd(client: openai.OpenAI, at_once: Callable[..., list[Any]]) -> None:
    def ask(model: str, seed: int, **more: Any) -> Any:
        def call() -> Any:
            reply = client.chat.completions.create(
                model=model, messages=MESSAGES, seed=seed, logprobs=True, **{**LIMITS, **more}
            )
            choice = reply.choices[0]
            return choice.message.content, [token.token for token in choice.logprobs.content]

        return call

    calls = [
        ask(model, seed, response_format=FORMAT) for seed, model in enumerate(["tiny", "sign", "sparse", "chatty"])
    ]
    noise = [ask(model, 9, max_tokens=30) for model in ("tiny", "sign", "lowrank")]
    alone = [call() for call in calls]
    assert at_once([*noise, *calls, *noise])[3:7] == alone
    for text, _ in alone:
        check(text)


def test_a_mixture_follows_a_schema(client: openai.OpenAI) -> None:
    mixture = [{"model": name, "weight": 1} for name in ("sign", "sparse", "tiny")]
    reply = client.chat.completions.create(
        model="sign", messages=MESSAGES, response_format=FORMAT, seed=2, extra_body={"mixture": mixture}, **LIMITS
    )
    check(reply.choices[0].message.content or "")


def test_a_stop_string_and_a_length_still_end_an_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "sign", "messages": MESSAGES, "response_format": FORMAT, "temperature": 0}
    stopped = client.chat.completions.create(**asked, stop='"bits"', max_tokens=300).choices[0]
    assert (stopped.finish_reason, '"bits"' in (stopped.message.content or "")) == ("stop", False)
    short = client.chat.completions.create(**asked, max_tokens=4).choices[0]
    assert short.finish_reason == "length"


def test_neither_ignore_eos_nor_min_tokens_goes_beyond_a_grammar(complete: Any) -> None:
    for more in ({"ignore_eos": True}, {"min_tokens": 20}):
        choice = complete("tiny", max_tokens=30, structured_outputs={"choice": ["yes", "no"]}, **more).choices[0]
        assert (choice.text in ("yes", "no"), choice.finish_reason) == (True, "stop")


def test_a_preempted_answer_still_follows_its_schema(
    start_server: Callable[..., Any], at_once: Callable[..., list[Any]]
) -> None:
    server = start_server("--kv-cache-tokens", "256", "--block-size", "8")

    def ask(seed: int) -> Any:
        fields = {"structured_outputs": {"json": SCHEMA}, "seed": seed, "max_tokens": 200}
        body = {"model": "tiny", "prompt": PROMPT, **fields}
        return lambda: server.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]

    alone = [ask(seed)() for seed in range(6)]
    together = at_once([ask(seed) for seed in range(6)])
    assert together == alone
    assert server.metric("vllm:num_preemptions_total") > 0
    for text in alone:
        check(text)
