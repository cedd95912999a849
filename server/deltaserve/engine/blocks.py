"""KV blocks: who holds which. Counts only; no torch, no text."""

from __future__ import annotations

from deltaserve.engine.types import Request


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Free + held = all, always."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def try_grow(self, request: Request, num_tokens: int) -> bool:
        """Gives every row of `request` the blocks its first `num_tokens` tokens need; False, and nothing changed,
        without them."""
        missing = [max(self.blocks_for(num_tokens) - len(row.blocks), 0) for row in request.rows]
        if sum(missing) > len(self._free):
            return False
        for row, count in zip(request.rows, missing, strict=True):
            row.blocks.extend(self._free.pop() for _ in range(count))
        return True

    def release(self, request: Request) -> None:
        """Takes all blocks of `request` back."""
        for row in request.rows:
            self._free.extend(reversed(row.blocks))
            row.blocks.clear()
