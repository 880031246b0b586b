"""Several processes that fill one cache: who may write what.

`torchrun mbcd prepare ...` (or RANK and WORLD_SIZE set by hand, on machines that share the cache's file system) splits
the shards; processes meet through the files alone, so that they need no network between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mbcd_cli.errors import CacheError
from mbcd_cli.files import lock
from mbcd_cli.place import Place
from mbcd_cli.processes import ALONE

PATIENCE = 3600.0
"""Seconds without a new shard after which rank 0 no longer waits for the other processes."""


@contextmanager
def locked(folder: Path, place: Place = ALONE) -> Iterator[None]:
    """Hold the folder's writer lock; it vanishes with the process.

    The processes of one job share it, and each holds its own rank's beside it.

    Raises:
        CacheError: a process of another job holds it.
        FileError: the folder cannot be written to.
    """
    together = place.world > 1
    with ExitStack() as stack:
        for name in (".lock", f".lock-{place.rank}") if together else (".lock",):
            held = lock(folder / name, shared=together and name == ".lock", place="--cache-dir")
            if held is None:
                raise CacheError(
                    f"Another mbcd process is preparing {folder}.",
                    "Wait for it to end, then run the command again.",
                )
            stack.enter_context(held)
        yield


def partial_is_ours(path: Path, place: Place) -> bool:
    """Whether a file left half written is this process' to remove."""
    number = path.name.removeprefix(".shard-").split(".")[0]
    return place.owns(int(number)) if number.isdigit() else place.main
