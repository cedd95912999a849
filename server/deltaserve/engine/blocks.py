"""KV blocks: who holds which, and what the free ones still hold. Counts and hashes; no torch, no text.

A full block is known by everything its KV depends on: the key of the block before it, its own tokens, the model's
digest, and a salt of the tenant that only this process knows. So a request finds KV that was computed for the same
tenant, weights and text, and can find no other. Blocks are shared by counting their holders; those that nobody holds
are free, and taken the least recently used first, the end of a text before its beginning.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from deltaserve.engine.types import Request, Row


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Free + held = all, always. Nothing is found again without `salt`."""

    def __init__(self, num_blocks: int, block_size: int, salt: bytes | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._salt = salt
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first
        self._holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whatever they still know."""
        return len(self._free)

    @property
    def caching(self) -> bool:
        return self._salt is not None

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_lacking(self, request: Request) -> int:
        """Free blocks that `try_start` would take."""
        return self._lacking(request, self._find(request))

    def try_start(self, request: Request) -> bool:
        """Gives a request that holds nothing the blocks of all its tokens. Those whose KV is known come as they are,
        and the request has them computed; at least its last token is not. False, and nothing changed, without room."""
        found = self._find(request)
        if self._lacking(request, found) > len(self._free):
            return False
        for row, blocks in zip(request.rows, found, strict=True):
            for block in blocks:
                self._hold(block)
            row.blocks = blocks
            row.block_keys = [self._key_of[block] for block in blocks]
        request.num_computed = len(found[0]) * self.block_size
        return self.try_grow(request, len(request.tokens))

    def try_grow(self, request: Request, num_tokens: int) -> bool:
        """Gives every row of `request` the blocks its first `num_tokens` tokens need; False, and nothing changed,
        without them."""
        missing = [max(self.blocks_for(num_tokens) - len(row.blocks), 0) for row in request.rows]
        if sum(missing) > len(self._free):
            return False
        for row, count in zip(request.rows, missing, strict=True):
            for _ in range(count):
                block = next(iter(self._free))
                self._forget(block)
                self._hold(block)
                row.blocks.append(block)
        return True

    def publish(self, request: Request) -> None:
        """What is computed of `request` may be found from now on, as far as it fills blocks."""
        if self._salt is None:
            return
        for row in request.rows:
            for place in range(len(row.block_keys), request.num_computed // self.block_size):
                key = self._key(request, place, row.block_keys[-1] if place else self._root(request, row))
                row.block_keys.append(key)
                if key not in self._block_of:  # else the same was computed twice, and one is enough
                    self._block_of[key] = row.blocks[place]
                    self._key_of[row.blocks[place]] = key

    def release(self, request: Request, *, sound: bool = True) -> None:
        """Takes all blocks of `request` back. What is not `sound` is found by nobody any more."""
        if sound:
            self.publish(request)
        for row in request.rows:
            for block in reversed(row.blocks):
                if not sound:
                    self._forget(block)
                self._holders[block] -= 1
                if not self._holders[block]:
                    self._free[block] = None
                    if block not in self._key_of:
                        self._free.move_to_end(block, last=False)
            row.blocks = []
            row.block_keys = []

    def _find(self, request: Request) -> list[list[int]]:
        """For each row, blocks that hold the first tokens of `request`, but its last one: as many for all rows. A
        prompt whose log-probabilities are asked for is read."""
        if self._salt is None or request.params.prompt_logprobs:
            return [[] for _ in request.rows]
        found = [self._find_of(request, row) for row in request.rows]
        shortest = min(map(len, found))
        return [blocks[:shortest] for blocks in found]

    def _find_of(self, request: Request, row: Row) -> list[int]:
        found: list[int] = []
        key = self._root(request, row)
        for place in range((len(request.tokens) - 1) // self.block_size):
            key = self._key(request, place, key)
            if key not in self._block_of:
                break
            found.append(self._block_of[key])
        return found

    def _lacking(self, request: Request, found: list[list[int]]) -> int:
        shared = sum(self._holders[block] > 0 for blocks in found for block in blocks)
        return self.blocks_for(len(request.tokens)) * len(found) - shared

    def _root(self, request: Request, row: Row) -> bytes:
        assert self._salt is not None
        salt = hashlib.blake2b(request.tenant.encode(), key=self._salt, digest_size=32).digest()
        return salt + (row.digest or "").encode()

    def _key(self, request: Request, place: int, before: bytes) -> bytes:
        tokens = request.tokens[place * self.block_size : (place + 1) * self.block_size]
        return hashlib.sha256(before + array("q", tokens).tobytes()).digest()

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
