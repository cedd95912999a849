"""Decode steps that are recorded and replayed, on a CPU by a graph in software, against steps that run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Gemma2Config, GPTNeoXConfig, MixtralConfig, OPTConfig, Qwen3Config

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.errors import BadRequest, CheckpointError
from deltaserve.model.attention import Span
from deltaserve.model.load import load_model
from deltaserve.model.recording import GraphLimits, Record, Recording
from deltaserve.model.step_buffers import StepBuffers
from deltaserve.model.transformers_model import TransformersModel
from deltaserve_kernels.fused.tables import Tables
from deltaserve_kernels.segments import Segments

from ..support import tape
from .native_bases import BLOCK, Text, advance, relative_rms, save

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaserve.deltas.resident import ResidentDelta

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 6  # sizes 1, 2, 4 and 6
SLOTS = 5
SAME = 1e-5  # of the logits: products of more rows than there are may round otherwise


class Recorder:
    """Counts what is recorded, and replays."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self._record: Record = tape.record
        if torch.cuda.is_available():
            from deltaserve.model.recording import cuda_recorder

            self._record = cuda_recorder()

    def __call__(self, run: Any) -> Recording:
        self.recordings += 1
        recording = self._record(run)

        def counted() -> None:
            self.replays += 1
            recording.replay()

        return recording._replace(replay=counted)


def load(base: Path, record: Record | None = None, **more: Any) -> TransformersModel:
    limits = None if record is None else GraphLimits(ROWS, SLOTS, 256, record=record, **more)
    model = load_model(
        Checkpoint.open(base),
        device=DEVICE,
        dtype=torch.float32,
        kv_slots=512,
        block_size=BLOCK,
        kernels="triton",
        graphs=limits,
    )
    assert isinstance(model, TransformersModel)
    return model


class Pair:
    """The same requests at a model that records and at one that does not."""

    def __init__(self, base: Path) -> None:
        self.recorder = Recorder()
        self.models = [load(base, self.recorder), load(base)]
        self.texts: list[list[Text]] = [[], []]
        self.deltas: list[list[ResidentDelta | None]] = [[None] * SLOTS, [None] * SLOTS]

    def put(self, slot: int, artifact: Any) -> None:
        """What was in the slot is gone: its memory holds other things now."""
        for model, deltas in zip(self.models, self.deltas, strict=True):
            gone = deltas[slot]
            deltas[slot] = model.load_delta(artifact).to(DEVICE)
            if gone is not None and gone.bundle is not None:
                gone.bundle.memory.fill_(255)

    def begin(self, *slots: int, prompt: int = 2) -> None:
        """Requests whose prompts are read in one step."""
        for model, texts, deltas in zip(self.models, self.texts, self.deltas, strict=True):
            first = len(texts)
            new = [Text([5 + slot + 7 * at for at in range(prompt)], slot, [9 + 2 * (first + n), 8 + 2 * (first + n)])
                   for n, slot in enumerate(slots)]  # fmt: skip
            advance(model, [(text, prompt) for text in new], deltas)
            texts += new

    def decode(self, which: Sequence[int]) -> None:
        """One token more for each: that which the model that runs finds likeliest."""
        tokens = [int(text.logits[-1].argmax()) for text in self.texts[1]]
        for model, texts, deltas in zip(self.models, self.texts, self.deltas, strict=True):
            for index in which:
                texts[index].tokens.append(tokens[index])
            advance(model, [(texts[index], 1) for index in which], deltas)

    def check(self) -> None:
        for recorded, run in zip(*self.texts, strict=True):
            assert relative_rms(recorded.stacked, run.stacked) < SAME


@pytest.fixture
def pair(towns: dict[str, Any]) -> Pair:
    return Pair(towns["tied"].base)


def artifacts(towns: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: artifact for name, (artifact, _) in towns[kind].tenants.items()}


def test_steps_of_the_base_are_recorded_at_start(pair: Pair) -> None:
    assert pair.recorder.recordings == 4, "sizes 1, 2, 4 and 6"
    assert pair.recorder.replays, "the check at start goes through them"
    assert [model.runtime["decode"] for model in pair.models] == ["graphs", "kernel by kernel"]
    pair.begin(-1, -1, -1)
    replays = pair.recorder.replays
    for which in ([0, 1, 2], [0, 1, 2], [1], [2, 0]):
        pair.decode(which)
    pair.check()
    assert (pair.recorder.recordings, pair.recorder.replays) == (4, replays + 4)


def test_tenants_come_and_go_between_replays(pair: Pair, towns: dict[str, Any]) -> None:
    """Other requests, other mixes, other deltas in the same slots: one recording of a size serves them all."""
    own = artifacts(towns, "tied")
    pair.put(0, own["sign"])
    pair.put(2, own["grown"])
    pair.begin(-1, 0, 2, 0)
    pair.decode([1, 0, 3])
    assert pair.recorder.recordings == 5
    pair.put(0, own["grown"])  # another delta for the requests of slot 0
    pair.put(3, own["sign"])
    pair.begin(3)
    pair.decode([1, 2, 3, 4])
    pair.check()
    assert pair.recorder.recordings == 5


def test_a_longer_context_than_any_that_was_recorded(pair: Pair) -> None:
    pair.begin(-1, prompt=BLOCK - 1)
    for _ in range(3):  # across a block's end
        pair.decode([0])
    pair.check()
    assert pair.recorder.recordings == 4


def test_a_new_kind_of_part_is_recorded_once(towns: dict[str, Any]) -> None:
    pair, own = Pair(towns["untied"].base), artifacts(towns, "untied")
    pair.put(1, own["vectors"])
    pair.begin(1)
    pair.decode([0])
    assert pair.recorder.recordings == 5
    pair.put(3, own["scalars"])  # rescales the base's product
    pair.begin(3)
    pair.decode([1])
    assert pair.recorder.recordings == 6
    pair.decode([0])  # with launches that find nothing to do
    pair.check()
    assert pair.recorder.recordings == 6


def test_what_is_not_in_the_bundle_runs_kernel_by_kernel(towns: dict[str, Any]) -> None:
    """(IA)³ factors of columns change the base's own input."""
    pair, own = Pair(towns["untied"].base), artifacts(towns, "untied")
    pair.put(0, own["inputs"])
    pair.put(1, own["outputs"])
    pair.begin(0, 1)
    replays = pair.recorder.replays
    pair.decode([0, 1])
    assert pair.recorder.replays == replays
    pair.decode([1])
    assert pair.recorder.replays > replays
    pair.check()


def test_more_rows_than_are_recorded_and_prompts_run_kernel_by_kernel(pair: Pair) -> None:
    pair.begin(*[-1] * (ROWS + 1))
    replays, steps = pair.recorder.replays, dict(pair.models[0].decode_steps)
    pair.decode(range(ROWS + 1))
    pair.begin(-1)
    pair.check()
    assert pair.recorder.replays == replays
    assert pair.models[0].decode_steps == {**steps, "kernels": steps["kernels"] + 1}, "a prompt is no decode step"
    pair.decode([0])
    assert pair.models[0].decode_steps == {"graph": steps["graph"] + 1, "kernels": steps["kernels"] + 1}


def test_a_sequence_longer_than_allowed_runs_kernel_by_kernel(pair: Pair) -> None:
    pair.models[0].graphs._longest = 3
    pair.begin(-1)
    replays = pair.recorder.replays
    pair.decode([0])
    assert pair.recorder.replays == replays + 1
    pair.decode([0])
    pair.check()
    assert pair.recorder.replays == replays + 1


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
OTHERS: dict[str, Any] = {
    "layers within layers": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64),
    "tokens by position": GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=64),
    "norms of heads": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16),
    "caps and windows": Gemma2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16, sliding_window=4
    ),
    "experts": MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=1, num_local_experts=2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_replayed_or_said_not_to_be(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair(save(OTHERS[kind], tmp_path / "base"))
    replays = pair.recorder.replays
    pair.begin(-1, -1, -1)
    for _ in range(3):
        pair.decode([0, 1, 2])
    pair.check()
    is_recorded = pair.models[0].runtime["decode"] == "graphs"
    assert pair.recorder.replays == replays + 3 * is_recorded
    assert is_recorded or "all steps run kernel by kernel, slower" in caplog.text
    assert is_recorded or kind == "experts"


def test_blocks_of_a_row_are_those_of_its_sequence() -> None:
    """Written once: what is added to a list, and another list in its place."""
    buffers = StepBuffers(rows=3, slots=2, blocks=5, device=torch.device("cpu"))

    def filled(*sequences: tuple[int, list[int]]) -> list[list[int]]:
        spans = [Span(row, row + 1, length, own) for row, (length, own) in enumerate(sequences)]
        buffers.fill(spans, 4, Tables.of(Segments(), {}, len(spans)), unused_slot=99)
        views = buffers.device
        assert views["lengths"].tolist() == [*(length for length, _ in sequences), *[0] * (3 - len(spans))]
        at = [own[(length - 1) // 4] * 4 + (length - 1) % 4 for length, own in sequences]
        assert views["write_slots"].tolist() == [*at, *[99] * (3 - len(spans))]
        return [views["blocks"][row, : -(-length // 4)].tolist() for row, (length, _) in enumerate(sequences)]

    first, second = [7, 3], [1]
    assert filled((5, first), (4, second)) == [[7, 3], [1]]
    first.append(9)
    assert filled((9, first), (4, second)) == [[7, 3, 9], [1]]
    assert filled((4, second), (10, first)) == [[1], [7, 3, 9]]
    first = [2, 4, 6]  # it was evicted, and came back elsewhere
    assert filled((4, second), (11, first)) == [[1], [2, 4, 6]]
    assert filled((11, first)) == [[2, 4, 6]]


class Failing:
    """Records until it is told not to."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def __call__(self, run: Any) -> Recording:
        if self.fails:
            raise RuntimeError("out of memory")
        return tape.record(run)


def test_a_model_that_cannot_be_recorded_runs_or_is_refused(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(tiny_base, Failing(fails=True))
    assert model.runtime["decode"] == "kernel by kernel"
    assert "a decode step cannot be recorded: RuntimeError: out of memory" in caplog.text
    with pytest.raises(CheckpointError, match=r"out of memory; --cuda-graphs off serves it kernel by kernel"):
        load(tiny_base, Failing(fails=True), required=True)


def test_recordings_that_answer_otherwise_are_not_used(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(run: Any) -> Recording:
        recording = tape.record(run)
        return recording._replace(output=recording.output.roll(1, -1))

    assert load(tiny_base, wrong).runtime["decode"] == "kernel by kernel"
    assert "a recorded decode step answers otherwise than one that runs" in caplog.text


def test_a_recording_that_fails_later_costs_no_request(towns: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    record = Failing(fails=False)
    models = [load(towns["tied"].base, record), load(towns["tied"].base)]
    record.fails = True
    texts = [Text([5], 0, [3]), Text([5], 0, [3])]
    for model, text in zip(models, texts, strict=True):
        advance(model, [(text, 1)], [model.load_delta(artifacts(towns, "tied")["sign"])])
    assert relative_rms(texts[0].stacked, texts[1].stacked) < SAME
    assert "such steps run kernel by kernel" in caplog.text
    assert models[0].runtime["decode"] == "graphs", "the base's are not lost for that"


def test_graphs_without_a_gpu_are_refused_where_they_are_asked_for(tiny_base: Path) -> None:
    with pytest.raises(BadRequest, match="--cuda-graphs on: they need Triton's kernels on a GPU"):
        load_model(
            Checkpoint.open(tiny_base),
            device=torch.device("cpu"),
            dtype=None,
            kv_slots=64,
            graphs=GraphLimits(4, 4, 64, required=True),
        )


class TestTape:
    """The graph in software refuses what CUDA's refuse."""

    @pytest.mark.parametrize(
        "work",
        [
            lambda x: x * float(x.sum()),
            lambda x: x + torch.tensor([1.0, 2.0]),
            lambda x: x[x > 0],
            lambda x: x[x.nonzero()[:, 0]],
        ],
        ids=["a number is read", "numbers of the host", "a mask", "nonzero"],
    )
    def test_refuses(self, work: Any) -> None:
        x = torch.tensor([1.0, -2.0])
        with pytest.raises(tape.NotRecordable):
            tape.record(lambda: work(x))

    def test_replays_on_what_the_tensors_hold(self) -> None:
        x, kept = torch.tensor([1.0, 2.0]), torch.zeros(2)

        def run() -> torch.Tensor:
            y = torch.zeros(2)
            y += x.view(2) * 3
            kept.add_(y)
            return y.sum()

        first, output, replay = tape.record(run)
        assert first == 9
        x.fill_(5)
        kept.zero_()
        replay()
        replay()
        assert output == 30
        assert kept.tolist() == [30, 30]
