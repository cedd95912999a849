"""The Llama family on a CPU over the native kernels, in one hot path: bfloat16 weights and activations, float32 sums.

    h = E[ids]
    layer:  h += O · attention(rotary(Q, K, V · norm(h)))        h += D · (silu(G · norm(h)) ⊙ (U · norm(h)))
    logits = H · norm(h)

Every product is one call for the base and the deltas of all rows (native/site.py). Checked against transformers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AutoConfig

from deltaserve.deltas.artifact import Artifact, Override
from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint
from deltaserve.deltas.resident import ResidentDelta, ServedTerm
from deltaserve.model.delta_layers import head_override_name, replace_embeddings, widest_vocabulary
from deltaserve.model.kernels import served_form
from deltaserve.model.native_delta import NativeDelta, side_by_side
from deltaserve.model.native_step import Runs, State
from deltaserve.model.native_weights import EMBEDDING, Group, NativeWeights
from deltaserve.model.served import ServedModel
from deltaserve.model.shape import LlamaShape, check_exact
from deltaserve.model.step import Step
from deltaserve_kernels.native.decoder import PAGE, add_norm, embed
from deltaserve_kernels.native.library import Library
from deltaserve_kernels.native.site import PackedSite
from deltaserve_kernels.terms import Term

SLICE = 256  # rows that go through all layers together: what they write stays in the second-level cache


def native_fits(checkpoint: Checkpoint, block_size: int) -> bool:
    """Does this decoder run the checkpoint?"""
    if block_size % PAGE or EMBEDDING not in checkpoint.entries:
        return False
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory)
    except (OSError, ValueError, KeyError):
        return False  # the other decoder says what is wrong
    return LlamaShape.of(config) is not None


@dataclass(frozen=True)
class NativeModel(ServedModel):
    library: Library
    shape: LlamaShape
    weights: NativeWeights
    keys: Tensor  # bfloat16 [layers, pages, kv heads, [size / 2, 16, 2]]
    values: Tensor  # bfloat16 [layers, pages, kv heads, [8, size, 2]]
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _deltas: WeakKeyDictionary[ResidentDelta, NativeDelta] = field(default_factory=WeakKeyDictionary)

    @classmethod
    def load(cls, checkpoint: Checkpoint, library: Library, kv_slots: int) -> NativeModel:
        """Raises CheckpointError for a tensor that is missing or of another shape."""
        config = AutoConfig.from_pretrained(checkpoint.directory)
        check_exact(checkpoint.name, config)
        shape = LlamaShape.of(config)
        assert shape is not None, "asked before: native_fits"
        weights = NativeWeights.read(checkpoint, shape, config, library, min(shape.positions, kv_slots))
        cache = (shape.layers, kv_slots // PAGE, shape.kv_heads, shape.head_size * PAGE)
        linears = [linear for linears in weights.linears for linear in linears]
        other = {linear.bias for linear in linears if linear.weight != LM_HEAD} | {EMBEDDING, LM_HEAD, *weights.norms}
        return cls(
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            vocab_size=shape.vocabulary,
            max_positions=shape.positions,
            num_layers=shape.layers,
            kv_slots=kv_slots,
            linear=frozenset(linear.weight for linear in linears),
            other=frozenset(other),
            library=library,
            shape=shape,
            weights=weights,
            keys=library.empty(*cache),
            values=library.empty(*cache),
        )

    @property
    def runtime(self) -> dict[str, str]:
        return {"decoder": "native", "kernels": self.library.instruction_set}

    @property
    def num_paged_layers(self) -> int:
        return self.num_layers

    def serve(self, term: Term) -> ServedTerm:
        return served_form(term, self.library)

    def load_delta(self, artifact: Artifact) -> ResidentDelta:
        return side_by_side(super().load_delta(artifact), self.library)

    @torch.inference_mode()
    def forward(self, step: Step, ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        parts = [self._hidden(step.cut(at, at + SLICE), ids[at:], positions[at:]) for at in range(0, len(ids), SLICE)]
        return self._logits(step, (parts[0] if len(parts) == 1 else torch.cat(parts))[logit_rows])

    def _hidden(self, step: Step, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions of the step's rows, and more → bfloat16 [rows, hidden padded], normalised."""
        ids, positions = ids[: step.num_rows], positions[: step.num_rows]
        state = State.of(self, step, positions)
        self._embed(step, ids, state.h)
        y: Tensor | None = None
        for layer in range(self.num_layers):
            y = self._layer(layer, state, y)
        add_norm(self.library, state.h, y, state.x, self.shape.norm_eps, state.norm_runs, 2 * self.num_layers)
        return state.x.clone()

    def _layer(self, layer: int, state: State, y: Tensor | None) -> Tensor:
        """→ what is to be added to h."""
        shape, functions = self.shape, self.library.functions
        qkv, out, gate_up, down = self.weights.groups[4 * layer : 4 * layer + 4]
        add_norm(self.library, state.h, y, state.x, shape.norm_eps, state.norm_runs, 2 * layer)
        self._product(qkv, state, state.x, state.wide)
        self._attend(layer, state)
        self._product(out, state, state.attended, state.y)
        add_norm(self.library, state.h, state.y, state.x, shape.norm_eps, state.norm_runs, 2 * layer + 1)
        self._product(gate_up, state, state.x, state.wide)
        functions.ds_silu_mul(ctypes.addressof(state.gated))
        self._product(down, state, state.activated, state.y)
        return state.y

    def _attend(self, layer: int, state: State) -> None:
        """Queries, keys and values of `wide`, rotated; keys and values into the cache; their attention."""
        shape, functions = self.shape, self.library.functions
        state.rotary.k = state.attention.k = self.keys.data_ptr() + layer * self.keys.stride(0) * 2
        state.rotary.v = state.attention.v = self.values.data_ptr() + layer * self.values.stride(0) * 2
        if shape.head_norms:
            state.rotary.q_norm = 2 * self.num_layers + 1 + 2 * layer
            state.rotary.k_norm = state.rotary.q_norm + 1
        functions.ds_rotary(ctypes.addressof(state.rotary))
        state.attention.window = shape.windows[layer]
        functions.ds_attention(ctypes.addressof(state.attention))

    def _product(self, group: Group, state: State, x: Tensor, y: Tensor) -> None:
        for number, site, first in group.sites:
            self._site(number, site, state.runs, x, y[:, first:] if first else y)

    def _site(self, number: int, site: PackedSite, runs: Runs, x: Tensor, y: Tensor) -> None:
        site.run(self.library, x, y, runs.at(number), runs.count)
        for delta, start, stop in runs.slow(number):
            for slow in delta.slow[number]:
                slow.add(self.library, x[start:stop, : site.cols], y[start:stop], site)

    def _embed(self, step: Step, ids: Tensor, h: Tensor) -> None:
        known = ids.clamp(max=self.vocab_size - 1)  # an added token is in its delta alone
        embed(self.library, known, self.weights.embedding, h)
        for run in step.segments.runs:
            override = step.delta(run).overrides.get(EMBEDDING)
            replace_embeddings(ids[run.start : run.stop], h[run.start : run.stop], override)

    def _logits(self, step: Step, x: Tensor) -> Tensor:
        """x bfloat16 [R, hidden] → float32 [R, largest vocabulary]"""
        ((number, site, _),) = self.weights.groups[-1].sites
        found = [(run, self._head_override(step.delta(run))) for run in step.head_segments.runs]
        width = widest_vocabulary(self.vocab_size, [override for _, override in found])
        padded = max(self.weights.groups[-1].width, width)
        y = self.buffer("logits", len(x), padded, torch.float32)
        y[:, self.vocab_size :] = -torch.inf
        self._site(number, site, Runs(self, step.head_segments, step), x, y)
        y[:, self.vocab_size : self.weights.groups[-1].width] = -torch.inf
        for run, override in found:
            head = self.delta(step.delta(run)).head
            if override is not None and head is not None:
                rows = slice(head.rows) if override.rows is None else override.rows
                taken = x[run.start : run.stop, : site.cols]
                y[run.start : run.stop, rows] = head.product(self.library, taken, 0, head.rows)
        return y[:, :width]

    def _head_override(self, delta: ResidentDelta) -> Override | None:
        return delta.overrides.get(head_override_name(delta, self.shape.tied, EMBEDDING, LM_HEAD))

    def buffer(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] of a buffer that the steps share, what is written in one gone in the next; zeros at first."""
        kept = self._buffers.get(name)
        if kept is None or len(kept) < rows or kept.shape[1] != width:
            kept = self._buffers[name] = torch.zeros(rows, width, dtype=dtype)
        return kept[:rows]

    def delta(self, delta: ResidentDelta) -> NativeDelta:
        """As the kernels read it; made at its first step."""
        if (own := self._deltas.get(delta)) is None:
            own = self._deltas[delta] = NativeDelta(
                delta, self.weights.linears, self.weights.norms, self._head_override(delta)
            )
        return own
