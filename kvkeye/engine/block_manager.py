"""Which KV blocks a row owns: allocation, sharing by content, copy-on-write, release.

Knows blocks and hashes; must not know tensors, models or the order in which rows run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvkeye.engine.prefix_cache import extend_hashes
from kvkeye.engine.request import Sequence
from kvkeye.host import BlockPool


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


class BlockManager:
    """Block tables over one pool. Shared blocks are never written: a shared block is replaced by a copy first."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_cache: bool = True, pool: BlockPool | None = None
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self.pool = pool if pool is not None else BlockPool(num_blocks)

    def attach(self, seq: Sequence) -> None:
        """Starts a row's table with the cached blocks of its longest known prefix.

        At least one token stays to be computed, since its logits choose the next one. Undone by `release`.
        """
        if not self.enable_prefix_cache:
            return
        num_usable = (len(seq.tokens) - 1) // self.block_size
        seq.block_table = self.pool.match(extend_hashes(seq, self.block_size)[:num_usable])
        seq.num_computed = len(seq.block_table) * self.block_size

    def num_new_blocks(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that computing the next `num_tokens` takes from the pool, copies of shared blocks included."""
        end = seq.num_computed + num_tokens
        num_missing = max(0, ceil_div(end, self.block_size) - len(seq.block_table))
        return num_missing + len(self._shared_blocks(seq, end))

    def can_reserve(self, seq: Sequence, num_tokens: int) -> bool:
        return self.num_new_blocks(seq, num_tokens) <= self.pool.num_available

    def _shared_blocks(self, seq: Sequence, end: int) -> list[int]:
        """Indices into the table of blocks to be written that have other owners too."""
        first, last = seq.num_computed // self.block_size, ceil_div(end, self.block_size)
        written = range(first, min(last, len(seq.block_table)))
        return [index for index in written if self.pool.ref_count(seq.block_table[index]) > 1]

    def reserve(self, seq: Sequence, num_tokens: int) -> list[tuple[int, int]]:
        """Makes room for the next `num_tokens`; returns (source, target) copies to run before they are computed.

        The last owner of a shared block writes it in place: copies run before anything is computed. No copy of a step
        lands on another one's source, since the rows that share a block follow each other in rank.
        """
        end = seq.num_computed + num_tokens
        copies = []
        for index in self._shared_blocks(seq, end):
            (target,) = self.pool.allocate(1)
            copies.append((seq.block_table[index], target))
            self.pool.release(seq.block_table[index])
            seq.block_table[index] = target
        num_missing = ceil_div(end, self.block_size) - len(seq.block_table)
        if num_missing > 0:
            seq.block_table += self.pool.allocate(num_missing)
        return copies

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Records that the next `num_tokens` are computed, and publishes the blocks that became full."""
        first = seq.num_computed // self.block_size
        seq.num_computed += num_tokens
        if not self.enable_prefix_cache:
            return
        hashes = extend_hashes(seq, self.block_size)
        for index in range(first, seq.num_computed // self.block_size):
            self.pool.publish(seq.block_table[index], hashes[index])

    def trim(self, seq: Sequence) -> None:
        """Gives up the blocks behind the computed tokens: they were for proposals."""
        while len(seq.block_table) > ceil_div(seq.num_computed, self.block_size):
            self.pool.release(seq.block_table.pop())

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets `child` share every block of `parent`."""
        for block in parent.block_table:
            self.pool.retain(block)
        child.block_table = list(parent.block_table)
        child.block_hashes = list(parent.block_hashes)
        child.num_computed = parent.num_computed

    def release(self, seq: Sequence) -> None:
        """Gives up all blocks, the last first, so that a prefix outlives its continuations in the cache."""
        for block in reversed(seq.block_table):
            self.pool.release(block)
        seq.block_table = []
        seq.num_computed = 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """RuntimeError unless owners and reference counts agree exactly. `sequences` are all rows that own blocks."""
        self.pool.check()
        owners = Counter(block for seq in sequences for block in seq.block_table)
        for block in range(self.pool.num_blocks):
            if owners[block] != self.pool.ref_count(block):
                raise RuntimeError(
                    f"block {block} has {owners[block]} owners and reference count {self.pool.ref_count(block)}"
                )
