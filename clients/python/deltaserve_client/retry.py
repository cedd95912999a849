"""When a failed request is sent again, and after how long. Does not send and does not sleep.

what failed                             ALWAYS      IF_NOT_RUN      NEVER
no connection could be made             again       again           raise
429, the server refused to begin        again       again           raise
connection lost later, or 503           again       raise           raise
anything else                           raise       raise           raise
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from deltaserve_client.errors import ConnectionFailed, RateLimited, Unavailable

if TYPE_CHECKING:
    from deltaserve_client.errors import ApiError

FIRST_WAIT_S = 0.5
MAX_WAIT_S = 60.0


class Repeat(Enum):
    """What it would mean to send a request twice."""

    ALWAYS = auto()  # the second has the same effect as the first
    IF_NOT_RUN = auto()  # costly or visible: only where the first surely did not run
    NEVER = auto()


class Attempts:
    """Counts the tries of one request."""

    def __init__(self, repeat: Repeat, num_retries: int) -> None:
        self._repeat = repeat
        self._num_left = num_retries
        self._wait_s = FIRST_WAIT_S

    def wait_s_or_none(self, error: ConnectionFailed | ApiError) -> float | None:
        """Seconds to wait before the next try; None: give up and raise `error`.

        A server that asks for more than MAX_WAIT_S is not waited for: the caller knows better what to do meanwhile.
        """
        if self._num_left == 0 or not _is_repeatable(error, self._repeat):
            return None
        self._num_left -= 1
        backoff_s, self._wait_s = self._wait_s, self._wait_s * 2
        asked_s = None if isinstance(error, ConnectionFailed) else error.retry_after_s
        wait_s = backoff_s if asked_s is None else float(asked_s)
        return wait_s if wait_s <= MAX_WAIT_S else None


def _is_repeatable(error: ConnectionFailed | ApiError, repeat: Repeat) -> bool:
    if repeat is Repeat.NEVER:
        return False
    if isinstance(error, RateLimited):
        return True
    if isinstance(error, ConnectionFailed):
        return repeat is Repeat.ALWAYS or not error.maybe_ran
    return repeat is Repeat.ALWAYS and isinstance(error, Unavailable)
