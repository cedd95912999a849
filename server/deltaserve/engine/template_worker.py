"""The disposable process in which tenants' chat templates run. `templates` starts it as a script; nothing imports it.

Owns: one sandboxed Jinja environment with the conventions of transformers (`utils/chat_template_utils.py`, 5.23).
Does not know: tenants, models, tokens, files. Imports jinja2 and the standard library and nothing else.

    worker ← parent   frame {"template": str, "variables": {…}}
    worker → parent   frame {"kind": str, "message": str, "retire": bool}; kind "text" carries the rendered text
    frame             4 bytes big-endian length, then that many bytes of JSON

A template is hostile, so three walls stand one behind the other. The Jinja sandbox keeps a template away from Python.
Should one get out: the process has no environment variables, may open no further file descriptor (RLIMIT_NOFILE),
write no byte to a file (RLIMIT_FSIZE), start nothing and import nothing (audit hook). And whatever it does, it has
`RLIMIT_AS` bytes of memory, and a timer ends it even if the parent that should have killed it is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import pprint
import resource
import signal
import struct
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from jinja2 import constants, debug, exceptions, ext, nodes, sandbox, utils

if TYPE_CHECKING:
    from jinja2 import parser, runtime

IMPORTED_EARLY = (pprint, textwrap, constants, debug)  # Jinja imports these when first used: too late behind the walls
MAX_MESSAGE_CHARS = 1000
RETIRE_SHARE = 0.25  # of the memory, kept after a render: ask to be replaced, not to shorten the next tenant's memory
FORBIDDEN_EVENTS = ("open", "import", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "mmap.", "signal.")
WARM_UP = {"template": "{{ strftime_now('%c') }}{{ [1] | tojson }}{{ none.x.y }}", "variables": {}}


class RaisedByTemplate(exceptions.TemplateError):
    """The template called `raise_exception`."""


KINDS = {RaisedByTemplate: "raised", exceptions.SecurityError: "sandbox", exceptions.TemplateSyntaxError: "syntax"}


class GenerationTag(ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(lineno)

    def _render_body(self, caller: runtime.Macro) -> str:
        return str(caller())


class TemplateDict:
    """`dict` for templates: callable, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(utils.Namespace):
    """`namespace` for templates: refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays free as a keyword: namespace(self=…)
        self, *rest = args
        utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise exceptions.SecurityError(f"a namespace holds no name that begins with an underscore: {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: object) -> None:
    raise RaisedByTemplate(str(message))


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def tojson(x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = 0) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


ENVIRONMENT = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, ext.loopcontrols]
)
ENVIRONMENT.filters["tojson"] = tojson
ENVIRONMENT.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
ENVIRONMENT.globals.update(dict=TemplateDict(), namespace=TemplateNamespace)
compile_template = functools.lru_cache(maxsize=32)(ENVIRONMENT.from_string)


def failure(phase: str, error: Exception) -> dict[str, Any]:
    kind = next((kind for types, kind in KINDS.items() if isinstance(error, types)), phase)
    message = str(getattr(error, "message", f"{type(error).__name__}: {error}"))[:MAX_MESSAGE_CHARS]
    line, step = getattr(error, "lineno", None), error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return {"kind": kind, "message": message if line is None or kind == "raised" else f"line {line}: {message}"}


def render(job: dict[str, Any], max_output_chars: int) -> dict[str, Any]:
    """The reply to one job. Raises MemoryError, after which this process is of no more use."""
    phase, num_chars = "syntax", 0
    pieces: list[str] = []
    try:
        template = compile_template(job["template"])
        phase = "failed"
        for piece in template.generate(job["variables"]):
            num_chars += len(piece)
            if num_chars > max_output_chars:
                return {"kind": "output", "message": ""}
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()  # a lone surrogate is no text and no tokenizer takes it
    except MemoryError:
        raise
    except Exception as error:
        return failure(phase, error)
    return {"kind": "text", "message": text}


def send(reply: dict[str, Any]) -> None:
    body = json.dumps(reply, ensure_ascii=False).encode("utf-8", "replace")
    sys.stdout.buffer.write(struct.pack(">I", len(body)) + body)
    sys.stdout.buffer.flush()


def receive() -> dict[str, Any] | None:
    """The next job, None once the parent has closed the pipe."""
    header = sys.stdin.buffer.read(4)
    if len(header) < 4:
        return None
    job: dict[str, Any] = json.loads(sys.stdin.buffer.read(struct.unpack(">I", header)[0]))
    return job


def forbid(event: str, _args: object) -> None:
    if event.startswith(FORBIDDEN_EVENTS):
        raise exceptions.SecurityError(f"{event} is not available to a template")


def main() -> None:
    """Serve jobs from stdin until it closes. Arguments: memory in MiB, output in characters, seconds for a render."""
    memory_bytes, max_output_chars, timeout_s = int(sys.argv[1]) * 2**20, int(sys.argv[2]), float(sys.argv[3])
    render(WARM_UP, max_output_chars)  # what is imported late is imported now
    statm = os.open("/proc/self/statm", os.O_RDONLY)  # pages: total, …
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(forbid)
    send({"kind": "ready"})
    with contextlib.suppress(MemoryError):
        while (job := receive()) is not None:
            signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)  # SIGALRM's default action ends the process
            reply = render(job, max_output_chars)
            kept_pages = int(os.pread(statm, 64, 0).split()[0])
            send(reply | {"retire": kept_pages * resource.getpagesize() > RETIRE_SHARE * memory_bytes})
            signal.setitimer(signal.ITIMER_REAL, 0)
        return
    send({"kind": "memory", "message": "", "retire": True})  # here, not in a handler: by now the memory is free again


if __name__ == "__main__":
    main()
