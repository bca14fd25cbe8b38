"""Pure-Python twin of `kvkeye._host` (csrc/host): same names, same behaviour, same errors, same order of blocks.

Used where the native module was not built for the running Python. Both pass the same tests.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Reference-counted KV blocks with an index by content.

    A block is in exactly one place: free; used (ref_count > 0); or cached (ref_count 0, content kept under a key).
    `allocate` takes free blocks first, last released first, then evicts cached blocks, least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"BlockPool: num_blocks is {num_blocks}; expected at least 1")
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._lru)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and cached."""
        return len(self._free) + len(self._lru)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def _checked(self, block: int) -> int:
        if not 0 <= block < len(self._ref_counts):
            raise IndexError(f"BlockPool: block {block} is outside [0, {len(self._ref_counts)})")
        return block

    def ref_count(self, block: int) -> int:
        return self._ref_counts[self._checked(block)]

    def key_of(self, block: int) -> bytes | None:
        return self._keys[self._checked(block)]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with ref_count 1 and no key; RuntimeError, with nothing changed, if there are fewer."""
        if count < 0:
            raise ValueError(f"BlockPool.allocate: count is {count}; expected at least 0")
        if count > self.num_available:
            raise RuntimeError(f"BlockPool.allocate: asked for {count} blocks; {self.num_available} are available")
        if count > len(self._free):
            self.evict(count - len(self._free))
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def retain(self, block: int) -> None:
        """One more owner of a block in use or cached; ValueError for a free one."""
        self._checked(block)
        if self._ref_counts[block] == 0:
            if block not in self._lru:
                raise ValueError(f"BlockPool.retain: block {block} is free")
            del self._lru[block]
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One owner less. The last one leaves the block cached if it has a key, else free."""
        self._checked(block)
        if self._ref_counts[block] == 0:
            raise ValueError(f"BlockPool.release: block {block} has no owner")
        self._ref_counts[block] -= 1
        if self._ref_counts[block] > 0:
            return
        if self._keys[block] is None:
            self._free.append(block)
        else:
            self._lru[block] = None

    def publish(self, block: int, key: bytes) -> bool:
        """Names the content of a block in use. False, and nothing changed, if the name or the block is taken."""
        self._checked(block)
        if self._ref_counts[block] == 0:
            raise ValueError(f"BlockPool.publish: block {block} has no owner")
        if self._keys[block] is not None or key in self._index:
            return False
        self._keys[block] = key
        self._index[key] = block
        return True

    def match(self, keys: list[bytes]) -> list[int]:
        """Blocks of the longest known run of `keys` from the first; each gets one more owner."""
        blocks = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            self.retain(block)
            blocks.append(block)
        return blocks

    def evict(self, count: int) -> int:
        """Makes up to `count` cached blocks free, least recently used first; returns how many."""
        evicted = 0
        while evicted < count and self._lru:
            block, _ = self._lru.popitem(last=False)
            self._forget(block)
            self._free.append(block)
            evicted += 1
        return evicted

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = None

    def clear(self) -> None:
        """Forgets all content: cached blocks become free, used ones lose their keys (after a change of weights)."""
        self.evict(self.num_blocks)
        for block in range(self.num_blocks):
            self._forget(block)

    def check(self) -> None:
        """RuntimeError if a block is in two places or in none, or if the index disagrees with the keys."""
        seen = [0] * self.num_blocks
        for block in self._free:
            seen[block] += 1
            if self._keys[block] is not None:
                raise RuntimeError(f"BlockPool: free block {block} has a key")
        for block in self._lru:
            seen[block] += 1
            if self._keys[block] is None:
                raise RuntimeError(f"BlockPool: cached block {block} has no key")
        num_keys = 0
        for block, count in enumerate(self._ref_counts):
            if seen[block] + (count > 0) != 1:
                raise RuntimeError(f"BlockPool: block {block} is in {seen[block] + (count > 0)} places")
            key = self._keys[block]
            if key is not None:
                num_keys += 1
                if self._index.get(key) != block:
                    raise RuntimeError(f"BlockPool: the index does not lead to block {block}")
        if num_keys != len(self._index):
            raise RuntimeError(f"BlockPool: the index has {len(self._index)} keys; blocks have {num_keys}")
