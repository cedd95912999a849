"""Attacks by an uploaded chat template. After each one a normal conversation must still render, and promptly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deltaserve.engine.templates import WORKER_FILE, TemplateRenderer
from deltaserve.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

TIMEOUT_S = 1.0  # for templates that must run out of it; on a busy machine a sound one may, too
PATIENCE_S = 30.0  # for all others
PROMPTLY_S = 20.0  # a fresh worker on a busy machine, sooner than a stuck one ends; on an idle one it is 0.3 s
NORMAL = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES: dict[str, object] = {"messages": [{"role": "user", "content": "hello"}]}
SECRET = "sk-not-for-templates"


def rendering(timeout_s: float) -> Iterator[TemplateRenderer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTASERVE_ADMIN_KEY", SECRET)
        renderer = TemplateRenderer(timeout_s=timeout_s, max_output_chars=100_000)
        yield renderer
        renderer.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[TemplateRenderer]:
    yield from rendering(PATIENCE_S)


@pytest.fixture(scope="module")
def shared_hasty() -> Iterator[TemplateRenderer]:
    yield from rendering(TIMEOUT_S)


@pytest.fixture
def renderer(shared: TemplateRenderer) -> Iterator[TemplateRenderer]:
    """The renderer all attacks share; each must leave it in order."""
    yield shared
    start = time.monotonic()
    assert shared.render(NORMAL, MESSAGES) == "user: hello\n"
    assert time.monotonic() - start < PROMPTLY_S


@pytest.fixture
def hasty(shared_hasty: TemplateRenderer, process: ModuleType) -> Iterator[TemplateRenderer]:
    """The same for attacks on the time limit."""

    def in_order() -> bool:
        try:
            return shared_hasty.render(NORMAL, MESSAGES) == "user: hello\n"
        except TemplateError as error:
            assert "took longer than 1 s" in error.message
            return False

    yield shared_hasty
    process.wait_until(in_order, "the renderer is in order", PROMPTLY_S)


# Threat: walking from any value to its class, from there to every class loaded, and so to os.system.
ATTRIBUTE_WALKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''['__cla' ~ 'ss__'].x }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ (messages|attr('__class__')).__base__ }}",
    "{{ ([''] | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ (['']|map('attr', '__class__')|list)[0].x }}",
    # Threat: functions of the environment carry their module's globals.
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.x }}",
    "{{ namespace.__init__.__globals__.x }}",
    "{{ dict.__call__.__globals__.x }}",
    "{{ raise_exception.__globals__.sys.modules.x }}",
    "{{ strftime_now.__globals__.os.environ.x }}",
    "{{ range.__globals__.x }}",
    # Threat: the template's own machinery leads to its environment, its code and its frames.
    "{{ self.__init__.__globals__.x }}",
    "{{ self._TemplateReference__context.environment.x }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__.x }}",
    "{{ (messages | map('upper')).gi_frame.f_globals.x }}",
    "{% for m in messages %}{{ loop._iterator.x }}{% endfor %}",
    # Threat: a name stored on a namespace may replace a method that Python calls by itself.
    "{% set ns = namespace(__class__='x') %}{{ ns.__class__.x }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns.__init__.x }}",
    # Threat: changing values that outlive the render.
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].__setitem__('role', 'x') }}",
]


@pytest.mark.parametrize("template", ATTRIBUTE_WALKS)
def test_no_path_leads_from_a_value_to_python(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateError, match="the sandbox forbids"):
        renderer.render(template, MESSAGES)


# Threat: str.format has an attribute syntax of its own, which a sandbox that only watches the template's would miss.
FORMAT_ESCAPES = [
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__init__.__globals__}'.format(x=lipsum) }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ''['format'] and '{0.__class__}'['format']('') }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ('{0.__class__}'|attr('format'))('') }}",
    "{{ (['{0.__class__}']|map('attr', 'format')|list)[0]('') }}",
    "{{ ['{0.__class__}'.format]|map('string')|list and ('{0.__class__}').format('') }}",
]


@pytest.mark.parametrize("template", FORMAT_ESCAPES)
def test_format_strings_reach_no_attribute(renderer: TemplateRenderer, template: str) -> None:
    try:
        rendered = renderer.render(template, MESSAGES)
    except TemplateError:
        return
    assert "class" not in rendered and "globals" not in rendered


# Threat: one request keeps a CPU busy for ever, or for the life of the server.
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{% if loop.depth < 9 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "{{ 10 ** (10 ** 8) }}",  # one C call that no signal handler written in Python could interrupt
    "{{ (7 ** 9999999 % 10) ~ (7 ** 99999999) }}",
    "{{ range(99999) | map('string') | list | length }}" * 400,
    "{{ 'a' * 50000 }}{% set x = ('ab' * 400000) | replace('a', 'bb') | wordwrap(1) | wordwrap(1) | length %}" * 9,
]


@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_a_template_without_end_is_ended(hasty: TemplateRenderer, template: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError, match="took longer than 1 s|characters"):
        hasty.render(template, MESSAGES)
    assert time.monotonic() - start < TIMEOUT_S + PROMPTLY_S


# Threat: memory for the whole machine is asked for, in one step or by doubling.
MEMORY_BOMBS = [
    "{{ 'a' * 10**10 }}",
    "{{ messages[0].role * 10**10 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ ([0] * 10**9) | length }}",
    "{{ 1 | tojson(indent=10**10) }}{{ [1] | tojson(indent=10**10) }}",
    "{{ 'a' | indent(10**9, first=true) }}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ('a' ~ i) * 10**7] %}{% endfor %}",
]


@pytest.mark.parametrize("template", MEMORY_BOMBS, ids=range(len(MEMORY_BOMBS)))
def test_a_memory_bomb_goes_off_in_the_worker_alone(hasty: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateError, match=r"needed more than 512 MiB|took longer than 1 s"):
        hasty.render(template, MESSAGES)


# Threat: constants are computed when a template is compiled, and a cache keeps them, out of the next tenant's share.
def test_what_a_template_leaves_in_memory_is_not_taken_from_the_next(renderer: TemplateRenderer) -> None:
    for i in range(8):
        template = "{% if false %}{{ 'a' * 20000000 }}{% endif %}" + f"{i}"
        assert renderer.render(template, MESSAGES) == f"{i}"
    for worker in renderer._idle:
        pages = int(Path(f"/proc/{worker._process.pid}/statm").read_text().split()[0])
        assert pages * os.sysconf("SC_PAGE_SIZE") < 200 * 2**20


# Threat: an output that is small to write and enormous to tokenise.
@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}aaaaaaaaaa{% endfor %}", "{{ 'a' * 10**6 }}", "{{ lipsum(n=2000) }}"],
)
def test_a_huge_output_is_refused(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateError, match="wrote more than 100000 characters"):
        renderer.render(template, MESSAGES)


# Threat: nesting exhausts the stack of the parser, of Python's compiler or of the renderer.
RECURSION = [
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}{{ ns }}",
    "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ 1" + "|string" * 30_000 + " }}",
    "{{ a" + ".a" * 100_000 + " }}",
    "{% if a %}" * 20_000 + "{% endif %}" * 20_000,
    "{% for a in a %}" * 500 + "{% endfor %}" * 500,
]


@pytest.mark.parametrize("template", RECURSION, ids=range(len(RECURSION)))
def test_endless_nesting_is_an_error_like_any_other(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateError):
        renderer.render(template, MESSAGES)


# Threat: deep nesting in a conversation, not in the template, does the same to the JSON reader on either side.
def test_a_deeply_nested_conversation_is_an_error(renderer: TemplateRenderer) -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(TemplateError, match="not plain JSON"):
        renderer.render(NORMAL, {"messages": nested})
    while nested:  # taken apart here, as Python would recurse to free it
        nested = nested[0]  # type: ignore[assignment]


# Threat: reading the server's files, through Jinja's loaders.
@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{% extends '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% from 'template_worker.py' import x %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ __import__('os').environ }}",
        "{{ self._environment.loader.x }}",
    ],
)
def test_no_file_is_read(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateError):
        renderer.render(template, MESSAGES)


# Threat: printing every name a template can see, in search of settings and keys.
def test_no_global_shows_the_environment(renderer: TemplateRenderer) -> None:
    names = ["range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now", "self"]
    rendered = renderer.render("".join("{{ x }}{{ x | pprint }}".replace("x", name) for name in names), MESSAGES)
    assert SECRET not in rendered and "DELTASERVE" not in rendered


# Threat: the sandbox has a hole nobody knows yet. What is behind it must be empty: no secrets, no files, no memory.
def test_behind_the_sandbox_there_is_nothing_to_take(renderer: TemplateRenderer) -> None:
    renderer.render(NORMAL, MESSAGES)
    process = Path(f"/proc/{renderer._idle[-1]._process.pid}")
    assert (process / "environ").read_bytes() == b""
    limits = {line[:25].strip(): line[26:46].strip() for line in (process / "limits").read_text().splitlines()}
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert limits["Max open files"] == "3"
    assert limits["Max address space"] == str(512 * 2**20)
    opened = {(process / "fd" / fd).resolve().name.split(":")[0] for fd in os.listdir(process / "fd")}
    assert opened == {"socket", "null", "statm"}
    assert "torch" not in (process / "maps").read_text()


# Threat: through the same hole, starting a program, connecting to a service, ending the server.
def test_behind_the_sandbox_nothing_can_be_started() -> None:
    code = """
import os, runpy, socket, subprocess, sys
worker = runpy.run_path(sys.argv[1])
sys.addaudithook(worker["forbid"])
attempts = {
    "open": lambda: open("/etc/passwd"),
    "system": lambda: os.system("true"),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "spawn": lambda: subprocess.run(["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "connect": lambda: socket.socket(),
    "import": lambda: __import__("ctypes"),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except worker["exceptions"].SecurityError:
        continue
    sys.exit(name)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code, str(WORKER_FILE)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Threat: a template too large to be one, sent to keep the parser busy.
def test_a_template_over_the_limit_is_not_even_parsed(renderer: TemplateRenderer) -> None:
    with pytest.raises(TemplateError, match="262145 bytes, allowed are 262144"):
        renderer.render("é" * 131_072 + "x", MESSAGES)
    assert len(renderer.render("x" * 100_000, MESSAGES)) == 100_000


# Threat: text no tokenizer accepts, to make a later stage fail.
@pytest.mark.parametrize("content", ["\ud800", "\udfff"])
def test_a_lone_surrogate_does_not_pass(renderer: TemplateRenderer, content: str) -> None:
    with pytest.raises(TemplateError, match="surrogates not allowed"):
        renderer.render(NORMAL, {"messages": [{"role": "user", "content": content}]})


# Threat: an error message as long as a book, or with control over its own formatting, in logs and replies.
def test_an_error_message_is_bounded_and_not_interpreted(renderer: TemplateRenderer) -> None:
    with pytest.raises(TemplateError) as caught:
        renderer.render("{{ raise_exception('{timeout_s.__class__}' ~ 'a' * 10**6) }}", MESSAGES)
    assert len(caught.value.message) < 1200
    assert "{timeout_s.__class__}" in caught.value.message
