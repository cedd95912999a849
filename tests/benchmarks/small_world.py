"""A tiny base, real fine-tunes of it as artifacts, and what each must answer: by transformers on the restored weights.

For runs of an hour on any machine: a server of it starts in seconds, and answers hundreds of requests a second.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.compress import compress
from deltaserve.deltas.restore import restore

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from server import ServerProcess, wait_until
from tiny import make_base, make_finetune

__all__ = ["Delta", "ServerProcess", "World", "wait_until"]

CODECS: Sequence[tuple[str, dict[str, Any]]] = (("bitdelta", {}), ("dare", {"group": 4}), ("delta-svd", {"rank": 8}))
PROMPTS = (
    "Many fine-tunes",
    "A delta is small",
    "def serve(",
    "each differs from",
    "signs and one scale",
    "base model",
)
MAX_TOKENS = 12
CLEAR = 1e-3  # the least distance between the first and the second token's logit: below it an answer may be another


@dataclass(frozen=True)
class Delta:
    """One version's bytes; `kind` tells the weights."""

    kind: int
    data: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class World:
    """`answers[kind][prompt]`: greedy, MAX_TOKENS long at most; kind −1 is the base. Thread-safe."""

    def __init__(self, folder: Path, num_kinds: int) -> None:
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        self.base = make_base(folder / "base")
        self._folder = folder
        self.answers: dict[int, dict[str, str]] = {}
        self._artifacts: list[bytes] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        for kind in range(num_kinds):
            self._add(kind)
        self.answers[-1] = self._answers(self.base)

    def _add(self, kind: int) -> None:
        codec, options = CODECS[kind % len(CODECS)]
        folder = self._folder / str(kind)
        tuned = make_finetune(self.base, folder / "tuned", scale=0.05, seed=kind + 1)
        base = Checkpoint.open(self.base)
        codec_made = make_codec(codec, None, options)
        artifact = compress(base, Checkpoint.open(tuned), codec_made, folder / "delta.safetensors", seed=kind)
        restore(base, artifact, folder / "restored", dtype=torch.float32)
        self._artifacts.append((folder / "delta.safetensors").read_bytes())
        self.answers[kind] = self._answers(folder / "restored")

    def _answers(self, directory: Path) -> dict[str, str]:
        """Of the prompts that have one clear answer."""
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        model.generation_config = GenerationConfig()
        config = GenerationConfig(
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = {}
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            best = torch.stack(out.scores).topk(2).values
            if float((best[..., 0] - best[..., 1]).min()) > CLEAR:
                texts = [tokenizer.decode(row, skip_special_tokens=True) for row in (ids[0], out.sequences[0])]
                found[prompt] = texts[1][len(texts[0]) :]
        return found

    @property
    def num_kinds(self) -> int:
        return len(self._artifacts)

    def delta(self, kind: int, *, fresh: bool = True) -> Delta:
        """Of these weights; fresh: bytes that nobody had before (spaces after the header), so another digest."""
        data = self._artifacts[kind]
        if not fresh:
            return Delta(kind, data)
        with self._lock:
            spaces = b" " * 8 * next(self._numbers)
        size = int.from_bytes(data[:8], "little")
        header = (size + len(spaces)).to_bytes(8, "little") + data[8 : 8 + size] + spaces
        return Delta(kind, header + data[8 + size :])
