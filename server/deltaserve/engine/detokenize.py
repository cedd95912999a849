"""From token ids to text while they arrive: pieces that never have to be taken back, and stop strings across pieces.

Owns: the few tokens and characters still undecided. Does not know: requests, sampling, HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
SEED_TOKENS = 6
# A character has at most 4 bytes, so at most 3 replacement characters at the end may still turn into one, and after
# more undecided tokens than that the bytes before them never will. Both limits leave room for tokens without text.
MAX_OPEN_CHARS = 3
MAX_OPEN_TOKENS = 16
KEPT_OPEN_TOKENS = 8


class Decoder(Protocol):
    """The one method used of transformers' PreTrainedTokenizerFast."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ..., **kwargs: Any) -> str | list[str]: ...


class Detokenizer:
    """The text one sequence adds to its prompt, piece by piece.

    The two-offset method of vLLM and Hugging Face TGI: a token is decoded together with the tokens of the piece before
    it, because decoders treat the start of a text specially (a leading space is dropped), and what was given out before
    is cut off. The first window is the end of the prompt. Joined, the pieces are what the continuation adds:
    `decode(prompt + continuation)` without its first `len(decode(prompt))` characters. (For SentencePiece byte fallback
    this holds where the bytes are valid UTF-8: an invalid byte changes how the bytes before it decode, and a piece is
    never taken back.)

        window   [tokens of the last piece | open tokens]     decode(window)[:given] is given out already
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        num_tokens = SEED_TOKENS
        self._window = list(prompt_ids[-num_tokens:])
        # A window without text (special tokens only) would be the start of a text after all.
        while not (seed := self._decode(self._window)) and num_tokens < len(prompt_ids):
            num_tokens *= 4
            self._window = list(prompt_ids[-num_tokens:])
        self._num_closed = len(self._window)
        self._given = len(seed)

    def push(self, token_id: int) -> str:
        """The text that is certain now, after one more token; empty while it may still change."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = len(text.rstrip(REPLACEMENT))
        num_open = len(self._window) - self._num_closed
        if num_open > MAX_OPEN_TOKENS:
            certain = max(certain, len(text) - MAX_OPEN_CHARS)
        piece = text[self._given : certain]
        self._given += len(piece)
        if piece and certain == len(text):
            del self._window[: self._num_closed]
            self._close(num_held=0)
            self._num_closed = len(self._window)
        elif num_open > MAX_OPEN_TOKENS:  # keep the window short: the held characters are the same without its middle
            del self._window[self._num_closed : -KEPT_OPEN_TOKENS]
            self._close(num_held=len(text) - self._given)
        return piece

    def flush(self) -> str:
        """The rest, when no token follows: what was held back, as it decodes now."""
        text = self._decode(self._window)
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _close(self, num_held: int) -> None:
        self._given = len(self._decode(self._window)) - num_held

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class StopMatcher:
    """Finds the first stop string to become complete in a text that arrives in pieces.

    That is the earliest end, the moment at which generation can stop; of several that end there, the longest. The
    result depends on the text alone, not on how it was cut. Raises ValueError for an empty stop string.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        if "" in stop:
            raise ValueError("a stop string has at least one character")
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """(the text that is safe to give out now, the stop string found or None). After a match: ("", that string)."""
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self._matched = min(found)
            self._held = ""
            return text[: end if self._include_stop else end - len(self._matched)], self._matched
        num_safe = len(text) - self._num_to_hold(text)
        self._held = text[num_safe:]
        return text[:num_safe], None

    def finish(self) -> str:
        """The text held back, when no more comes: it was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _num_to_hold(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop), default=1) - 1
        for num_chars in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-num_chars:]) for stop in self._stop):
                return num_chars
        return 0
