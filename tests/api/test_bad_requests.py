"""What is wrong or not supported is a 400 that says so, never ignored, never a 500."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]

MESSAGES = [{"role": "user", "content": "Hello"}]
BAD = {"name": "f", "arguments": "{"}
CALL: dict[str, Any] = {"id": "1", "type": "function"}
PATHS = ["/v1/completions", "/v1/chat/completions"]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def _post(http: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    asked: dict[str, Any] = {"prompt": "Many"} if path == PATHS[0] else {"messages": MESSAGES}
    return http.post(path, json={"model": "tiny", "max_tokens": 2, **asked, **fields})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", []),
        ("best_of", 2),
        ("suffix", "x"),
        ("guided_json", {}),
        ("include_stop_str_in_output", True),
        ("prompt_logprobs", 1),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
        ("use_beam_search", True),
        ("temprature", 1),
    ],
)
def test_a_parameter_that_is_not_supported_is_named(
    path: str, field: str, value: Any, http: httpx.Client, error_of: ErrorOf
) -> None:
    error = error_of(_post(http, path, **{field: value}), 400, "unsupported_parameter")
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "needs a schema"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"structured_outputs": {"choice": []}}, "at least 1"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "exclude"),
    ],
)
def test_a_format_that_says_too_little_or_too_much_is_refused(
    path: str, fields: dict[str, Any], words: str, http: httpx.Client, error_of: ErrorOf
) -> None:
    assert words in error_of(_post(http, path, **fields), 400, "invalid_request")["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json": {"type": "strin"}}, "Invalid type"),
        ({"json": "{"}, "EOF"),
        ({"json": {"$ref": "http://127.0.0.1/x"}}, "does not fetch"),
        ({"json": {"contains": {}}}, "contains"),
        ({"regex": "(a{1000}){1000}"}, "too many expressions"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": "root ::= ("}, "cannot be used"),
        ({"regex": "x" * 70_000}, "65536"),
    ],
)
def test_a_grammar_that_does_not_compile_is_told_why(
    path: str, fields: dict[str, Any], words: str, http: httpx.Client, error_of: ErrorOf
) -> None:
    message = error_of(_post(http, path, structured_outputs=fields), 400, "invalid_grammar")["message"]
    assert words in message and "<non-verbose/>" not in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": []}, "at least 1"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
        ({"tools": [{"type": "web_search"}]}, "function"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "none of the tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "exclude"),
        ({"tools": [TOOL]}, "takes no tools"),
        ({"tool_choice": "required"}, "need tools"),
        ({"parallel_tool_calls": False}, "need tools"),
        ({"messages": [{"role": "assistant"}]}, "content is missing"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": BAD}]}]}, "no JSON"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(
    fields: dict[str, Any], words: str, http: httpx.Client, error_of: ErrorOf
) -> None:
    assert words in error_of(_post(http, PATHS[1], **fields), 400, "invalid_request")["message"]


def test_tools_belong_to_chats(http: httpx.Client, error_of: ErrorOf) -> None:
    assert error_of(_post(http, PATHS[0], tools=[TOOL]), 400, "unsupported_parameter")["param"] == "tools"


def test_tools_that_may_not_be_called_change_nothing(http: httpx.Client) -> None:
    plain, unused = (
        _post(http, PATHS[1], temperature=0, **fields).json()
        for fields in ({}, {"tools": [TOOL], "tool_choice": "none"})
    )
    assert plain["choices"] == unused["choices"]


def test_text_is_a_format(http: httpx.Client) -> None:
    assert _post(http, PATHS[1], response_format={"type": "text"}).status_code == 200


NUMBERS = {  # field → values just outside its range
    "n": [0, -1, 129],
    "max_tokens": [-1],
    "temperature": [-0.1, 2.1],
    "top_p": [0, -0.5, 1.1],
    "top_k": [-2, 2**31],
    "min_p": [-0.1, 1.1],
    "seed": [-(2**63) - 1, 2**63],
    "repetition_penalty": [0, -1, 5e-324, 0.009, 10.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "min_tokens": [-1, 3],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_out_of_its_range_is_named(path: str, field: str, http: httpx.Client, error_of: ErrorOf) -> None:
    for value in [*NUMBERS[field], True, "1", [1], {}]:
        error = error_of(_post(http, path, **{field: value}), 400, "invalid_request")
        assert error["param"] == field and field in error["message"], value


@pytest.mark.parametrize("field", [*NUMBERS, "logprobs"])
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none_are_refused(field: str, literal: str, http: httpx.Client, error_of: ErrorOf) -> None:
    raw = f'{{"model": "tiny", "prompt": "a", "{field}": {literal}}}'
    reply = http.post(PATHS[0], content=raw, headers={"content-type": "application/json"})
    code = "context_length_exceeded" if field == "max_tokens" and literal.isdigit() else "invalid_request"
    assert error_of(reply, 400, code)["param"] == ("prompt" if code.startswith("context") else field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": -101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"300": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {str(number): 1 for number in range(1025)}),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", 3),
        ("stop", "x" * 1025),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 5),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
        ("stream", "true"),
        ("stream_options", {"include_usage": True}),
        ("echo", 1),
        ("logprobs", 21),
        ("logprobs", True),
        ("user", 3),
        ("prompt", None),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", [1]]),
        ("prompt", [True]),
        ("prompt", [1.0]),
        ("prompt", [-1]),
        ("prompt", [300]),
        ("prompt", [10**30]),
        ("prompt", {"a": 1}),
        ("prompt", ["a"] * 129),
        ("model", None),
        ("model", 3),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_value_of_the_wrong_kind_is_named(field: str, value: Any, http: httpx.Client, error_of: ErrorOf) -> None:
    error = error_of(_post(http, PATHS[0], **{field: value}), 400, "invalid_request")
    assert error["param"] == field


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hello",
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "assistant", "content": "x", "tool_calls": []}],
    ],
    ids=str,
)
def test_messages_that_cannot_be_read_are_named(messages: Any, http: httpx.Client, error_of: ErrorOf) -> None:
    reply = _post(http, PATHS[1], messages=messages)
    error = error_of(reply, 400, reply.json()["error"]["code"])
    assert error["code"] in ("invalid_request", "unsupported_parameter")
    assert error["param"].startswith("messages") and "messages" in error["message"]


def test_parameters_that_need_another_say_so(http: httpx.Client, error_of: ErrorOf) -> None:
    assert "logprobs: true" in error_of(_post(http, PATHS[1], top_logprobs=2), 400, "invalid_request")["message"]
    assert "echo" in error_of(_post(http, PATHS[0], max_tokens=0), 400, "invalid_request")["message"]
    assert "over max_tokens" in error_of(_post(http, PATHS[0], min_tokens=3), 400, "invalid_request")["message"]


@pytest.mark.parametrize("path", PATHS)
def test_null_is_the_default(path: str, http: httpx.Client) -> None:
    silent = dict.fromkeys([*NUMBERS, "stop", "logit_bias", "stream", "stream_options", "user", "logprobs"])
    assert _post(http, path, **silent).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_model_is_never_answered_by_the_base(path: str, http: httpx.Client, error_of: ErrorOf) -> None:
    for name in ("nobody", "", "tiny ", "TINY", "../tiny", "x\x00", "n" * 10_000):
        error = error_of(_post(http, path, model=name), 404, "model_not_found")
        assert error["param"] == "model" and f"`{name}`" in error["message"]
        assert error["type"] == "invalid_request_error"


def test_a_prompt_too_long_says_both_numbers(http: httpx.Client, error_of: ErrorOf) -> None:
    error = error_of(_post(http, PATHS[0], prompt=[5] * 700), 400, "context_length_exceeded")
    assert "512 tokens" in error["message"] and "700" in error["message"] and error["param"] == "prompt"
    error = error_of(_post(http, PATHS[0], prompt=[5] * 500, max_tokens=13), 400, "context_length_exceeded")
    assert "500 and 13" in error["message"]
    assert _post(http, PATHS[0], prompt=[5] * 511, max_tokens=1).status_code == 200
    long = [{"role": "user", "content": "x" * 5000}]
    error = error_of(_post(http, PATHS[1], messages=long), 400, "context_length_exceeded")
    assert error["param"] == "messages"
