"""Coverage-guided fuzzing of everything that reads an uploaded artifact: header, manifest, checks, decoding.

    python -m tests.attacks.fuzz_artifact [--seconds 900] [--corpus DIR]      (pip install 'deltaserve[fuzz]')

libFuzzer (atheris) mutates sound artifacts of every kind, as bytes and as JSON: the second keeps the lengths right, so
that it reaches what lies behind the parser. An input passes or raises an error of ours; anything else is a finding, and
so is one that takes over 10 seconds or 2 GB. Inputs that reached something new stay in the corpus; what is found is
left in it as crash-…, timeout-… or oom-….
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["deltaserve", "deltaserve_kernels"]):
    from deltaserve.deltas.artifact import deflated
    from deltaserve.errors import DeltaServeError

    from .target import Target, inflated, with_header

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    64,
    255,
    2**31,
    2**53,
    2**63,
    1e308,
    0.5,
    "",
    "F32",
    "\u202e",
    [],
    {},
]
KINDS = ("bitdelta", "dare", "delta-svd", "every-kind", "every-kind packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=900)
    parser.add_argument("--corpus", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        corpus = args.corpus or Path(scratch) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        targets = [_target(Path(scratch) / kind.replace(" ", "-"), kind) for kind in KINDS]
        for kind, target in zip(KINDS, targets, strict=True):
            (corpus / f"sound-{kind.replace(' ', '-')}").write_bytes(target.sound)

        def one_input(raw: bytes) -> None:
            try:
                targets[0].read(raw)  # all have the same base
            except DeltaServeError as error:
                error.message.encode()

        longest = 4 * max(len(target.sound) for target in targets)
        flags = [f"-max_total_time={args.seconds}", f"-max_len={longest}", "-timeout=10", "-rss_limit_mb=2048"]
        flags += [f"-artifact_prefix={corpus}/", "-print_final_stats=1", str(corpus)]
        atheris.Setup([sys.argv[0], *flags], one_input, custom_mutator=_mutated)
        atheris.Fuzz()


def _target(folder: Path, kind: str) -> Target:
    codec, _, packed = kind.partition(" ")
    folder.mkdir()
    return Target(folder, codec, packed=bool(packed))


def _mutated(raw: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time bytes; half of the time a value in the header or in the manifest, with lengths that fit."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        try:
            made = _edited(raw, draw)
        except (ValueError, LookupError, TypeError, AttributeError, struct.error, zlib.error, RecursionError):
            made = b""
        if 0 < len(made) <= max_size:
            return made
    return bytes(atheris.Mutate(raw, max_size))


def _edited(raw: bytes, draw: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header["__metadata__"]
    manifest = metadata["deltaserve"]
    is_deflated = not manifest.startswith("{")
    tree = json.loads(inflated(manifest))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        _change(draw.choice((header, tree, tree)), draw)
    text = json.dumps(tree)
    metadata["deltaserve"] = deflated(text) if is_deflated else text
    return with_header(json.dumps(header).encode(), data)


def _change(node: Any, draw: random.Random) -> None:
    """One value anywhere below `node`: another one, a copy of a neighbour, or gone."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and draw.random() < 0.85:
            node = node[key]
            continue
        match draw.randrange(4):
            case 0:
                node[key] = node[draw.choice(keys)]
            case 1:
                del node[key]
            case 2 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
                node[key] += draw.choice((-8, -1, 1, 8))
            case _:
                node[key] = draw.choice(VALUES)
        return


if __name__ == "__main__":
    main()
