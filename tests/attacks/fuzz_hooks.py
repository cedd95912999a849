"""For fuzz_api: schemathesis guesses no name that there is. Half of its requests, by their content, get one."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import schemathesis

MODELS = ("tiny", "mine", "mine@1", "mine@2")
IDS = json.loads(os.environ["FUZZ_IDS"])  # by what paths call them


def _is_chosen(value: Any) -> bool:
    return zlib.crc32(repr(value).encode()) % 2 == 0


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:  # noqa: ARG001
    if isinstance(body, dict) and isinstance(body.get("model"), str) and _is_chosen(body):
        body = {**body, "model": MODELS[len(repr(body)) % len(MODELS)]}
    if isinstance(body, dict) and isinstance(body.get("files"), list) and _is_chosen(body):
        body = {**body, "files": IDS["checkpoint"].split()}
    return body


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    if context.operation.method != "delete" and isinstance(path_parameters, dict) and _is_chosen(path_parameters):
        for name in ("name", "model"):
            if name in path_parameters and "admin" not in context.operation.path:
                path_parameters[name] = MODELS[1 + len(repr(path_parameters)) % 3]
        path_parameters |= {name: IDS[name] for name in IDS if name in path_parameters}
    return path_parameters
