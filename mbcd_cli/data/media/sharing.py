"""Decoded arrays from worker processes through shared memory: one copy instead of pickling them through a pipe.

The blocks belong to the receiver and are used again and again: a new block's pages have to be made first, which took
longer than decoding some clips. Four views of a clip take 3.3 times as long through a pipe as through a block: of 32
frames of 224 pixels; 1.8 times: of 16 frames of 56; 3.3 times: of a spectrogram of 257 x 1000 (AMD EPYC, one worker).
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker, shared_memory

import numpy as np

from mbcd_cli.data.records import Decoded

SMALLEST = 1 << 18
"""Bytes below which a pipe is as quick."""
_ALIGNMENT = 64
_KEPT = 64
"""Blocks that a worker keeps open."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A clip whose parts lie in a block of shared memory.

    Attributes:
        clip: as it was decoded, without its parts.
        places: per view and part (offset, shape, dtype).
    """

    clip: Decoded
    places: list[list[tuple[int, tuple[int, ...], str]]]


class Blocks:
    """The receiver's blocks of shared memory, all of one size that grows with what arrives."""

    def __init__(self) -> None:
        self._size = 0
        self._free: list[shared_memory.SharedMemory] = []
        self._out: dict[str, shared_memory.SharedMemory] = {}
        self._none_left = False

    def lend(self) -> str | None:
        """Name of a block that one worker may write to; None while no size is known, or there is no room for one."""
        if not self._size:
            return None
        block = self._free.pop() if self._free else self._new()
        if block is None:
            return None
        self._out[block.name] = block
        return block.name

    def _new(self) -> shared_memory.SharedMemory | None:
        if self._none_left:
            return None
        # The tracker has its name before it is there: what ends this process in between leaves nothing.
        name = shared_memory._make_filename()
        resource_tracker.register(name, "shared_memory")
        try:
            block = shared_memory.SharedMemory(name.removeprefix("/"), create=True, size=self._size)
        except OSError:
            resource_tracker.register(name, "shared_memory")  # it may have been told already that there is none
            resource_tracker.unregister(name, "shared_memory")
            self._none_left = True
            return None
        try:
            os.posix_fallocate(block._fd, 0, self._size)  # a page that is missing later would kill the process
        except (OSError, AttributeError):
            self._none_left = True  # containers often have 64 MB of it
            _remove(block)
            return None
        return block

    def receive(self, message: Decoded | Shared, name: str | None) -> Decoded:
        """What `share` was given, its arrays copied out of the block `name`, which is free again.

        Args:
            message: what `share` returned.
            name: the block lent for it, or None.
        """
        block = self._out.get(name) if name is not None else None
        if isinstance(message, Shared):
            parts = [
                tuple(np.ndarray(shape, dtype, buffer=block.buf, offset=offset).copy() for offset, shape, dtype in row)
                for row in message.places
            ]
            message = replace(message.clip, parts=parts)
        else:
            self._grow(_places(message)[1])
        if block is not None:
            self.give_back(block.name)
        return message

    def give_back(self, name: str) -> None:
        """The block is free: nobody writes to it any more."""
        block = self._out.pop(name)
        if block.size >= self._size:
            self._free.append(block)
        else:
            _remove(block)

    def _grow(self, size: int) -> None:
        if size >= SMALLEST and size > self._size:
            self._size = size
            for block in self._free:
                _remove(block)
            self._free.clear()

    def close(self) -> None:
        """Remove all blocks; nobody may write to them any more."""
        for block in (*self._free, *self._out.values()):
            _remove(block)
        self._free.clear()
        self._out.clear()


def _remove(block: shared_memory.SharedMemory) -> None:
    block.close()
    with contextlib.suppress(FileNotFoundError):
        block.unlink()


def _places(clip: Decoded) -> tuple[list[list[tuple[int, tuple[int, ...], str]]], int]:
    """Where the parts of a clip lie in a block, and the bytes that they take."""
    places, size = [], 0
    for view in clip.parts:
        row = []
        for array in view:
            row.append((size, array.shape, array.dtype.str))
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        places.append(row)
    return places, size


_open: OrderedDict[str, shared_memory.SharedMemory] = OrderedDict()


def _opened(name: str) -> shared_memory.SharedMemory:
    """In a worker: the block `name`, whose pages stay mapped from one clip to the next."""
    if name not in _open:
        while len(_open) >= _KEPT:
            _open.popitem(last=False)[1].close()
        _open[name] = shared_memory.SharedMemory(name=name)
    _open.move_to_end(name)
    return _open[name]


def share(clip: Decoded, name: str | None) -> Decoded | Shared:
    """In a worker: a decoded clip, its arrays moved to block `name`.

    The clip itself where it is small, no block was lent or the block is too small.
    """
    places, size = _places(clip)
    if name is None or size < SMALLEST:
        return clip
    block = _opened(name)
    if size > block.size:
        return clip
    arrays = (array for view in clip.parts for array in view)
    for array, (offset, shape, dtype) in zip(arrays, (p for row in places for p in row), strict=True):
        np.ndarray(shape, dtype, buffer=block.buf, offset=offset)[...] = array
    return Shared(replace(clip, parts=[]), places)
