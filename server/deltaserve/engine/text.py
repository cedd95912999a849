"""Text ↔ tokens for every model: templates, tokenizers, detokenising, stop strings. Runs off the event loop."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import chat_template, end_ids, generation_defaults, load_tokenizer
from deltaserve.deltas.manifest import Manifest
from deltaserve.engine.detokenize import Detokenizer, StopMatcher
from deltaserve.engine.templates import TemplateRenderer
from deltaserve.engine.types import SamplingParams
from deltaserve.errors import BadRequest, ContextLengthExceeded
from deltaserve.ids import DeltaDigest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_PROFILES = 256


@dataclass(frozen=True)
class Profile:
    """What a model's text side is: the base's, with a delta's changes."""

    tokenizer: PreTrainedTokenizerFast
    chat_template: str | None
    defaults: Mapping[str, Any]  # generation defaults: temperature, top_p, …
    eos_ids: frozenset[int]
    vocab_size: int  # ids below are embedded
    longest_token: int  # characters; no text has fewer tokens than its length / this

    def shares_vocabulary(self, other: Profile) -> bool:
        """Does every id mean the same to both?"""
        return self.tokenizer is other.tokenizer or self.tokenizer.get_vocab() == other.tokenizer.get_vocab()

    def token_text(self, token_id: int) -> str:
        """One token by itself; what a byte-level token means alone may be no character."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))


class TextSide:
    """The text side of the base and of every delta. Thread-safe."""

    def __init__(
        self,
        base: Checkpoint,
        vocab_size: int,
        max_model_len: int,
        renderer: TemplateRenderer,
        manifest_of: Callable[[DeltaDigest], Manifest],
    ) -> None:
        self._base = base
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._renderer = renderer
        self._manifest_of = manifest_of
        self._lock = threading.Lock()
        self._profiles: OrderedDict[DeltaDigest, Profile] = OrderedDict()
        self.base_profile = self._make(None)

    def profile(self, digest: DeltaDigest | None) -> Profile:
        """Raises NotFound through `manifest_of` for a digest that is gone."""
        if digest is None:
            return self.base_profile
        with self._lock:
            if digest in self._profiles:
                self._profiles.move_to_end(digest)
                return self._profiles[digest]
        made = self._make(self._manifest_of(digest))
        with self._lock:
            self._profiles[digest] = made
            while len(self._profiles) > MAX_PROFILES:
                self._profiles.popitem(last=False)
        return made

    def chat_prompt(
        self,
        profile: Profile,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation and the opening of the answer. Raises TemplateError, BadRequest."""
        if profile.chat_template is None:
            raise BadRequest("this model has no chat template; send its prompt to /v1/completions", param="messages")
        variables = {
            **profile.tokenizer.special_tokens_map,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": True,
        }
        text = self._renderer.render(profile.chat_template, variables)
        return self.encode(profile, text, add_special_tokens=False, param="messages")

    def check_template(self, template: str) -> None:
        """Raises TemplateError."""
        self._renderer.check(template)

    def encode(
        self, profile: Profile, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Raises ContextLengthExceeded for what is too long before it is tokenised, which can take a minute."""
        fewest = len(text.encode()) // profile.longest_token
        if fewest > self._max_model_len:
            raise ContextLengthExceeded(
                f"the model's context is {self._max_model_len} tokens; the prompt has at least {fewest}", param=param
            )
        ids: list[int] = profile.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return ids

    def close(self) -> None:
        self._renderer.close()

    def _make(self, manifest: Manifest | None) -> Profile:
        directory = self._base.directory
        changed = manifest is not None and (manifest.added_tokens or manifest.special_tokens)
        tokenizer = (
            load_tokenizer(directory, manifest)
            if changed or manifest is None
            else self.base_profile.tokenizer  # only read from, so it can be shared
        )
        defaults = {**generation_defaults(directory), **(manifest.generation if manifest else {})}
        own_template = manifest.chat_template if manifest else None
        added = max((token.id + 1 for token in manifest.added_tokens), default=0) if manifest else 0
        return Profile(
            tokenizer,
            own_template if own_template is not None else chat_template(directory),
            defaults,
            end_ids(self._base, manifest, tokenizer),
            max(self._vocab_size, added),
            max(len(token.encode()) for token in tokenizer.get_vocab()),
        )


class Sink:
    """Tokens of one answer → certain text, and whether a stop string was completed."""

    def __init__(self, profile: Profile, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(profile.tokenizer, prompt_ids, skip_special_tokens=params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop) if params.stop else None

    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:
        text = self._detokenizer.push(token_id)
        return self._matcher.feed(text) if self._matcher and may_stop else (text, None)

    def finish(self) -> str:
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return rest
        text, stopped = self._matcher.feed(rest)
        return text if stopped else text + self._matcher.finish()
