"""What an artifact can say is served as it is restored: logits in float32 on a tiny base, all tenants in one batch.

Tolerance: 1e-5 of the largest logit. The rest is the order of additions. Greedy tokens are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.codecs.bitdelta import BitDelta
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import Scalars, compress
from deltaserve.deltas.resident import ResidentDelta
from deltaserve.deltas.restore import restore

from ..isolation.rig import Rig, load, make_request
from ..support.kinds import EveryKind, kinds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOLERANCE = 1e-5
PROMPT = [5, 9, 200, 31, 77, 4, 4, 120]
Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
TENANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kinds": {"codec": EveryKind(), "scalars": {Q_PROJ: Scalars(0.5, 0.25)}},
    "scalars": {"scalars": {Q_PROJ: Scalars(gamma=0.5, base_shift=-0.25), DOWN_PROJ: Scalars(gamma=-2.0)}},
    "shift": {"scalars": {Q_PROJ: Scalars(base_shift=0.5), DOWN_PROJ: Scalars(base_shift=-0.125)}},
    "vectors": {"vector_bits": 4},
}


@pytest.fixture(scope="module")
def tenants(
    untied_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Artifact, Path]]:
    """Artifact and restored checkpoint by name. The base has attention biases, all of them changed."""
    folder, base = tmp_path_factory.mktemp("served"), Checkpoint.open(untied_base)
    found = {}
    for seed, (name, options) in enumerate(TENANTS.items()):
        tuned = Checkpoint.open(make_finetune(untied_base, folder / f"{name}-tuned", scale=0.05, seed=seed))
        codec, rest = options.get("codec", BitDelta()), {key: options[key] for key in options if key != "codec"}
        artifact = compress(base, tuned, codec, folder / f"{name}.safetensors", seed=7, **rest)
        restore(base, artifact, folder / name, dtype=torch.float32)
        found[name] = (artifact, folder / name)
    return found


@pytest.fixture(scope="module")
def deltas(tenants: dict[str, tuple[Artifact, Path]]) -> dict[str, ResidentDelta]:
    return {name: ResidentDelta.load(artifact) for name, (artifact, _) in tenants.items()}


def test_every_tenant_of_a_mixed_batch_is_served_as_it_is_restored(
    tenants: dict[str, tuple[Artifact, Path]], deltas: dict[str, ResidentDelta], untied_base: Path
) -> None:
    rig = Rig.of(load(untied_base, kv_slots=256), deltas)
    requests = {name: make_request(PROMPT, name) for name in tenants} | {"base": make_request(PROMPT)}
    answers = dict(zip(requests, rig.run(*requests.values()), strict=True))
    assert rig.num_steps < 10  # prompts and tokens of all of them in the same steps

    directories = {name: directory for name, (_, directory) in tenants.items()} | {"base": untied_base}
    for name, directory in directories.items():
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        ids = PROMPT + answers[name]
        with torch.no_grad():
            wanted = reference(torch.tensor([ids])).logits[0, len(PROMPT) - 1 : -1]  # float32 [tokens, V]
        served = rig.logits(requests[name])
        assert float((served - wanted).abs().max() / wanted.abs().max()) <= TOLERANCE, name
        assert answers[name] == wanted.argmax(1).tolist(), name

    logits = {name: rig.logits(request)[0] for name, request in requests.items()}  # of the same prompt
    names = list(logits)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert float((logits[name] - logits[other]).abs().max()) > 0.01, (name, other)


def test_memory_is_what_was_promised(
    tenants: dict[str, tuple[Artifact, Path]], deltas: dict[str, ResidentDelta]
) -> None:
    for name, (artifact, _) in tenants.items():
        assert artifact.resident_bytes == deltas[name].nbytes


def test_the_artifact_of_every_kind_has_them_all(tenants: dict[str, tuple[Artifact, Path]]) -> None:
    artifact, _ = tenants["kinds"]
    layer = artifact.manifest.layers[Q_PROJ]
    assert artifact.manifest.packed
    assert len(layer.terms) == len(kinds(64, 64))
    assert {term.kind for term in layer.terms} == {
        "coded",
        "low-rank",
        "codebook",
        "patches",
        "placed",
        "rotated",
        "exact",
    }
    assert (layer.gamma, layer.base_shift) == (0.5, 0.25)
