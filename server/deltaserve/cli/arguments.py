"""Types of arguments."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def whole(least: int, below: int = 2**48) -> Callable[[str], int]:
    """A type of argument: a whole number from `least` on."""

    def parse(text: str) -> int:
        if not least <= int(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in {least} … {below - 1}")
        return int(text)

    return parse


def option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON where it is some: numbers are numbers."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def between(least: float, most: float) -> Callable[[str], float]:
    """A type of argument: a number over `least`, up to `most`."""

    def parse(text: str) -> float:
        if not least < float(text) <= most or not math.isfinite(float(text)):
            raise argparse.ArgumentTypeError(f"{text} is not over {least:g} and up to {most:g}")
        return float(text)

    return parse
