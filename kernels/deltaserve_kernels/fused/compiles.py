"""Who is told when Triton compiles a kernel that nobody was ready for: steps must never wait for a compiler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs

Told = Callable[[str], None]
_here = threading.local()
_watchers: list[Told] = []
_lock = threading.Lock()


@contextmanager
def expected() -> Iterator[None]:
    """What this thread compiles meanwhile is told to nobody."""
    before = getattr(_here, "expects", False)
    _here.expects = True
    try:
        yield
    finally:
        _here.expects = before


def watch(told: Told) -> Callable[[], None]:
    """From now on `told` is called with the name of every kernel that Triton compiles, or takes compiled from its cache
    on disk, outside `expected`; by the thread that waits for it. Returns what ends that. Earlier listeners stay.
    """
    with _lock:
        _watchers.append(told)
        if not isinstance(knobs.compilation.listener, _Listener):
            knobs.compilation.listener = _Listener(knobs.compilation.listener)
    return lambda: _watchers.remove(told)


class _Listener:
    def __init__(self, before: Callable[..., None] | None) -> None:
        self._before = before

    def __call__(self, *, metadata: dict[str, Any], **rest: Any) -> None:
        if self._before is not None:
            self._before(metadata=metadata, **rest)
        if not getattr(_here, "expects", False):
            for told in list(_watchers):
                told(str(metadata["name"]))
