"""Codes of vectors in stages, each for what the ones before it leave.

    min over codes and gains of Σ ‖y − Σ_k gain_k · (±) C_k[code_k]‖²        y: blocks [n, entries]

Stage after stage, keeping the `beam` best choices of each block so far (multi-stage vector quantisation by M-search,
LeBlanc et al. 1993). The vectors of a table have one norm, so a stage's best is the one of largest |product|. Gains are
those of a part of the blocks, coded greedily, and in the end the least squares of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

CHUNK, SAMPLE = 2**12, 2**13  # blocks compared with a table at once, at most; blocks that gains are found on
ENTRIES = 2**22  # of the vectors of all stages at once


def beam_search(blocks: Tensor, tables: Sequence[Tensor], stages: int, beam: int = 1) -> tuple[Tensor, Tensor]:
    """Codes int64 [stages, n], gains float32 [stages]; code = index + (vectors of a table where the sign is −).

    blocks float32 [n, entries]; tables, in turns: float32 [vectors, entries]. Products are taken in bfloat16, whose
    rounding is far below the distance between the best vectors and the rest.
    """
    search = _Search([tables[stage % len(tables)] for stage in range(stages)])
    gains = search.greedy_gains(blocks[:: -(-len(blocks) // SAMPLE)])
    chunks = torch.split(blocks, max(1, min(CHUNK, ENTRIES // (stages * blocks.shape[1]))))
    found = [search.codes(chunk, gains, beam) for chunk in chunks]
    squares, products = torch.zeros(stages, stages, dtype=torch.float64), torch.zeros(stages, dtype=torch.float64)
    for chunk, codes in zip(chunks, found, strict=True):
        vectors = search.vectors(codes)  # [stages, chunk, entries]
        squares += torch.einsum("sne,tne->st", vectors, vectors).double().cpu()
        products += torch.einsum("sne,ne->s", vectors, chunk).double().cpu()
    return torch.cat(found, 1), (torch.linalg.pinv(squares, hermitian=True) @ products).float().to(blocks.device)


class _Search:
    def __init__(self, tables: Sequence[Tensor]) -> None:
        self.tables = tables  # by stage
        self.size = len(tables[0])
        rounded = {id(table): table.bfloat16().T.contiguous() for table in tables}
        self._rounded = [rounded[id(table)] for table in tables]

    def greedy_gains(self, rest: Tensor) -> list[float]:
        gains = []
        for stage in range(len(self.tables)):
            index, product = self._best(stage, rest, 1)
            vectors = self.tables[stage][index[:, 0]] * product.sign()
            gains.append(float((rest * vectors).sum() / vectors.square().sum()))
            rest = rest - gains[-1] * vectors
        return gains

    def codes(self, blocks: Tensor, gains: Sequence[float], beam: int) -> Tensor:
        """int64 [stages, n]"""
        n, entries = blocks.shape
        rest, chosen = blocks[:, None], blocks.new_zeros((n, 1, 0), dtype=torch.int64)  # [n, choices, …]
        cost = blocks.new_zeros(n, 1)  # ‖rest‖² against that of the block, but for the norms of vectors
        for stage, gain in enumerate(gains):
            index, product = (t.view(n, -1) for t in self._best(stage, rest.reshape(-1, entries), beam))
            each = index.shape[1] // rest.shape[1]
            costs = cost.repeat_interleave(each, 1) - 2 * gain * product.abs()
            kept = min(beam, costs.shape[1]) if stage < len(gains) - 1 else 1
            cost, place = costs.topk(kept, largest=False)
            before, index, product = place // each, index.gather(1, place), product.gather(1, place)
            rest = rest.gather(1, before[..., None].expand(-1, -1, entries))
            rest = rest - gain * product.sign()[..., None] * self.tables[stage][index]
            chosen = chosen.gather(1, before[..., None].expand(-1, -1, stage))
            chosen = torch.cat((chosen, (index + (product < 0) * self.size)[..., None]), 2)
        return chosen[:, 0].T

    def vectors(self, codes: Tensor) -> Tensor:
        """float32 [stages, n, entries] under their signs."""
        signs = 1.0 - 2.0 * (codes >= self.size)
        each = zip(self.tables, codes % self.size, signs, strict=True)
        return torch.stack([table[index] * sign[:, None] for table, index, sign in each])

    def _best(self, stage: int, rest: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Index and product of the `count` vectors with the largest |product|, [rows, count]."""
        product = rest.bfloat16() @ self._rounded[stage]
        best = product.abs().topk(min(count, self.size)).indices
        return best, product.gather(1, best).float()
