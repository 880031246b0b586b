"""Several processes that fill one cache: shards are taken when free.

Whoever runs the same `mbcd prepare`, by a launcher or from another terminal or machine that shares the cache's file
system, takes part, and may join, leave or die at any time; processes meet through the files alone. A shard belongs to
who holds the lock of its own file `.lock-NNNNN`, until it is written: what a dead process held is free again
(`locks` says when). One process leads: it holds `.lock`, where stands who it is and how all of them cut the clips into
shards; it writes the index. When it is gone, another leads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mbcd_cli.data.cache import shard_path
from mbcd_cli.errors import CacheError
from mbcd_cli.files import remove_partial
from mbcd_cli.locks import LockFile, held, lock
from mbcd_cli.place import Place
from mbcd_cli.processes import ALONE

REPAIR = "repair"
"""The plan of who repairs a cache: nobody else's."""
_SOON = 5.0  # seconds within which who leads has said how


class Crew:
    """This process' part in filling one cache; a context manager that gives back whatever it holds.

    Args:
        folder: of the cache.
        plan: a word for all that the processes must agree in (how clips are cut into shards).
        place: that a launcher gave this process: each begins elsewhere.

    Attributes:
        done: shards that this process has written.
    """

    def __init__(self, folder: Path, plan: str, place: Place = ALONE) -> None:
        self.folder, self.plan, self.place = folder, plan, place
        self.done: set[int] = set()
        self._leading: LockFile | None = None
        self._taken: dict[int, LockFile] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._taken):
            self._give(number)
        if self._leading is not None:
            self._leading.close()
            self._leading = None

    def lead(self) -> bool:
        """Lead, where nobody does.

        Returns:
            Whether this process leads.

        Raises:
            CacheError: others are at work, by another plan, or (`REPAIR`) at all.
            FileError: the folder cannot be written to.
        """
        if self._leading is None:
            file = lock(self.folder / ".lock", place="--cache-dir")
            if file is None:
                if self.plan == REPAIR:
                    raise self._busy(self._told())
                self._agree()
                return False
            try:
                told = self._told()
                if told[:1] != [self.plan]:
                    self._refuse_others()
                    _tell(file, "")  # from here on nobody agrees with anything
                    try:
                        self._refuse_others()  # who took one meanwhile, agreeing with what was told before
                    except CacheError:
                        _tell(file, " ".join(told))
                        raise
                    _tell(file, f"{self.plan} {os.uname().nodename} {os.getpid()}")
            except BaseException:
                file.close()
                raise
            self._leading = file
        return True

    def free(self, numbers: Sequence[int], is_done: Callable[[int], bool]) -> Iterator[int]:
        """Those of `numbers`, none of which is done, that nobody else works on: taken one by one, when asked for.

        Args:
            is_done: looks whether a shard is, by now.
        """
        before = {path.name for path in self.folder.iterdir()} if numbers else set()
        first = len(numbers) * self.place.rank // self.place.world
        if self.place.world == 1 and self._leading is None:
            first = os.getpid() % (len(numbers) or 1)
        for number in [*numbers[first:], *numbers[:first]]:
            path = shard_path(self.folder, number)
            if path.name not in before and path.exists():
                continue
            file = lock(self._lock_of(number), place="--cache-dir")
            if file is None:
                continue
            self._taken[number] = file
            self._agree()
            if is_done(number):
                self._give(number)
            else:
                yield number

    def give(self, number: int) -> None:
        """Shard `number` is written."""
        self.done.add(number)
        self._give(number)

    def any_free(self, numbers: Sequence[int]) -> bool:
        """Whether one of `numbers` is in nobody's hands, since it is done or its process is gone."""
        return not all(held(self._lock_of(number)) for number in numbers)

    def clean(self) -> None:
        """Delete what killed processes left; all shards are there, and this process leads."""
        remove_partial(self.folder)
        for path in self._locks():
            file = lock(path, place="--cache-dir")
            if file is not None:
                path.unlink(missing_ok=True)
                file.close()

    def _give(self, number: int) -> None:
        file = self._taken.pop(number)
        self._lock_of(number).unlink(missing_ok=True)
        file.close()

    def _lock_of(self, number: int) -> Path:
        return self.folder / f".lock-{number:05d}"

    def _locks(self) -> list[Path]:
        return sorted({path.with_suffix("") for path in self.folder.glob(".lock-*")})  # with and without `HOLDER`

    def _told(self) -> list[str]:
        """Plan, host and process of who leads, or led last."""
        with suppress(OSError, ValueError):
            return (self.folder / ".lock").read_text(encoding="utf-8").split()
        return []

    def _agree(self) -> None:
        """Who leads, or led last, has this process' plan.

        Raises:
            CacheError: it has another one.
        """
        until = time.monotonic() + _SOON
        while self._leading is None and (told := self._told())[:1] != [self.plan]:
            if not held(self.folder / ".lock"):  # who led is gone, or deleted the folder: nobody could use a clip of it
                self.lead()
            elif time.monotonic() > until:  # sooner, it may be the plan of who led before
                raise self._busy(told)
            time.sleep(0.05)

    def _refuse_others(self) -> None:
        own = {self._lock_of(number) for number in self._taken}
        if any(path not in own and held(path) for path in self._locks()):
            raise self._busy(self._told())

    def _busy(self, told: Sequence[str]) -> CacheError:
        who = f" (process {told[2]} on {told[1]})" if len(told) == 3 else ""
        work = "repairing" if told[:1] == [REPAIR] else "preparing"
        other = "" if REPAIR in (self.plan, *told[:1]) else ", cut into other shards"
        return CacheError(
            f"Another mbcd process{who} is {work} {self.folder}{other}.",
            "Wait for it to end, then run the command again.",
        )


def _tell(file: LockFile, text: str) -> None:
    """Let this be what stands in the lock file of who leads."""
    file.truncate(0)
    file.write(text.encode())
    os.fsync(file.fileno())  # NFS tells other hosts no sooner
