"""The weights of a decoder of the Llama family, read once into tiles: sites, norms, rotary table."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deltaserve.deltas.checkpoint import LM_HEAD, Checkpoint
from deltaserve.errors import CheckpointError
from deltaserve.model.native_delta import Linear, norm_table
from deltaserve.model.shape import LlamaShape
from deltaserve_kernels.native.library import Arena, Library
from deltaserve_kernels.native.site import PackedSite

EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
CHUNK = 64  # rows of weights that one thread works on: linears share a site where they begin at multiples of it


@dataclass(frozen=True)
class Group:
    """Linear layers that read one input: sites, and the column of the output at which each begins."""

    sites: tuple[tuple[int, PackedSite, int], ...]  # number, site, first column
    width: int  # of the output, padded


@dataclass(frozen=True)
class NativeWeights:
    groups: tuple[Group, ...]  # of each layer qkv, o, gate-up, down; then the head
    linears: tuple[tuple[Linear, ...], ...]  # of each site
    norms: dict[str, Tensor]  # bfloat16: two of each layer, the final one, then those of heads
    embedding: Tensor  # tiles
    cos_sin: Tensor  # float32 [positions, head size]

    @cached_property
    def norm_table(self) -> ctypes.Array[ctypes.c_void_p]:
        return norm_table(list(self.norms.values()))

    @classmethod
    def read(
        cls, checkpoint: Checkpoint, shape: LlamaShape, config: object, library: Library, positions: int
    ) -> NativeWeights:
        """Raises CheckpointError for a tensor that is missing or of another shape."""
        maker = _Maker(checkpoint, Arena(library, _tile_bytes(checkpoint)))
        for number in range(shape.layers):
            layer = f"model.layers.{number}"
            sizes = {"q": shape.heads * shape.head_size, "k": shape.kv_heads * shape.head_size}
            attention = {f"{layer}.self_attn.{n}_proj": sizes.get(n, sizes["k"]) for n in "qkv"}
            maker.group(attention, shape.hidden)
            maker.group({f"{layer}.self_attn.o_proj": shape.hidden}, sizes["q"])
            maker.group({f"{layer}.mlp.{n}_proj": shape.intermediate for n in ("gate", "up")}, shape.hidden)
            maker.group({f"{layer}.mlp.down_proj": shape.hidden}, shape.intermediate)
        maker.group({LM_HEAD.removesuffix(".weight"): shape.vocabulary}, shape.hidden)
        head, whole = maker.groups[-1].sites[0][1], (shape.vocabulary, shape.hidden)
        embedding = head if shape.tied else PackedSite(*whole, maker.tensor(EMBEDDING, whole), None, maker.arena)
        assert embedding.tiles is not None
        norms = {name: maker.tensor(name, (size,)).bfloat16() for name, size in _norm_names(shape)}
        cos_sin = _rotary_table(config, positions)
        return cls(tuple(maker.groups), tuple(maker.linears), norms, embedding.tiles, cos_sin)


def _norm_names(shape: LlamaShape) -> Iterator[tuple[str, int]]:
    for number in range(shape.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{number}.{name}.weight", shape.hidden
    yield FINAL_NORM, shape.hidden
    for number in range(shape.layers if shape.head_norms else 0):
        for name in ("q_norm", "k_norm"):
            yield f"model.layers.{number}.self_attn.{name}.weight", shape.head_size


def _tile_bytes(checkpoint: Checkpoint) -> int:
    """Of all matrices, padded to whole tiles."""
    shapes = [entry.shape for entry in checkpoint.entries.values() if len(entry.shape) == 2]
    return sum(2 * (-(-rows // 32) * 32) * (-(-cols // 32) * 32) + 64 for rows, cols in shapes)


def _rotary_table(config: object, positions: int) -> Tensor:
    """float32 [positions, head size]: cosines of the first half, then sines."""
    rotary = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), -1).float().contiguous()


class _Maker:
    """Reads the weights, one site at a time."""

    def __init__(self, checkpoint: Checkpoint, arena: Arena) -> None:
        self._checkpoint, self.arena = checkpoint, arena
        self.groups: list[Group] = []
        self.linears: list[tuple[Linear, ...]] = []

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        try:
            found = self._checkpoint.tensor(name)
        except KeyError:
            raise CheckpointError(f"{self._checkpoint.name}: {name} is missing") from None
        if found.shape != shape:
            raise CheckpointError(f"{self._checkpoint.name}: {name} is {tuple(found.shape)}, not {shape}")
        return found

    def group(self, modules: dict[str, int], cols: int) -> None:
        """Linear layers by name with their rows, which read the same input."""
        starts, row = [], 0
        for rows in modules.values():
            starts.append(row)
            row += rows
        fused = all(start % CHUNK == 0 for start in starts)
        parts = [list(zip(modules.items(), starts, strict=True))]
        sites = []
        for part in parts if fused else [[entry] for entry in parts[0]]:
            first = part[0][1]
            weights = [self.tensor(f"{name}.weight", (rows, cols)) for (name, rows), _ in part]
            biases = [self._bias(name, rows) for (name, rows), _ in part]
            bias = None
            if any(own is not None for own in biases):
                bias = torch.cat(
                    [torch.zeros(len(w)) if b is None else b.float() for w, b in zip(weights, biases, strict=True)]
                )
            site = PackedSite(sum(map(len, weights)), cols, torch.cat(weights), bias, self.arena)
            sites.append((len(self.linears), site, first))
            self.linears.append(
                tuple(
                    Linear(f"{name}.weight", f"{name}.bias", start - first, rows, own)
                    for ((name, rows), start), own in zip(part, biases, strict=True)
                )
            )
        self.groups.append(Group(tuple(sites), -(-row // 32) * 32 + 32))

    def _bias(self, name: str, rows: int) -> Tensor | None:
        if f"{name}.bias" not in self._checkpoint.entries:
            return None
        return self.tensor(f"{name}.bias", (rows,))
