"""Templates come out as transformers renders them, and errors say what happened."""

from __future__ import annotations

import datetime
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltaserve.engine import templates
from deltaserve.engine.templates import TemplateRenderer
from deltaserve.errors import EngineFailure, QueueFull, TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOOP_FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
INST = """{{ bos_token }}{%- for message in messages %}
    {%- if message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]
    {%- elif message.role == 'assistant' %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}<<{{ message.role | upper }}>>{{ message['content'] }}
    {%- endif %}
{%- endfor %}
{# a comment #}
{%- if tools is not none %}{{ tools | tojson }}{% endif -%}
{%- if documents is defined %} documents{% endif -%}
"""
LOOPS = """{% set ns = namespace(seen=0, last='') %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% set ns.last = message.content %}
    {% if ns.seen == 2 %}{% break %}{% endif %}
  {{- loop.index0 }}:{{ message.content }}
{% endfor %}
{% macro shout(text, mark='!') %}{{ text.upper() ~ mark }}{% endmacro %}
{{ shout(ns.last) }} {{ missing }}{{ missing is defined }} {{ messages[-1].content.split() | join('|') }}
{{ dict(a=1, b='x') | tojson }} {{ messages[::-1] | map(attribute='role') | list }} {{ '%s-%d' | format('a', 3) }}
"""
JSON = """{{ messages | tojson }}
{{ {'b': '<a href="x">&\\'é你👧', 'a': [1, 2.5, none, true]} | tojson }}
{{ messages[0] | tojson(indent=2) }}{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}
{{ 'é' | tojson(ensure_ascii=true) }}{{ enable_thinking }}"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  Hi <b>there</b> & 'you'\n"}],
    [
        {"role": "system", "content": "Be brief. 🦊"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "你好 é\u0301"},
        {"role": "user", "content": "{{ 1 + 1 }} {% raw %}"},
    ],
]


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(timeout_s=10)
    yield renderer
    renderer.close()


@pytest.fixture
def hurried() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(timeout_s=0.5)
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", [CHATML, INST, LOOPS, JSON], ids=["chatml", "inst", "loops", "json"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one turn", "many turns"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_output_is_that_of_transformers(
    renderer: TemplateRenderer,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> None:
    variables = {"add_generation_prompt": add_generation_prompt, "enable_thinking": False}
    expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)
    assert renderer.render(template, tokenizer.special_tokens_map | {"messages": messages} | variables) == expected


def test_tools_and_documents_reach_the_template(renderer: TemplateRenderer, tokenizer: PreTrainedTokenizerFast) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    template, messages = INST + "{{ documents[0].text }}", CONVERSATIONS[0]
    documents = [{"title": "t", "text": "x"}]
    expected = tokenizer.apply_chat_template(
        messages, tools=tools, documents=documents, chat_template=template, tokenize=False
    )
    variables = {"messages": messages, "tools": tools, "documents": documents}
    assert renderer.render(template, tokenizer.special_tokens_map | variables) == expected


def test_strftime_now_is_today(renderer: TemplateRenderer) -> None:
    before = datetime.datetime.now().strftime("%d %b %Y")
    rendered = renderer.render("{{ strftime_now('%d %b %Y') }}", {})
    assert rendered in (before, datetime.datetime.now().strftime("%d %b %Y"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in %}", "the chat template does not parse: line 1: Expected an expression"),
        ("fine\n\n{% if true %}", "the chat template does not parse: line 3: Unexpected end of template"),
        ("{{ 1 | nonsense }}", "the chat template does not parse: line 1: No filter named 'nonsense'"),
        ("{{ raise_exception('roles must alternate') }}", "refused the conversation: roles must alternate$"),
        ("\n{{ messages[0].content + 1 }}", "the chat template failed: line 2: TypeError: can only concatenate str"),
        ("{{ nothing.at.all }}", "the chat template failed: line 1: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "the sandbox forbids: line 1: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "the sandbox forbids: line 1: access to attribute 'append'"),
        ("{{ '\ud800' }}", "the chat template failed: UnicodeEncodeError"),
    ],
)
def test_an_error_says_what_happened(renderer: TemplateRenderer, template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        renderer.render(template, {"messages": CONVERSATIONS[0]})


def test_variables_that_are_not_json_are_refused(renderer: TemplateRenderer) -> None:
    with pytest.raises(TemplateError, match="not plain JSON: Object of type object"):
        renderer.render("x", {"messages": object()})


@pytest.mark.parametrize("template", [CHATML, INST, JSON, "{{ raise_exception('no') }}", "{{ tools[0].name.x }}"])
def test_check_lets_pass_what_may_be_fine_with_another_conversation(renderer: TemplateRenderer, template: str) -> None:
    renderer.check(template)


@pytest.mark.parametrize("template", ["{% if %}", "{{ ''.__class__.x }}", "{{ 'a' * 10**10 }}"])
def test_check_refuses_what_is_wrong_with_any(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateError):
        renderer.check(template)


def test_nothing_is_carried_from_one_render_to_the_next(renderer: TemplateRenderer) -> None:
    first = "{% set secret = messages[0].content %}{% macro m() %}{{ secret }}{% endmacro %}{{ m() }}"
    assert renderer.render(first, {"messages": CONVERSATIONS[0]}) == CONVERSATIONS[0][0]["content"]
    assert renderer.render("{{ secret is defined }} {{ m is defined }} {{ messages | length }}", {}) == "False False 0"


def test_a_deadline_is_kept_and_the_next_render_works(hurried: TemplateRenderer) -> None:
    assert hurried.render("warm", {}) == "warm"
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"took longer than 0\.5 s"):
        hurried.render(LOOP_FOR_EVER, {})
    assert time.monotonic() - start < 3
    assert hurried.render("{{ 1 }}", {}) == "1"


def test_a_killed_worker_is_replaced(hurried: TemplateRenderer) -> None:
    hurried.render("x", {})
    hurried._idle[0]._process.kill()
    hurried._idle[0]._process.wait()
    with pytest.raises(TemplateError, match="ended the process"):
        hurried.render("x", {})
    assert hurried.render("x", {}) == "x"


def test_one_slow_template_does_not_hold_up_another(hurried: TemplateRenderer) -> None:
    hurried.render("warm", {})
    failures: list[TemplateError | QueueFull] = []

    def attack() -> None:
        try:
            hurried.render(LOOP_FOR_EVER, {})
        except (TemplateError, QueueFull) as error:
            failures.append(error)

    attackers = [threading.Thread(target=attack) for _ in range(6)]
    for attacker in attackers:
        attacker.start()
    assert [hurried.render(f"{i}", {}) for i in range(20)] == [f"{i}" for i in range(20)]
    for attacker in attackers:
        attacker.join()
    assert len(failures) == 6
    assert {type(failure) for failure in failures} == {TemplateError, QueueFull}  # they only wait for one another
    assert hurried._num_workers <= templates.MAX_WORKERS


def test_renders_from_many_threads_do_not_mix(renderer: TemplateRenderer) -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        for i in range(30):
            rendered = renderer.render("{{ name }}" if i % 2 else name, {"name": name})
            if rendered != name:
                wrong.append(rendered)

    threads = [threading.Thread(target=work, args=(f"tenant {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_worker_that_cannot_start_is_not_the_templates_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(templates, "WORKER_FILE", tmp_path / "missing.py")
    renderer = TemplateRenderer()
    with pytest.raises(EngineFailure, match=r"missing\.py did not start"):
        renderer.render("x", {})
    renderer.close()


def test_close_ends_the_workers() -> None:
    renderer = TemplateRenderer()
    renderer.render("x", {})
    process = renderer._idle[0]._process
    renderer.close()
    assert process.returncode is not None
    assert not os.path.exists(f"/proc/{process.pid}")
    with pytest.raises(EngineFailure, match="closed"):
        renderer.render("x", {})
