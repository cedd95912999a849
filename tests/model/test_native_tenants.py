"""Every tenant of a mixed batch is served natively in bfloat16 as its restored checkpoint answers in float32; and what
a request is answered depends on nothing else: bit for bit.

Tolerance against float32: as in test_native_decoder.py.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.deltas.artifact import Override
from deltaserve.deltas.resident import ResidentDelta
from deltaserve_kernels.native.parts import Part

from .native_bases import Text, advance, decode, llama, load_native, reference, relative_rms, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOLERANCE = 2e-2
PROMPT = [5, 9, 200, 31, 77, 4, 4, 120, 250, 66, 13, 87, 5, 299, 8, 91, 42, 17, 3]


class Served:
    """A model, its tenants in slots, and what each of them answers alone."""

    def __init__(self, town: Any) -> None:
        self.town, self.model = town, load_native(town.base, kv_slots=1024)
        self.slots = {name: slot for slot, name in enumerate(town.tenants)} | {"base": -1}
        self.deltas: list[ResidentDelta | None] = []
        for artifact, _ in town.tenants.values():
            self.model.check_servable(artifact)
            self.deltas.append(self.model.load_delta(artifact))
        self._blocks = itertools.count()

    def text(self, name: str, prompt: list[int] = PROMPT, blocks: list[int] | None = None) -> Text:
        size = self.model.keys.shape[1]
        own = [next(self._blocks) % size for _ in range(3)] if blocks is None else blocks
        tokens = list(prompt)
        if name == "grown":
            tokens[9] = self.model.vocab_size + 1  # its second own token
        return Text(tokens, self.slots[name], own)

    def alone(self, name: str) -> Text:
        text = self.text(name)
        decode(self.model, [text], 4, self.deltas)
        return text

    def together(self) -> dict[str, Text]:
        texts = {name: self.text(name) for name in self.slots}
        decode(self.model, list(texts.values()), 4, self.deltas)
        return texts

    @torch.inference_mode()
    def poison_cache(self) -> None:
        self.model.keys.fill_(torch.nan)
        self.model.values.fill_(torch.nan)

    @torch.inference_mode()
    def poison_sums(self) -> None:
        """Buffers of float32; what is past a row's end in the others stays zero."""
        for buffer in self.model._buffers.values():
            if buffer.dtype == torch.float32:
                buffer.fill_(torch.nan)


@pytest.fixture(scope="module", params=["tied", "untied"])
def served(request: pytest.FixtureRequest, towns: dict[str, Any]) -> Served:
    return Served(towns[request.param])


@pytest.fixture(scope="module")
def alone(served: Served) -> dict[str, Text]:
    return {name: served.alone(name) for name in served.slots}


@pytest.fixture
def one_thread(served: Served) -> Iterator[None]:
    """Afterwards."""
    yield
    served.model.library.set_threads(1)


def check(found: Text, wanted: Text) -> None:
    assert found.tokens == wanted.tokens
    assert torch.equal(found.stacked, wanted.stacked)


def test_every_tenant_of_a_mixed_batch_is_served_as_it_is_restored(served: Served) -> None:
    directories = {name: directory for name, (_, directory) in served.town.tenants.items()} | {"base": served.town.base}
    texts = served.together()
    for name, text in texts.items():
        wanted = reference(directories[name], text.tokens)
        assert text.stacked.shape == wanted.shape
        error = relative_rms(text.stacked, wanted)
        assert error <= TOLERANCE, name
        assert error <= relative_rms(reference(directories[name], text.tokens, torch.bfloat16), wanted), name
    logits = {name: text.stacked[0] for name, text in texts.items()}  # of the same first token
    for name, other in itertools.combinations(logits, 2):
        width = min(len(logits[name]), len(logits[other]))
        assert relative_rms(logits[name][:width], logits[other][:width]) > 0.01, (name, other)


def test_alone_is_the_same_as_among_all_others(served: Served, alone: dict[str, Text]) -> None:
    for name, text in served.together().items():
        check(text, alone[name])


@pytest.mark.parametrize("sizes", [(1,) * 19, (5, 1, 13), (2, 17), (18, 1)], ids=str)
def test_the_boundaries_of_chunks_change_nothing(
    served: Served, alone: dict[str, Text], sizes: tuple[int, ...]
) -> None:
    texts = {name: served.text(name) for name in served.slots}
    for size in sizes:
        advance(served.model, [(text, size) for text in texts.values()], served.deltas)
    for text in texts.values():
        text.tokens.append(int(text.logits[-1].argmax()))
    decode(served.model, list(texts.values()), 3, served.deltas)
    for name, text in texts.items():
        check(text, alone[name])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_at_other_places_and_threads_change_nothing(
    served: Served, alone: dict[str, Text], threads: int
) -> None:
    """Prompts beside tokens, several requests of a tenant in one run, a second thread."""
    served.model.library.set_threads(threads)
    first = {name: served.text(name) for name in served.slots}
    for text in list(first.values())[::2]:
        advance(served.model, [(text, 7)], served.deltas)
    late = [served.text(name, PROMPT[:6] * 3) for name in served.slots]
    advance(served.model, [(text, len(PROMPT) - len(text.logits)) for text in first.values()], served.deltas)
    for text in first.values():
        text.tokens.append(int(text.logits[-1].argmax()))
    advance(served.model, [*((text, 1) for text in first.values()), *((text, 18) for text in late)], served.deltas)
    for text in first.values():
        text.tokens.append(int(text.logits[-1].argmax()))
    decode(served.model, list(first.values()), 2, served.deltas)
    for name, text in first.items():
        check(text, alone[name])


def test_a_preempted_request_goes_on_as_if_nothing_had_happened(served: Served, alone: dict[str, Text]) -> None:
    texts = {name: served.text(name) for name in served.slots}
    decode(served.model, list(texts.values()), 1, served.deltas)
    for text in texts.values():
        text.tokens.append(int(text.logits[-1].argmax()))
        text.blocks = served.text("base").blocks
        text.logits.clear()  # prompt and answer are computed again, elsewhere
    decode(served.model, list(texts.values()), 2, served.deltas)
    for name, text in texts.items():
        check(text, alone[name])


def test_what_lay_in_the_cache_shows_nothing(served: Served, alone: dict[str, Text]) -> None:
    served.poison_cache()
    for name, text in served.together().items():
        check(text, alone[name])


def test_a_poisoned_neighbour_shows_nothing(served: Served, alone: dict[str, Text]) -> None:
    """Its keys, values and activations are not numbers, in the steps and in the runs of the others."""
    sick = {name: served.text(name) for name in served.slots}
    for text in sick.values():
        advance(served.model, [(text, 6)], served.deltas)
    served.poison_cache()
    texts = {name: served.text(name) for name in served.slots}
    advance(served.model, [(text, 13) for text in sick.values()], served.deltas)
    for text in sick.values():
        assert text.logits[-1].isnan().any()
        text.tokens.append(3)
    both = [*((text, len(text.tokens)) for text in texts.values()), *((text, 1) for text in sick.values())]
    advance(served.model, both, served.deltas)
    for text in texts.values():
        text.tokens.append(int(text.logits[-1].argmax()))
    decode(served.model, list(texts.values()), 3, served.deltas)
    for name, text in texts.items():
        check(text, alone[name])


def test_buffers_of_a_longer_step_do_not_show_in_a_shorter_one(served: Served, alone: dict[str, Text]) -> None:
    long = [served.text(name, PROMPT * 2) for name in served.slots]
    advance(served.model, [(text, 38) for text in long], served.deltas)
    served.poison_sums()
    for name in served.slots:
        check(served.alone(name), alone[name])


def test_a_new_version_in_a_slot_is_used_at_once_and_the_old_one_when_it_is_back(
    served: Served, alone: dict[str, Text]
) -> None:
    names = list(served.town.tenants)
    for name, other in itertools.pairwise(names):
        if "grown" in (name, other):
            continue  # a token of its own
        deltas = list(served.deltas)
        deltas[served.slots[name]] = served.deltas[served.slots[other]]
        text = served.text(name)
        decode(served.model, [text], 4, deltas)
        check(text, alone[other])
        check(served.alone(name), alone[name])
    artifact, _ = served.town.tenants[names[0]]
    loaded_again = [served.model.load_delta(artifact), *served.deltas[1:]]
    text = served.text(names[0])
    decode(served.model, [text], 4, loaded_again)
    check(text, alone[names[0]])


def test_what_was_made_of_a_delta_goes_with_it(served: Served) -> None:
    artifact, _ = next(iter(served.town.tenants.values()))
    before = len(served.model._deltas)
    delta = served.model.load_delta(artifact)
    advance(served.model, [(Text([5, 9], 0, [0]), 2)], [delta])
    assert len(served.model._deltas) == before + 1
    del delta
    assert len(served.model._deltas) == before


def test_an_empty_slot_is_an_error_and_never_the_base(served: Served) -> None:
    with pytest.raises(LookupError, match="slot 1 is empty"):
        advance(served.model, [(served.text("base"), 3), (Text([5, 9], 1, [0]), 2)], [served.deltas[0], None])


def test_parts_serve_all_terms_but_the_rare_forms(served: Served) -> None:
    for (name, _), delta in zip(served.town.tenants.items(), served.deltas, strict=True):
        assert delta is not None
        terms = [term for layer in delta.layers.values() for term in layer.terms]
        assert all(isinstance(term, Part) for term in terms) == (name != "kinds"), name


def test_a_head_of_the_tenants_own_is_exact_where_a_product_of_torch_depends_on_the_rows(tmp_path: Path) -> None:
    base = save(llama(hidden_size=576, num_hidden_layers=1, tie_word_embeddings=True), tmp_path / "base")
    model, values = load_native(base), torch.randn(311, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = torch.arange(1, 300, 3)
    deltas = [
        ResidentDelta({}, {"lm_head.weight": Override(values, None, (311, 576))}, unties_head=True),
        ResidentDelta({}, {"model.embed_tokens.weight": Override(values[rows], rows, (301, 576))}),
    ]
    whole, single = ([Text(list(PROMPT), slot, [slot, 2 + slot]) for slot in (0, 1)] for _ in range(2))
    advance(model, [(text, len(PROMPT)) for text in whole], deltas)
    for _ in PROMPT:
        for text in single:
            advance(model, [(text, 1)], deltas)
    for one, other, width in zip(whole, single, (311, 301), strict=True):
        check(one, other)
        assert one.stacked.shape == (len(PROMPT), width)
