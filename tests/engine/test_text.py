"""The text side of each model: its tokenizer, template, defaults and ends are its own, or the base's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import end_ids
from deltaserve.deltas.compress import compress
from deltaserve.engine.templates import TemplateRenderer
from deltaserve.engine.text import Sink, TextSide
from deltaserve.engine.types import SamplingParams
from deltaserve.errors import ContextLengthExceeded, NotFound
from deltaserve.ids import DeltaDigest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TENANT = DeltaDigest("t" * 64)


@pytest.fixture(scope="module")
def text(tiny_base: Path, tiny_finetune: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextSide]:
    base = Checkpoint.open(tiny_base)
    path = tmp_path_factory.mktemp("text") / "delta.safetensors"
    artifact = compress(base, Checkpoint.open(tiny_finetune), make_codec("bitdelta"), path)

    def manifest_of(digest: DeltaDigest) -> Any:
        if digest != TENANT:
            raise NotFound("gone")
        return artifact.manifest

    side = TextSide(base, base.config["vocab_size"], 64, TemplateRenderer(), manifest_of)
    yield side
    side.close()


def pieces(text: TextSide, digest: DeltaDigest | None, answer: str, **params: Any) -> tuple[list[str], str | None]:
    """What a sink says of `answer` token by token, its rest last, and the stop string that ended it."""
    profile = text.profile(digest)
    sink = Sink(profile, [5, 9], SamplingParams(max_tokens=100, **params))
    told = []
    for token in text.encode(profile, answer, add_special_tokens=False):
        piece, stopped = sink.push(token, True)
        told.append(piece)
        if stopped is not None:
            return told, stopped
    return [*told, sink.finish()], None


def test_a_tenant_has_its_own_vocabulary_defaults_and_ends_and_the_base_keeps_its_own(text: TextSide) -> None:
    base, tenant = text.base_profile, text.profile(TENANT)
    assert tenant.vocab_size == base.vocab_size + 2
    assert base.eos_ids == {2}
    assert base.vocab_size + 1 in tenant.eos_ids
    assert (tenant.defaults["temperature"], tenant.defaults["top_p"]) == (0.5, 0.9)
    assert "temperature" not in base.defaults
    assert text.encode(tenant, "<|tool|>", add_special_tokens=False) == [base.vocab_size]
    assert max(text.encode(base, "<|tool|>", add_special_tokens=False)) < base.vocab_size


def test_each_model_writes_conversations_by_its_own_template(text: TextSide) -> None:
    messages = [{"role": "user", "content": "delta"}]
    for digest, written in [(None, "<|user|>delta</s><|assistant|>"), (TENANT, "[user] delta<|end_of_turn|>")]:
        profile = text.profile(digest)
        assert text.chat_prompt(profile, messages) == text.encode(profile, written, add_special_tokens=False)


def test_a_digest_that_is_gone_is_not_the_base(text: TextSide) -> None:
    with pytest.raises(NotFound):
        text.profile(DeltaDigest("g" * 64))


def test_a_profile_is_made_once(text: TextSide) -> None:
    assert text.profile(TENANT) is text.profile(TENANT)
    assert text.profile(None) is text.base_profile


@pytest.mark.parametrize("answer", ["a delta is small", "Zwölf Boxkämpfer", "你好 🦊!", " leading and trailing "])
@pytest.mark.parametrize("digest", [None, TENANT])
def test_the_pieces_of_an_answer_are_the_answer(text: TextSide, digest: DeltaDigest | None, answer: str) -> None:
    told, stopped = pieces(text, digest, answer)
    assert ("".join(told), stopped) == (answer, None)
    assert "\ufffd" not in "".join(told)


def test_a_stop_string_across_tokens_ends_the_text_before_it(text: TextSide) -> None:
    told, stopped = pieces(text, None, "one base model share", stop=("e mod", "zzz"))
    assert ("".join(told), stopped) == ("one bas", "e mod")


def test_what_only_looked_like_a_stop_string_is_told_at_the_end(text: TextSide) -> None:
    told, stopped = pieces(text, None, "one base mod", stop=("mode",))
    assert ("".join(told), stopped) == ("one base mod", None)


def test_a_stop_string_that_may_not_stop_yet_is_text(text: TextSide) -> None:
    profile = text.base_profile
    sink = Sink(profile, [5], SamplingParams(max_tokens=9, stop=("base",)))
    ids = text.encode(profile, "base base", add_special_tokens=False)
    told = [sink.push(token, False) for token in ids]
    assert {stopped for _, stopped in told} == {None}
    assert "".join(piece for piece, _ in told) + sink.finish() == "base base"


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(text: TextSide) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"context is 64 tokens; the prompt has at least \d+"):
        text.encode(text.base_profile, "word " * 10**6)
    assert text.encode(text.base_profile, "word " * 3)


def test_ends_come_from_config_json_where_there_are_no_generation_defaults(text: TextSide, tiny_base: Path) -> None:
    bare = Checkpoint(tiny_base.parent, "bare", {})
    bare.__dict__["config"] = {"eos_token_id": 5}
    tokenizer = text.base_profile.tokenizer
    changed = text._manifest_of(TENANT).model_copy(
        update={"generation": {}, "model_config_changes": {"eos_token_id": [7, 8]}}
    )
    assert end_ids(bare, None, tokenizer) == {5, tokenizer.eos_token_id}
    assert end_ids(bare, changed, tokenizer) == {7, 8, tokenizer.eos_token_id}
