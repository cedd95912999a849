"""The pieces of a stream are the text: for every text, every cut, and token ids that are no text at all."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltaserve.engine.detokenize import Detokenizer, StopMatcher

SOURCE = ["The quick brown fox jumps over the lazy dog. Grüße, 你好 世界, привет! 👩\u200d👧 e\u0301 ” and so on."] * 3
CHARACTERS = st.one_of(st.characters(codec="utf-8"), st.sampled_from(" the你好👩\u200d👧🏽e\u0301\ufffd\n"))
TEXT = st.text(CHARACTERS, max_size=40)
STREAMED = settings(max_examples=200, deadline=None, derandomize=True)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 256 bytes, some merges and two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(SOURCE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with "▁" for the space before them and bytes for what is no word, as Llama 2 has them."""
    words = ["<unk>", "▁", "▁Hello", "▁world", "world", ",", "▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def stream(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def added(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(prompt + ids, skip_special_tokens=skip)[
        len(tokenizer.decode(prompt, skip_special_tokens=skip)) :
    ]


@given(TEXT, TEXT)
@STREAMED
def test_the_pieces_of_a_text_are_the_text(prompt: str, text: str) -> None:
    tokenizer = byte_level()
    assert "".join(stream(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text))) == text


@given(st.lists(st.integers(0, 319), max_size=20), st.lists(st.integers(0, 319), max_size=60), st.booleans())
@STREAMED
def test_the_pieces_of_any_tokens_are_what_the_whole_adds(prompt: list[int], ids: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    assert "".join(stream(tokenizer, prompt, ids, skip)) == added(tokenizer, prompt, ids, skip)


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=40).map(b"".join))
@STREAMED
def test_the_pieces_of_any_bytes_are_what_the_bytes_decode_to(data: bytes) -> None:
    tokenizer = byte_level()
    # Characters with every lead byte and every continuation byte; the pre-tokenizer shows one letter for each byte.
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000)]))
    letters = "".join(part for part, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))
    byte_ids = {
        byte: tokenizer.convert_tokens_to_ids(letter) for byte, letter in zip(text.encode(), letters, strict=True)
    }
    ids = [byte_ids[byte] for byte in data if byte in byte_ids]  # no text holds C0, C1, F5…FF
    assert "".join(stream(tokenizer, [], ids)) == tokenizer.decode(ids)


@given(st.lists(st.sampled_from(["▁Hello", "▁world", "world", ",", "▁a", "b", "你", "👧", "é"]), max_size=20))
@STREAMED
def test_spaces_come_out_as_in_the_middle_of_a_text(words: list[str]) -> None:
    tokenizer = sentencepiece_like()
    ids: list[int] = []
    for word in words:
        known = tokenizer.get_vocab().get(word)
        ids += [known] if known is not None else [tokenizer.get_vocab()[f"<0x{byte:02X}>"] for byte in word.encode()]
    prompt = [tokenizer.get_vocab()["▁Hello"]]
    assert "".join(stream(tokenizer, prompt, ids)) == added(tokenizer, prompt, ids)
    assert "".join(stream(tokenizer, prompt, ids)) == "".join(words).replace("▁", " ")


def test_an_incomplete_character_is_held_back() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("🦊")
    assert len(ids) > 1
    assert stream(tokenizer, tokenizer.encode("A "), ids) == [""] * (len(ids) - 1) + ["🦊", ""]


def test_an_endless_run_of_broken_bytes_neither_blocks_nor_grows() -> None:
    tokenizer = byte_level()
    broken = tokenizer.encode("🦊")[:1]
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.push(broken[0]) for _ in range(500)]
    assert len("".join(pieces)) > 480
    assert len(detokenizer._window) < 40
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(broken * 500)


def test_a_prompt_that_ends_in_special_tokens_still_seeds_the_text() -> None:
    tokenizer = sentencepiece_like()
    vocab = tokenizer.get_vocab()
    prompt = [vocab["▁Hello"]] + [vocab["<unk>"]] * 30
    assert "".join(stream(tokenizer, prompt, [vocab["▁world"]])) == " world"


def test_flush_gives_the_rest_once() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, [])
    detokenizer.push(tokenizer.encode("🦊")[0])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The definition: the smallest end at which a stop string is complete, and the longest one there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


def cut(text: str, widths: list[int]) -> list[str]:
    pieces = []
    for width in widths:
        pieces.append(text[:width])
        text = text[width:]
    return [*pieces, text]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 4), max_size=20),
    st.booleans(),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_stopping_does_not_depend_on_the_cuts(text: str, stops: list[str], widths: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    emitted, matched = "", None
    for piece in cut(text, widths):
        safe, matched = matcher.feed(piece)
        emitted += safe
        assert text.startswith(emitted)
        if matched:
            break
    emitted += matcher.finish()
    expected = first_stop(text, stops)
    if expected is None:
        assert (emitted, matched) == (text, None)
    else:
        end, stop = expected
        assert (emitted, matched) == (text[: end if include else end - len(stop)], stop)


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["</s>"], ["Hi", "<", "/", "s", ">"], [("Hi", None), ("", None), ("", None), ("", None), ("", "</s>")]),
        (["</s>"], ["a<", "b"], [("a", None), ("<b", None)]),
        (["aab"], ["a", "a", "a", "b"], [("", None), ("", None), ("a", None), ("", "aab")]),
        (["abcd", "bc"], ["ab", "c"], [("", None), ("a", "bc")]),
        (["bc", "abc"], ["xabc"], [("x", "abc")]),
        ([], ["abc"], [("abc", None)]),
        (["x"], ["axb", "more"], [("a", "x"), ("", "x")]),
    ],
)
def test_what_is_given_out_when(stops: list[str], pieces: list[str], expected: list[tuple[str, str | None]]) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.feed(piece) for piece in pieces] == expected


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        StopMatcher(["a", ""])
