"""Tenants of every kind, both decoders, and towns of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve_kernels.native.library import available

from .rig import load
from .town import CODECS, SHAPES, Town

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from deltaserve.model.load import ServedModel


@pytest.fixture(scope="module")
def artifacts(
    tiny_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Four tenants of different codecs, and a second version of the first."""
    folder = tmp_path_factory.mktemp("tenants")
    found = {}
    for seed, name in enumerate([*CODECS, "sign-2"]):
        codec, budget, options = CODECS[name.removesuffix("-2")]
        tuned = make_finetune(tiny_base, folder / name, scale=0.1, seed=seed, **SHAPES[name.removesuffix("-2")])
        path = folder / f"{name}.safetensors"
        made = make_codec(codec, budget, options)
        compress(Checkpoint.open(tiny_base), Checkpoint.open(tuned), made, path, seed=seed)
        found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module", params=["transformers", "native"])
def model(tiny_base: Path, request: pytest.FixtureRequest) -> ServedModel:
    if request.param == "native" and not available():
        pytest.skip("no native kernels here")
    made = load(tiny_base, kv_slots=256, dtype=torch.bfloat16 if request.param == "native" else torch.float32)
    assert made.runtime["decoder"] == request.param
    return made


@pytest.fixture
def make_town(model: ServedModel, artifacts: dict[str, bytes], tmp_path: Path) -> Iterator[Callable[..., Town]]:
    towns: list[Town] = []

    def make(**options: Any) -> Town:
        towns.append(Town(model, tmp_path / str(len(towns)), **options))
        for name in CODECS:
            towns[-1].upload(name, artifacts[name])
        return towns[-1]

    yield make
    for town in towns:
        town.close()
