"""BlockPool against a model that keeps everything in plain lists, and each of its promises by example."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cllm_core.engine.block_pool import BlockHash, BlockPool, chain_hash, root_hash
from cllm_core.errors import BlockPoolCorrupted

BLOCK_SIZE = 2
NUM_BLOCKS = 6


def hashes_of(token_ids: list[int], *, salt: str = "") -> list[BlockHash]:
    """Of the full blocks of a text."""
    chain = [root_hash(cache_salt=salt)]
    for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        chain.append(chain_hash(chain[-1], token_ids[start : start + BLOCK_SIZE]))
    return chain[1:]


def make_pool(*, num_blocks: int = NUM_BLOCKS, prefix_caching: bool = True) -> BlockPool:
    return BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=prefix_caching)


def cache_text(pool: BlockPool, token_ids: list[int], *, salt: str = "") -> list[int]:
    """Compute a text and let go of it; returns the blocks it was in."""
    hashes = hashes_of(token_ids, salt=salt)
    blocks = pool.allocate(len(hashes))
    for block_id, block_hash in zip(blocks, hashes, strict=True):
        pool.register(block_id, block_hash)
    pool.free(blocks)
    return blocks


class PoolAgainstModel(RuleBasedStateMachine):
    """The model: who holds what, which text each block was last given, and the free blocks in order of eviction."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.held: list[list[int]] = []
        self.cached: dict[BlockHash, int] = {}
        self.free = list(range(NUM_BLOCKS))

    texts = st.lists(st.integers(0, 1), min_size=BLOCK_SIZE, max_size=4 * BLOCK_SIZE)

    @rule(token_ids=texts)
    def start_text(self, token_ids: list[int]) -> None:
        """What a request does: match, allocate the rest, compute, register."""
        hashes = hashes_of(token_ids)
        expected = self._match(hashes)
        matched = self.pool.match_prefix(hashes)
        assert matched == expected
        num_missing = len(hashes) - len(matched)
        if num_missing > len(self.free):
            self.pool.free(matched)
            self._free(matched)
            return
        taken = [self.free.pop(0) for _ in range(num_missing)]
        self.cached = {key: block_id for key, block_id in self.cached.items() if block_id not in taken}
        assert self.pool.allocate(num_missing) == taken
        for block_id, block_hash in zip(taken, hashes[len(matched) :], strict=True):
            self.pool.register(block_id, block_hash)
            self.cached.setdefault(block_hash, block_id)
        self.held.append(matched + taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end_text(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)
        self._free(blocks)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(self.held)
        assert self.pool.num_free == len(self.free)

    def _match(self, hashes: list[BlockHash]) -> list[int]:
        matched = []
        for block_hash in hashes:
            if block_hash not in self.cached:
                break
            matched.append(self.cached[block_hash])
        self.free = [block_id for block_id in self.free if block_id not in matched]
        return matched

    def _free(self, blocks: list[int]) -> None:
        holders = Counter(block_id for blocks in self.held for block_id in blocks)
        for block_id in reversed(blocks):
            if not holders[block_id]:
                is_cached = block_id in self.cached.values()
                self.free.insert(len(self.free) if is_cached else 0, block_id)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_least_recently_used_text_is_evicted_first_and_from_its_end() -> None:
    pool = make_pool()
    old, new = [1, 1, 2, 2, 3, 3], [7, 7, 8, 8, 9, 9]
    cache_text(pool, old)
    cache_text(pool, new)
    pool.free(pool.allocate(2))
    survivors = pool.match_prefix(hashes_of(old))
    assert len(survivors) == 1
    assert len(pool.match_prefix(hashes_of(new))) == 3


def test_a_match_makes_a_text_recently_used() -> None:
    pool = make_pool()
    old, new = [1, 1, 2, 2, 3, 3], [7, 7, 8, 8, 9, 9]
    cache_text(pool, old)
    cache_text(pool, new)
    pool.free(pool.match_prefix(hashes_of(old)))
    pool.allocate(3)
    assert len(pool.match_prefix(hashes_of(old))) == 3
    assert pool.match_prefix(hashes_of(new)) == []


def test_blocks_without_known_content_are_handed_out_before_cached_ones() -> None:
    pool = make_pool()
    cache_text(pool, [1, 1, 2, 2])
    plain = pool.allocate(2)
    pool.free(plain)
    assert set(pool.allocate(4)).isdisjoint(pool.match_prefix(hashes_of([1, 1, 2, 2])))


def test_a_held_block_is_shared_and_outlives_its_first_holder() -> None:
    pool = make_pool()
    hashes = hashes_of([4, 5])
    first = pool.allocate(1)
    pool.register(first[0], hashes[0])
    assert pool.match_prefix(hashes) == first
    pool.free(first)
    assert pool.num_free == NUM_BLOCKS - 1
    pool.check([first])


def test_the_hash_of_a_block_tells_salts_and_beginnings_apart() -> None:
    assert hashes_of([1, 2])[0] != hashes_of([1, 2], salt="a")[0]
    assert hashes_of([1, 2, 5, 6])[1] != hashes_of([3, 4, 5, 6])[1]
    assert hashes_of([1, 2, 5, 6])[:1] == hashes_of([1, 2])


def test_without_prefix_caching_nothing_is_found_again() -> None:
    pool = make_pool(prefix_caching=False)
    cache_text(pool, [1, 2, 3, 4])
    assert pool.match_prefix(hashes_of([1, 2, 3, 4])) == []


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)])
def test_blocks_needed_are_rounded_up(num_tokens: int, num_blocks: int) -> None:
    assert make_pool().num_needed(num_tokens) == num_blocks


def test_taking_more_than_is_free_is_refused() -> None:
    pool = make_pool()
    with pytest.raises(BlockPoolCorrupted, match=r"allocate\(7\) with 6 free"):
        pool.allocate(NUM_BLOCKS + 1)


def test_freeing_what_nobody_holds_is_refused() -> None:
    pool = make_pool()
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(BlockPoolCorrupted, match="nobody holds it"):
        pool.free(blocks)


def free_a_held_block(pool: BlockPool) -> None:
    pool._free[pool.allocate(1)[0]] = None


def lose_a_free_block(pool: BlockPool) -> None:
    pool._free.popitem()


def count_a_reference_too_many(pool: BlockPool) -> None:
    pool._ref_counts[pool.allocate(1)[0]] += 1


def forget_a_hash(pool: BlockPool) -> None:
    pool._hashes[cache_text(pool, [1, 2])[0]] = None


def forget_an_index_entry(pool: BlockPool) -> None:
    cache_text(pool, [1, 2])
    pool._cached.clear()


@pytest.mark.parametrize(
    "corrupt",
    [free_a_held_block, lose_a_free_block, count_a_reference_too_many, forget_a_hash, forget_an_index_entry],
)
def test_check_finds_corrupted_books(corrupt: Callable[[BlockPool], None]) -> None:
    pool = make_pool()
    held = pool.allocate(2)
    pool.check([held])
    corrupt(pool)
    with pytest.raises(BlockPoolCorrupted):
        pool.check([held])
