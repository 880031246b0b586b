"""Several processes that fill one cache: who takes which shard, and who may write.

`torchrun mbcd prepare ...` (or RANK and WORLD_SIZE set by hand, on machines that share the cache's file system) splits
the shards; processes meet through the files alone, so that they need no network between them.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mbcd_cli.errors import CacheError, SettingsError

PATIENCE = 3600.0
"""Seconds without a new shard after which rank 0 no longer waits for the other processes."""
_LOOK = 0.2


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process' place among those of one job: `rank` of `world`; alone it is 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes the index and prints."""
        return self.rank == 0

    def owns(self, shard: int) -> bool:
        """Whether `shard` is this process' to fill; told from its number alone, so that all agree at any time."""
        return shard % self.world == self.rank


def ranks_of(environ: Mapping[str, str]) -> Ranks:
    """RANK and WORLD_SIZE as torchrun sets them; without them, alone.

    Raises:
        SettingsError: they are no numbers, or contradict each other.
    """
    try:
        found = Ranks(int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise SettingsError(
            "RANK and WORLD_SIZE must be whole numbers.", "Start with torchrun, or unset both."
        ) from error
    if not 0 <= found.rank < found.world:
        raise SettingsError(
            f"RANK is {found.rank} and WORLD_SIZE is {found.world}.", "Start with torchrun, or unset both."
        )
    return found


@contextlib.contextmanager
def locked(folder: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Hold the folder's writer lock; it vanishes with the process.

    The processes of one job share it, and each holds its own rank's beside it.

    Raises:
        CacheError: a process of another job holds it.
    """
    ranks = ranks or Ranks()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        wanted = [(".lock", fcntl.LOCK_EX if ranks.world == 1 else fcntl.LOCK_SH)]
        if ranks.world > 1:
            wanted.append((f".lock-{ranks.rank}", fcntl.LOCK_EX))
        for name, kind in wanted:
            handle = stack.enter_context((folder / name).open("w"))
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except OSError as error:
                raise CacheError(
                    f"Another mbcd process is preparing {folder}.",
                    "Wait for it to end, then run the command again.",
                ) from error
        yield


def wait_for(missing: Callable[[], list[int]], *, tell: Callable[[str], None], patience: float | None = None) -> None:
    """Wait until the other processes' shards are there.

    Args:
        missing: shards that are not there yet.
        tell: prints one line to a person.
        patience: seconds without progress to endure; None takes `PATIENCE`.

    Raises:
        CacheError: no new shard for too long.
    """
    patience = PATIENCE if patience is None else patience
    left = missing()
    since = told = time.monotonic()
    while left:
        time.sleep(_LOOK)
        now, before = time.monotonic(), len(left)
        left = missing()
        if len(left) < before:
            since = now
        if now - since > patience:
            raise CacheError(
                f"The other processes have written no shard for {patience:.0f} s; {len(left)} are missing.",
                "Run the same command again; it goes on with what is missing.",
            )
        if left and now - told > 20:
            told = now
            tell(f"waiting for {len(left)} shards of the other processes")


def partial_is_ours(path: Path, ranks: Ranks) -> bool:
    """Whether a file left half written is this process' to remove."""
    number = path.name.removeprefix("shard-").split(".")[0]
    return ranks.owns(int(number)) if number.isdigit() else ranks.main


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`, or will hold it."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
