import pytest

from tests.simulated_cuda.device.allocator import GIB, MIB, CachingAllocator, OutOfMemoryError


def test_small_blocks_share_a_segment_of_2_mib():
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)
    allocator.allocate(1)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB + 512, 4 * MIB)


def test_blocks_below_10_mib_share_a_segment_of_20_mib_and_larger_ones_have_their_own():
    allocator = CachingAllocator()
    allocator.allocate(4 * MIB)
    allocator.allocate(9 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(11 * MIB)
    assert allocator.reserved == (20 + 12) * MIB


def test_a_large_block_keeps_a_rest_of_1_mib():
    allocator = CachingAllocator()
    allocator.allocate(19 * MIB + 512)
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)


def test_the_smallest_free_block_that_fits_is_used_again():
    allocator = CachingAllocator()
    small, large = allocator.allocate(30 * MIB), allocator.allocate(40 * MIB)
    allocator.release(large)
    allocator.release(small)
    assert allocator.allocate(29 * MIB) is small
    assert allocator.reserved == 70 * MIB


def test_free_neighbours_are_merged():
    allocator = CachingAllocator()
    first, second = allocator.allocate(4 * MIB), allocator.allocate(4 * MIB)
    allocator.release(first)
    allocator.release(second)
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 20 * MIB


def test_a_segment_in_use_fragments_the_memory():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    for block in blocks[::2]:
        allocator.release(block)
    allocator.allocate(8 * MIB)
    assert allocator.reserved == 40 * MIB


def test_free_segments_go_back_before_the_memory_runs_out():
    allocator = CachingAllocator(limit=GIB)
    allocator.release(allocator.allocate(600 * MIB))
    kept = allocator.allocate(700 * MIB)
    assert (allocator.emptied, allocator.reserved, allocator.peak_reserved) == (1, 700 * MIB, 700 * MIB)
    with pytest.raises(OutOfMemoryError, match=r"0\.39 GiB asked for, 0\.68 GiB of 1\.00 GiB reserved"):
        allocator.allocate(400 * MIB)
    allocator.release(kept)
    assert allocator.allocated == 0 and allocator.peak_allocated == 700 * MIB
