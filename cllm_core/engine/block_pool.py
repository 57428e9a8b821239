"""BlockPool: who holds which block of the paged KV cache.

It owns reference counts, the index of cached prefixes and the order of eviction. It knows neither requests nor
tensors: the Scheduler asks it for block ids, the model's KVCache holds the memory behind them.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from cllm_core.errors import BlockPoolCorrupted

BlockHash = bytes

_HASH_BYTES = 16


def root_hash(*, cache_salt: str = "", adapter: str = "") -> BlockHash:
    """Parent of every first block's hash: requests of different salts or adapters never share a block."""
    # Its length first, so that no salt can pass for an adapter.
    return hashlib.blake2b(f"{len(adapter)}:{adapter}{cache_salt}".encode(), digest_size=_HASH_BYTES).digest()


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block: of its own tokens and, through `parent`, of all tokens before it."""
    tokens = np.asarray(token_ids, dtype=np.int64).tobytes()
    return hashlib.blake2b(parent + tokens, digest_size=_HASH_BYTES).digest()


class BlockPool:
    """Hands out block ids 0..num_blocks - 1, shares equal prefixes, and evicts the least recently used free block.

    A block is *free* when nobody holds it. A free block may still be *cached*: its content is known by a hash and can
    be taken back by `match_prefix` until `allocate` needs the memory.

    Args:
        num_blocks: size of the pool, in blocks.
        block_size: tokens in one block.
        prefix_caching: False forgets every hash, so nothing is shared.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._cached: dict[BlockHash, int] = {}
        # Oldest first: the next block to hand out is at the front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached or not."""
        return len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that cover this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with undefined content; the caller checked `num_free` before.

        Raises:
            BlockPoolCorrupted: fewer than `count` blocks are free.
        """
        if count > self.num_free:
            raise BlockPoolCorrupted(f"allocate({count}) with {self.num_free} free blocks; check num_free first")
        return [self._take_oldest() for _ in range(count)]

    def free(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each block of a request, given in the order of its tokens."""
        # The end of a text goes first, so that eviction shortens cached prefixes instead of beheading them.
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise BlockPoolCorrupted(f"block {block_id} freed though nobody holds it")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def match_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Take a reference to the longest run of cached blocks that starts a text with these block hashes."""
        matched: list[int] = []
        for block_hash in hashes:
            block_id = self._cached.get(block_hash)
            if block_id is None:
                break
            self._free.pop(block_id, None)
            self._ref_counts[block_id] += 1
            matched.append(block_id)
        return matched

    def share(self, block_ids: Sequence[int]) -> None:
        """Take a further reference to each of these blocks, which others hold.

        Raises:
            BlockPoolCorrupted: nobody holds one of them.
        """
        for block_id in block_ids:
            if self._ref_counts[block_id] < 1:
                raise BlockPoolCorrupted(f"block {block_id} shared though nobody holds it")
            self._ref_counts[block_id] += 1

    def forget(self, block_ids: Sequence[int]) -> list[int]:
        """Make blocks that nobody holds unfindable, for content that is of no use; returns those."""
        unheld = [block_id for block_id in block_ids if self._ref_counts[block_id] == 0]
        for block_id in unheld:
            self._drop_hash(block_id)
        return unheld

    def register(self, block_id: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable. Of two equal blocks the first stays the findable one."""
        if self.prefix_caching and block_hash not in self._cached and self._hashes[block_id] is None:
            self._cached[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def check(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raise BlockPoolCorrupted unless every block is free or held, never both, and the hash index is consistent.

        Args:
            holders: block ids of every request; given, reference counts must match them exactly.
        """
        for block_id, count in enumerate(self._ref_counts):
            if count < 0 or (count == 0) != (block_id in self._free):
                raise BlockPoolCorrupted(f"block {block_id}: {count} references, free={block_id in self._free}")
        for block_hash, block_id in self._cached.items():
            if self._hashes[block_id] != block_hash:
                raise BlockPoolCorrupted(f"block {block_id}: found by a hash it does not have")
        if len(self._cached) != sum(block_hash is not None for block_hash in self._hashes):
            raise BlockPoolCorrupted("a block has a hash by which it cannot be found")
        if holders is not None:
            held = Counter(block_id for block_ids in holders for block_id in block_ids)
            wrong = {b: (c, held[b]) for b, c in enumerate(self._ref_counts) if c != held[b]}
            if wrong:
                raise BlockPoolCorrupted(f"references differ from holders, as block: (counted, held): {wrong}")

    def _take_oldest(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        self._drop_hash(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def _drop_hash(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block_id] = None
