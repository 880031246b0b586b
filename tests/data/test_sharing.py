"""Arrays through shared memory: the same values, blocks used again, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest

from mbcd_cli.data.media import sharing
from mbcd_cli.data.media.sharing import SMALLEST, Blocks, Shared, share
from mbcd_cli.data.records import Decoded


@pytest.fixture
def blocks():
    made = Blocks()
    yield made
    made.close()
    while sharing._open:
        sharing._open.popitem()[1].close()


def result(number: int, nbytes: int = 2 * SMALLEST) -> Decoded:
    rng = np.random.default_rng(number)
    big = rng.integers(0, 256, nbytes, dtype=np.uint8)
    return Decoded(number, [0, 1], [(big, rng.random((3, 5), np.float32)), (big[:7], rng.random(1))])


def passed(blocks: Blocks, one: Decoded) -> tuple[Decoded, str | None, bool]:
    name = blocks.lend()
    message = share(one, name)
    return blocks.receive(message, name), name, isinstance(message, Shared)


def assert_same(one: Decoded, other: Decoded) -> None:
    assert one.index == other.index
    for view, expected in zip(one.parts, other.parts, strict=True):
        for array, value in zip(view, expected, strict=True):
            assert array.dtype == value.dtype
            np.testing.assert_array_equal(array, value)


def test_the_first_result_tells_the_size_and_blocks_are_used_again(blocks):
    got, name, through = passed(blocks, result(0))
    assert (name, through) == (None, False)
    assert_same(got, result(0))
    names = set()
    for number in range(1, 5):
        got, name, through = passed(blocks, result(number))
        assert through
        names.add(name)
        assert_same(got, result(number))
    assert len(names) == 1


def test_blocks_grow_with_what_arrives(blocks):
    passed(blocks, result(0))
    got, _, through = passed(blocks, result(1, 8 * SMALLEST))
    assert not through  # it did not fit
    assert_same(got, result(1, 8 * SMALLEST))
    got, _, through = passed(blocks, result(2, 8 * SMALLEST))
    assert through
    assert_same(got, result(2, 8 * SMALLEST))


def test_a_received_array_outlives_its_block(blocks):
    passed(blocks, result(0))
    kept = [passed(blocks, result(number))[0] for number in range(3)]
    for number, one in enumerate(kept):
        assert_same(one, result(number))


def test_a_process_that_is_ended_while_it_makes_a_block_leaves_none():
    """Between the block and its tracker's notice of it."""
    prefix = f"/t{os.getpid()}-"
    program = f"""
from multiprocessing import shared_memory
from pathlib import Path
from mbcd_cli.data.media import sharing
shared_memory._SHM_NAME_PREFIX = {prefix!r}
def interrupted(*_):
    assert list(Path("/dev/shm").glob({prefix[1:]!r} + "*"))
    raise KeyboardInterrupt
shared_memory.mmap.mmap = interrupted
blocks = sharing.Blocks()
blocks._size = sharing.SMALLEST
blocks.lend()
"""
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert "KeyboardInterrupt" in ended.stderr
    assert not list(Path("/dev/shm").glob(f"{prefix[1:]}*"))


def test_small_results_and_rejections_take_the_pipe(blocks):
    passed(blocks, result(0))
    assert not passed(blocks, result(1, 100))[2]
    assert not passed(blocks, Decoded(2, [], []))[2]


def test_without_room_in_shared_memory_the_pipe_serves(blocks, monkeypatch):
    passed(blocks, result(0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharing.os, "posix_fallocate", full)
    got, name, through = passed(blocks, result(1))
    assert (name, through) == (None, False)
    assert_same(got, result(1))


def test_close_removes_every_block():
    blocks = Blocks()
    passed(blocks, result(0))
    name, other = blocks.lend(), blocks.lend()
    blocks.give_back(name)
    blocks.close()
    for gone in (name, other):
        with pytest.raises(FileNotFoundError):
            shared_memory.SharedMemory(name=gone)
