"""Every delta-aware layer against dense weights, in steps that mix base, tenants, and tenants without that layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaserve.deltas.artifact import Override
from deltaserve.deltas.resident import ResidentDelta, ResidentLayer
from deltaserve.model import delta_layers
from deltaserve.model.attention import KvCache
from deltaserve.model.delta_layers import DeltaEmbedding, DeltaHead, DeltaLinear, DeltaModule
from deltaserve.model.step import Step, StepContext
from deltaserve_kernels.segments import Segments
from deltaserve_kernels.terms import Coded, LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

IN, OUT, VOCAB = 6, 8, 10
SLOTS = [-1, -1, 0, 0, 0, 1, 2, 3, 3]  # of the rows of a step
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(matrix: Tensor) -> Coded:
    return Coded(*matrix.shape, 32, "float", matrix)


def low_rank(rows: int, cols: int, seed: int) -> LowRank:
    left, right = random(rows, 2, seed=seed), random(2, cols, seed=seed + 1)
    return LowRank(dense(left), torch.tensor([1.5, 0.5]), dense(right))


def whole(values: Tensor) -> Override:
    return Override(values, None, tuple(values.shape))


def some_rows(rows: list[int], size: int, total: int, seed: int) -> Override:
    return Override(random(len(rows), size, seed=seed), torch.tensor(rows, dtype=torch.int64), (total, size))


def enter(context: StepContext, deltas: Sequence[ResidentDelta | None], slots: Sequence[int] = SLOTS) -> None:
    context.step = Step(
        num_rows=len(slots),
        segments=Segments.of(slots),
        head_segments=Segments.of(slots),
        deltas=deltas,
        spans=[],
        block_size=1,
    )


@pytest.fixture
def context() -> StepContext:
    return StepContext(KvCache(0))


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_the_restored_one_of_each_row(context: StepContext, bias: bool) -> None:
    base = nn.Linear(IN, OUT, bias=bias)
    terms = [(dense(random(OUT, IN, seed=1)),), (low_rank(OUT, IN, 2), dense(random(OUT, IN, seed=4)))]
    own_bias = random(OUT, seed=5)
    deltas = [
        ResidentDelta({"l.weight": ResidentLayer(terms[0]), "other.weight": ResidentLayer(terms[1])}, {}),
        ResidentDelta({"other.weight": ResidentLayer(terms[0])}, {}),
        ResidentDelta({"l.weight": ResidentLayer(terms[1])}, {"l.bias": whole(own_bias)}),
        ResidentDelta({}, {"l.bias": whole(own_bias)}),
    ]
    enter(context, deltas)
    x = random(1, len(SLOTS), IN, seed=9)
    y = DeltaLinear(base, "l", 0, context)(x)
    assert y.shape == (1, len(SLOTS), OUT)
    for row, slot in enumerate(SLOTS):
        weight, shift = base.weight, base.bias
        if slot in (0, 2):
            weight = weight + sum(term.decode() for term in terms[slot // 2])
        if slot in (2, 3):
            shift = own_bias
        torch.testing.assert_close(y[0, row], F.linear(x[0, row], weight, shift), **CLOSE)


def added(values: Tensor) -> Override:
    return Override(values, None, tuple(values.shape), adds=True)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layers_scalars_multiply_terms_and_base_but_no_bias(context: StepContext, bias: bool) -> None:
    base, terms = nn.Linear(IN, OUT, bias=bias), (low_rank(OUT, IN, 2), dense(random(OUT, IN, seed=4)))
    scalars = [(0.5, 0.0), (1.0, -0.25), (-2.0, 1.5), (0.0, -1.0)]
    deltas = [ResidentDelta({"l.weight": ResidentLayer(terms, *pair)}, {}) for pair in scalars]
    enter(context, deltas)
    x = random(1, len(SLOTS), IN, seed=9)
    y = DeltaLinear(base, "l", 0, context)(x)
    for row, slot in enumerate(SLOTS):
        weight = base.weight
        if slot >= 0:
            gamma, shift = scalars[slot]
            weight = (1 + shift) * weight + gamma * sum(term.decode() for term in terms)
        torch.testing.assert_close(y[0, row], F.linear(x[0, row], weight, base.bias), **CLOSE)


def test_a_bias_may_be_a_difference(context: StepContext) -> None:
    base, difference = nn.Linear(IN, OUT), random(OUT, seed=5)
    layer = ResidentLayer((low_rank(OUT, IN, 2),), 1.0, 0.5)
    deltas = [ResidentDelta({}, {"l.bias": added(difference)})]
    deltas += [ResidentDelta({"l.weight": layer}, {"l.bias": added(-difference)})]
    enter(context, deltas, [-1, 0, 1])
    x = random(1, 3, IN, seed=9)
    y = DeltaLinear(base, "l", 0, context)(x)[0]
    weight = 1.5 * base.weight + layer.terms[0].decode()
    torch.testing.assert_close(y[0], F.linear(x[0, 0], base.weight, base.bias), **CLOSE)
    torch.testing.assert_close(y[1], F.linear(x[0, 1], base.weight, base.bias + difference), **CLOSE)
    torch.testing.assert_close(y[2], F.linear(x[0, 2], weight, base.bias - difference), **CLOSE)


def head_of(context: StepContext, *, tied: bool, bias: bool = False) -> tuple[nn.Linear, DeltaHead]:
    base = nn.Linear(IN, VOCAB, bias=bias)
    return base, DeltaHead(base, "lm_head", 0, "model.embed", tied, context)


@pytest.mark.parametrize("bias", [False, True])
def test_an_untied_head_has_each_tenants_rows_and_no_more(context: StepContext, bias: bool) -> None:
    base, head = head_of(context, tied=False, bias=bias)
    term = low_rank(VOCAB, IN, 3)
    overrides = [some_rows([2, 5, 10, 11], IN, 12, 1), whole(random(VOCAB, IN, seed=2))]
    deltas = [
        ResidentDelta({}, {"lm_head.weight": overrides[0]}),
        ResidentDelta({"lm_head.weight": ResidentLayer((term,), 0.5, -0.25)}, {}),
        ResidentDelta({}, {"lm_head.weight": overrides[1], "model.embed.weight": overrides[0]}),
        ResidentDelta({}, {"model.embed.weight": overrides[0]}),
    ]
    enter(context, deltas)
    x = random(len(SLOTS), IN, seed=9)
    y = head(x)
    assert y.shape == (len(SLOTS), 12)
    weights = {0: overrides[0].apply(base.weight), 1: 0.75 * base.weight + 0.5 * term.decode(), 2: overrides[1].values}
    for row, slot in enumerate(SLOTS):
        weight = weights.get(slot, base.weight)
        expected = F.linear(x[row], weight)
        if bias:
            expected[:VOCAB] += base.bias
        torch.testing.assert_close(y[row, : len(weight)], expected, **CLOSE)
        assert bool((y[row, len(weight) :] == -torch.inf).all())


def test_a_tied_head_follows_the_embedding_unless_the_tenant_unties_it(context: StepContext) -> None:
    base, head = head_of(context, tied=True)
    embedding, own = some_rows([0, 4, 10], IN, 11, 1), some_rows([3], IN, VOCAB, 2)
    deltas = [
        ResidentDelta({}, {"model.embed.weight": embedding}),
        ResidentDelta({}, {"model.embed.weight": embedding, "lm_head.weight": own}, unties_head=True),
        ResidentDelta({}, {"model.embed.weight": embedding}, unties_head=True),
        ResidentDelta({}, {}),
    ]
    enter(context, deltas)
    x = random(len(SLOTS), IN, seed=9)
    y = head(x)
    weights = {0: embedding.apply(base.weight), 1: own.apply(base.weight)}
    for row, slot in enumerate(SLOTS):
        weight = weights.get(slot, base.weight)
        torch.testing.assert_close(y[row, : len(weight)], F.linear(x[row], weight), **CLOSE)
        assert bool((y[row, len(weight) :] == -torch.inf).all())


def test_an_embedding_has_each_tenants_rows(context: StepContext) -> None:
    base = nn.Embedding(VOCAB, IN)
    overrides = [
        some_rows([1, 4, 10, 11], IN, 12, 1),
        whole(random(VOCAB + 1, IN, seed=2)),
        some_rows([], IN, VOCAB, 3),
    ]
    deltas = [ResidentDelta({}, {"e.weight": override}) for override in overrides] + [ResidentDelta({}, {})]
    enter(context, deltas)
    ids = torch.tensor([[1, 9, 1, 11, 3, 10, 1, 4, 9]])
    y = DeltaEmbedding(base, "e", context)(ids)
    for row, slot in enumerate(SLOTS):
        table = overrides[slot].apply(base.weight) if slot in (0, 1) else base.weight
        assert torch.equal(y[0, row], table[ids[0, row]])


class Norm(nn.Module):
    """As Llama's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(size, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 9, IN), 1), ((9, IN), 0), ((1, 9, 4, IN), 1), ((1, 4, 9, IN), 2), ((1, 9, 9, IN), 1), ((1, 9, 9, IN), 2)],
    ids=str,
)
@pytest.mark.parametrize("kind", [Norm, nn.LayerNorm])
def test_a_norm_is_each_tenants_own_whatever_the_shape(context: StepContext, shape: Any, axis: int, kind: Any) -> None:
    base = kind(IN)
    own = {name: random(IN, seed=7) for name, _ in base.named_parameters()}
    deltas = [
        ResidentDelta({}, {f"n.{name}": whole(tensor) for name, tensor in own.items()}),
        ResidentDelta({}, {}),
        ResidentDelta({}, {"n.weight": added(own["weight"] - base.weight.detach())}),
        ResidentDelta({}, {"other.weight": whole(own["weight"])}),
    ]
    enter(context, deltas)
    x = random(*shape, seed=3)
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    y = DeltaModule(base, "n", axis, context)(x)
    rows, answers = x.movedim(axis, 0), y.movedim(axis, 0)
    for row, slot in enumerate(SLOTS):
        changed = own if slot == 0 else {"weight": own["weight"]} if slot == 2 else {}
        expected = torch.func.functional_call(base, {**before, **changed}, (rows[row],))
        torch.testing.assert_close(answers[row], expected, **CLOSE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.named_parameters())


def test_a_norm_that_fails_keeps_the_bases_tensors(context: StepContext) -> None:
    base = Norm(IN)
    enter(context, [ResidentDelta({}, {"n.weight": whole(random(IN + 1, seed=1))})], [0, 0])
    with pytest.raises(RuntimeError):
        DeltaModule(base, "n", 1, context)(random(1, 2, IN, seed=1))
    assert base.weight.shape == (IN,)


def layers(context: StepContext) -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "linear": (DeltaLinear(nn.Linear(IN, OUT), "l", 0, context), random(1, 2, IN, seed=1)),
        "head": (head_of(context, tied=False)[1], random(2, IN, seed=1)),
        "embedding": (DeltaEmbedding(nn.Embedding(VOCAB, IN), "e", context), torch.tensor([[1, 2]])),
        "norm": (DeltaModule(Norm(IN), "n", 1, context), random(1, 2, IN, seed=1)),
    }


@pytest.mark.parametrize("kind", ["linear", "head", "embedding", "norm"])
def test_an_empty_slot_is_an_error_and_never_the_base(context: StepContext, kind: str) -> None:
    layer, x = layers(context)[kind]
    enter(context, [None], [-1, 0])
    with pytest.raises(LookupError):
        layer(x)


@pytest.mark.parametrize("kind", ["linear", "head", "embedding", "norm"])
def test_rows_of_the_base_alone_do_nothing_beyond_the_base(
    context: StepContext, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a step of the base applied a term")

    monkeypatch.setattr(delta_layers, "apply_term", never)
    layer, x = layers(context)[kind]
    layers_of_one = {"l.weight": ResidentLayer((low_rank(OUT, IN, 1),), 0.5, 0.5)}
    deltas = [ResidentDelta(layers_of_one, {"n.weight": whole(random(IN, seed=2))})]
    enter(context, deltas, [-1, -1])
    y = layer(x)
    bases = {
        "linear": lambda: F.linear(x, layer.weight, layer.bias),  # type: ignore[arg-type]
        "head": lambda: F.linear(x, layer.weight),  # type: ignore[arg-type]
        "embedding": lambda: F.embedding(x, layer.weight),  # type: ignore[arg-type]
        "norm": lambda: layer.base(x),  # type: ignore[operator]
    }
    assert torch.equal(y, bases[kind]())


def test_a_layer_outside_a_step_is_a_bug(context: StepContext) -> None:
    with pytest.raises(AssertionError):
        DeltaLinear(nn.Linear(IN, OUT), "l", 0, context)(random(1, 2, IN, seed=1))
