"""Long recordings that stay open from one clip to the next: reading the packets of an hour takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from mbcd_cli.data.media.checks import file_version
from mbcd_cli.data.records import Media

AnyOpen = TypeVar("AnyOpen")


class Kept(threading.local, Generic[AnyOpen]):
    """The recordings that the latest clips of a thread were cut from; each thread has its own.

    Args:
        opened: opens a file; what it gives has a `close`.
        limit: recordings that are kept at most.
    """

    def __init__(self, opened: Callable[[Path], AnyOpen], *, limit: int) -> None:
        self._opened, self._limit = opened, limit
        self._entries: list[tuple[tuple, AnyOpen]] = []

    @contextmanager
    def lent(self, media: Media) -> Iterator[AnyOpen]:
        """The clip's file, open; closed afterwards where the clip is all of it."""
        if media.start is None and media.stop is None:
            with closing(self._opened(media.path)) as file:
                yield file
            return
        version = file_version(media.path)
        entry = next((entry for entry in self._entries if entry[0] == version), None)
        if entry is not None:
            self._entries.remove(entry)
        else:
            while len(self._entries) >= self._limit:
                self._entries.pop(0)[1].close()  # before the next is opened
            entry = (version, self._opened(media.path))
        try:
            yield entry[1]
        except BaseException:
            entry[1].close()  # what a file that failed gives next is nobody's promise
            raise
        self._entries.append(entry)
