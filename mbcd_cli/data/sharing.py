"""Decoded arrays from worker processes through shared memory: one copy instead of pickling them through a pipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing import shared_memory
from typing import Any

import numpy as np

SMALLEST = 1 << 18
"""Bytes below which a pipe is as quick."""
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Shared:
    """A result whose `parts` lie in a block of shared memory.

    Attributes:
        block: the block's name.
        result: the result, without its parts.
        places: per view and part (offset, shape, dtype).
    """

    block: str
    result: Any
    places: list[list[tuple[int, tuple[int, ...], str]]]


def shared(result: Any) -> Any:
    """`result` (a dataclass with `parts`: views of tuples of arrays), its arrays moved to shared memory if large.

    Where there is no room in shared memory (containers often have 64 MB of it), `result` itself.
    """
    arrays = [array for view in result.parts for array in view]
    if sum(array.nbytes for array in arrays) < SMALLEST:
        return result
    places, size = [], 0
    for view in result.parts:
        row = []
        for array in view:
            row.append((size, array.shape, array.dtype.str))
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        places.append(row)
    try:
        block = shared_memory.SharedMemory(create=True, size=size)
    except OSError:
        return result
    try:
        os.posix_fallocate(block._fd, 0, size)  # a page that is missing later would kill the process
    except (OSError, AttributeError):
        block.close()
        block.unlink()
        return result
    for array, (offset, shape, dtype) in zip(arrays, (p for row in places for p in row), strict=True):
        np.ndarray(shape, dtype, buffer=block.buf, offset=offset)[...] = array
    block.close()
    # The receiver removes it, or `discard` does.
    return Shared(block.name, replace(result, parts=[]), places)


def received(message: Any) -> Any:
    """What `shared` was given; the block is removed, its arrays are copies."""
    if not isinstance(message, Shared):
        return message
    block = shared_memory.SharedMemory(name=message.block)
    parts = [
        tuple(np.ndarray(shape, dtype, buffer=block.buf, offset=offset).copy() for offset, shape, dtype in row)
        for row in message.places
    ]
    block.close()
    block.unlink()
    return replace(message.result, parts=parts)


def discard(flight: Iterable[tuple[Any, Future[Any]]]) -> None:
    """Free the blocks of results that nobody will take."""
    for _, future in flight:
        if future.done() and not future.cancelled() and future.exception() is None:
            message = future.result()
            if isinstance(message, Shared):
                with contextlib.suppress(FileNotFoundError):
                    block = shared_memory.SharedMemory(name=message.block)
                    block.close()
                    block.unlink()
