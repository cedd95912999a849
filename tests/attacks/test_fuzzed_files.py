"""Anything not thought of: bytes flipped, values of any kind anywhere. It passes or is an error of ours, promptly."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deltaserve.errors import DeltaServeError

from .target import Target

FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=4),
    in_header=st.booleans(),
)
@example(flips=[(0, 255)], in_header=True)
def test_flipped_bytes_pass_or_raise_an_error_of_ours(
    target: Target, flips: list[tuple[int, int]], in_header: bool
) -> None:
    """Threat: anything not thought of above."""
    raw = bytearray(target.sound)
    end = 8 + target.header_bytes if in_header else len(raw)
    for place, mask in flips:
        raw[place % end] ^= mask
    try:
        target.receive(bytes(raw))
    except DeltaServeError as error:
        error.message.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_header_or_manifest_passes_or_raises_an_error_of_ours(
    target: Target, data: st.DataObject
) -> None:
    """Threat: values of the wrong kind, deep inside."""

    def change(header: dict[str, Any], manifest: dict[str, Any]) -> None:
        node: Any = data.draw(st.sampled_from([header, manifest]))
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                return
            key = data.draw(st.sampled_from(keys))
            if not isinstance(node[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
                node[key] = data.draw(JSON)
                return
            node = node[key]

    try:
        target.receive(target.edited(change))
    except DeltaServeError as error:
        error.message.encode()
    except TypeError as error:  # __metadata__ itself was replaced: `edited` has nowhere to put the manifest
        assert "item assignment" in str(error) or "indices" in str(error)
