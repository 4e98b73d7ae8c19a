"""torch's caching allocator for CUDA: which memory it reserves for blocks of given sizes. For one stream.

Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.13, with its default settings.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import count
from math import inf

MIB, GIB = 2**20, 2**30
# Sizes are multiples of it.
UNIT = 512
# Blocks up to this size come from segments of 2 MiB, and larger ones from segments of their own size or 20 MiB.
SMALL = MIB
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * MIB, 20 * MIB
_OWN_SEGMENT, _SEGMENT_UNIT = 10 * MIB, 2 * MIB


def rounded(size: int, unit: int) -> int:
    """The next multiple."""
    return -(-size // unit) * unit


@dataclass(eq=False)
class Block:
    """A part of a segment, with its neighbours there."""

    size: int
    small: bool
    number: int
    previous: "Block | None" = None
    next: "Block | None" = None
    free: bool = True

    @property
    def order(self) -> tuple[int, int]:
        """Smaller blocks first, then older ones."""
        return self.size, self.number


class OutOfMemoryError(RuntimeError):
    """A block does not fit into the limit, even without the free segments."""


@dataclass
class CachingAllocator:
    """Bytes that are allocated and reserved now, and their peaks.

    limit: of what can be reserved. emptied: how often free segments went back to the device to stay below it.
    """

    limit: float = inf
    emptied: int = 0
    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    _free: dict[bool, list[tuple[int, int, Block]]] = field(default_factory=lambda: {True: [], False: []})
    _numbers: count = field(default_factory=count)

    def allocate(self, size: int) -> Block:
        """The smallest free block that fits, else a new segment; what is left of it stays free."""
        size = rounded(max(size, 1), UNIT)
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size,))
        block = free.pop(place)[2] if place < len(free) else self._segment(size, small)
        if block.size - size >= (UNIT if small else SMALL + 1):
            rest = Block(block.size - size, small, next(self._numbers), previous=block, next=block.next)
            if block.next is not None:
                block.next.previous = rest
            block.next, block.size = rest, size
            insort(free, (*rest.order, rest))
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free a block, and merge it with free neighbours."""
        self.allocated -= block.size
        block.free = True
        if block.previous is not None and block.previous.free:
            self._remove(block.previous)
            block = self._merged(block.previous, block)
        if block.next is not None and block.next.free:
            self._remove(block.next)
            block = self._merged(block, block.next)
        insort(self._free[block.small], (*block.order, block))

    def empty_cache(self) -> None:
        """Give segments that nothing uses back to the device."""
        for blocks in self._free.values():
            parts = [item for item in blocks if item[2].previous is not None or item[2].next is not None]
            self.reserved -= sum(size for size, *_ in blocks) - sum(size for size, *_ in parts)
            blocks[:] = parts

    def reset_peaks(self) -> None:
        """Begin new peaks at what is allocated and reserved now."""
        self.emptied = 0
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _segment(self, size: int, small: bool) -> Block:
        shared = _SMALL_SEGMENT if small else _LARGE_SEGMENT
        size = shared if size < _OWN_SEGMENT else rounded(size, _SEGMENT_UNIT)
        if self.reserved + size > self.limit:
            self.empty_cache()
            self.emptied += 1
        if self.reserved + size > self.limit:
            raise OutOfMemoryError(
                f"{size / GIB:.2f} GiB asked for, {self.reserved / GIB:.2f} GiB of {self.limit / GIB:.2f} GiB "
                f"reserved, {self.allocated / GIB:.2f} GiB of them in use"
            )
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Block(size, small, next(self._numbers))

    def _merged(self, first: Block, second: Block) -> Block:
        first.size += second.size
        first.next = second.next
        if second.next is not None:
            second.next.previous = first
        return first

    def _remove(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, block.order)]
