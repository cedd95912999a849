"""seeded-vq: an unbiased, isotropic sketch of Δ by a seeded vector quantiser. Ours.

    Y = T · diag(2^−level/4) · Δ · diag(2^boost)                 what is coded; T: a block Hadamard over the rows, or 1
    block y of Y  →  the vector C_c with the largest |⟨y, C_c⟩|, and its sign; stage after stage on what is left
    Δ̂ = the same backwards, its gain so that ⟨Δ, Δ̂⟩ = ‖Δ‖²     no direction is lost or shrunk: the noise is zero-mean

C is a seeded table: 2^(code_bits − 1) vectors, no bits in the artifact, the same for all layers and tenants; stages
take turns at up to `MOST_TURNS` of them, and the best choices of several stages together are looked for (codecs.
beam_search). A block is a segment of a row, or several whole rows below one code a row. What makes the noise harmless:

- bits by layer ∝ √(curvature · mean Δ²), within `spread` of the mean (`plan`);
- boosts, from H = E[xᵀx] of the layer's input: columns that carry large activations get less noise, ∝ h^(−boost/4);
- equal rows: a level of 4 bits for each from `LEVELS_FROM` bits/parameter on, below it a Hadamard over the rows: free;
- a stage for each `STAGE_BITS` bits/parameter.

    bits/parameter = stages · code_bits / (entries of a block) + 4 / cols for levels + 16 / rows for each boosted column
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.codecs.base import LayerStats, Site
from deltaserve.codecs.beam_search import beam_search
from deltaserve.codecs.shares import importance, share_out
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Book, Codebook, Rotated, Rotation, Term
from deltaserve_kernels.terms.codebook import LEVEL_BITS, LEVELS_PER_OCTAVE

MAX_ENTRIES, MAX_TILE = 2**13, 2**10  # of a block
STAGE_BITS, MAX_STAGES = 0.0625, 32
MOST_TURNS, MAX_PRODUCTS = 4, 2**17  # tables; products of a token with them, all segments of the input together
BEAM, SEARCHES = 4, 16  # choices that are kept from stage to stage, and searches of a block for them in all stages
LEVELS_FROM = 0.04  # bits
LEAST_BITS, MOST_BITS = 0.001, 4.0
MAX_BOOST, HADAMARD = 6, 64


@dataclass(frozen=True)
class SeededVq:
    bits: float = 0.03  # bits per parameter, 0.001 … 4
    code_bits: int = 12  # of one code, sign included, 2 … 16: the table has 2^(code_bits − 1) vectors
    boost: float = 1.0  # how far noise follows the activations of a column, 0 (not) … 2
    spread: float = 3.0  # a layer gets at most `spread` times the mean bits, and at least their 1 / spread; 1: uniform

    needs_sensitivity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise CodecError(f"seeded-vq: bits {self.bits:g} is not in 0.001 … 4")
        if self.code_bits not in range(2, layout.MAX_BITS + 1):
            raise CodecError(f"seeded-vq: code_bits {self.code_bits!r} is not a whole number in 2 … {layout.MAX_BITS}")
        if not 0 <= self.boost <= 2:
            raise CodecError(f"seeded-vq: boost {self.boost} is not in 0 … 2")
        if not 1 <= self.spread <= 100:
            raise CodecError(f"seeded-vq: spread {self.spread} is not in 1 … 100")

    @property
    def name(self) -> str:
        return "seeded-vq"

    @property
    def needs_gram(self) -> bool:
        return self.boost > 0

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def plan(self, layers: Sequence[LayerStats]) -> Mapping[str, SeededVq]:
        """Bits by layer that fit the budget together: `bits` × parameters, everything but boosts counted."""
        budget = self.bits * sum(layer.parameters for layer in layers)

        def fits(shares: Mapping[str, float]) -> bool:
            return sum(self._at(shares[n.name]).cost(n.rows, n.cols) for n in layers) <= budget

        shares = share_out({n.name: importance(n) for n in layers}, self.bits, self.spread, fits)
        return {name: self._at(bits) for name, bits in shares.items()}

    def _at(self, bits: float) -> SeededVq:
        return replace(self, bits=min(max(bits, LEAST_BITS), MOST_BITS))

    def cost(self, rows: int, cols: int) -> int:
        """Bits of a matrix without boosts."""
        tile, length, stages = self.block(rows, cols)
        levels = LEVEL_BITS * rows if self.bits >= LEVELS_FROM else 0
        return stages * (-(-rows // tile) * -(-cols // length) * self.code_bits + 32) + 32 + levels

    def block(self, rows: int, cols: int) -> tuple[int, int, int]:
        """(rows of a block, its columns, stages) whose bits are nearest to `bits`."""
        bits = self.bits - (LEVEL_BITS / cols if self.bits >= LEVELS_FROM else 0)
        stages = min(max(1, round(bits / STAGE_BITS)), MAX_STAGES)
        entries = stages * self.code_bits / max(bits, 1e-3)
        if entries < 1.4 * cols:
            return 1, -(-cols // max(1, round(cols / entries))), stages
        return min(rows, MAX_TILE, max(1, MAX_ENTRIES // cols), round(entries / cols)), cols, stages

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        tile, length, stages = self.block(rows, cols)
        peak = delta.abs().max()
        unit = torch.ldexp(torch.ones((), dtype=torch.float64), peak.double().frexp().exponent)
        x = (delta.double() / unit).float().contiguous()  # entries up to 1: squares neither overflow nor vanish
        boosted, boosts, scaled = self._boosted(x, site.gram)
        levels, rotation = None, None
        if self.bits >= LEVELS_FROM:
            levels, scaled = _levelled(scaled)
        elif rows > 1:
            rotation = Rotation("hadamard", HADAMARD)
            scaled = rotation.forward(scaled.T).T.contiguous()
        turns = self.turns(cols, tile, length, stages)
        table_bits, beam = self.code_bits + turns.bit_length() - 2, max(1, min(BEAM, SEARCHES // stages))
        tables = Book("seeded").table(table_bits, tile * length).view(turns, -1, tile * length)
        codes, gains = beam_search(_blocks(scaled, tile, length), tables.unbind(), stages, beam)
        term = Codebook(
            rows=rows,
            cols=cols,
            bits=self.code_bits,
            length=length,
            book=Book("seeded"),
            codes=layout.pack(codes.flatten(), self.code_bits),
            row=torch.ones(()),
            tile=tile,
            gains=gains if stages > 1 else None,
            levels=None if levels is None else layout.pack(levels, LEVEL_BITS),
            boosted=boosted,
            boosts=boosts,
            turns=turns,
        )
        whole = Rotated(term, t_out=rotation) if rotation else term
        along = (x.double() * whole.decode()).sum()
        gain = x.double().square().sum() / along if along > 0 else torch.zeros((), dtype=torch.float64)
        term = replace(term, row=(gain * unit).float())
        return [replace(whole, term=term) if isinstance(whole, Rotated) else term]

    def _boosted(self, x: Tensor, gram: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], Tensor]:
        """Boosted columns, how many have each boost, and x with them applied."""
        if gram is None or not self.boost:
            return None, (), x
        energy = gram.diagonal().clamp(min=0)
        over = (energy / energy.median().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=1, max=1e30).log2()
        strength = self.boost if self.bits >= LEVELS_FROM / 2 else self.boost / 2  # fewer of them, 16 bits each
        boost = (strength / 4 * over).round().clamp(max=MAX_BOOST).long()
        if not bool(boost.any()):
            return None, (), x
        columns = torch.argsort(boost, stable=True)[int((boost == 0).sum()) :]
        counts = torch.bincount(boost[columns], minlength=2)[1:].tolist()
        index_type = torch.int16 if len(boost) <= 2**15 else torch.int32
        return columns.to(index_type), tuple(counts), x * torch.exp2(boost.float())

    def turns(self, cols: int, tile: int, length: int, stages: int) -> int:
        """Tables: as many as there are stages for, and as a token may be multiplied with."""
        turns, products = 1, (-(-cols // length) * tile) << (self.code_bits - 1)
        while 2 * turns <= min(stages, MOST_TURNS) and 2 * turns * products <= MAX_PRODUCTS:
            turns *= 2
        return turns


def _blocks(x: Tensor, tile: int, length: int) -> Tensor:
    """[tiles · segments, tile · length], zeros past the ends."""
    rows, cols = x.shape
    segments, tiles = -(-cols // length), -(-rows // tile)
    padded = F.pad(x, (0, segments * length - cols, 0, tiles * tile - rows)).view(tiles, tile, segments, length)
    return padded.transpose(1, 2).reshape(tiles * segments, tile * length)


def _levelled(x: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [rows] of 2^((level − 8) / 4) near the norms of the rows, against their middle; x divided by it."""
    norms = x.norm(dim=1).clamp(min=1e-30).log2()
    half = 2 ** (LEVEL_BITS - 1)
    levels = ((norms - norms.median()) * LEVELS_PER_OCTAVE).round().clamp(-half, half - 1)
    return (levels + half).to(torch.uint8), x / torch.exp2(levels / LEVELS_PER_OCTAVE)[:, None]
