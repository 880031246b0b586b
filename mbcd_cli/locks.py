"""Who may write where: one lock for all rooms, which goes with the process that holds it, however that ends.

It is the file system's own (`flock`). Where there is none (Lustre as it is usually mounted, some NFS), a file beside
the locked one, `.NAME.holder`, names the host and the process that hold it, and is touched every ten seconds. Dead is
who is gone from this host, or was seen to touch nothing for half a minute (filelock's `SoftFileLease`), which whoever
asks waits for where it was last touched longer ago than that.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.files import clear, unwritable

if TYPE_CHECKING:
    from filelock import LeaseCompromise, SoftFileLease

# What NFS, Lustre and the like answer where locks are off (or, EBADF, to one on a folder); EWOULDBLOCK alone says that
# another process holds one. Linux's own ENOTSUPP, which Lustre and NFS let out, is in no table of errors.
_ENOTSUPP = 524
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, _ENOTSUPP, errno.EBADF)
HOLDER = ".holder"
_LEASE = 30.0  # seconds; all processes must have the same
_LOG = logging.getLogger(__name__)
_LOOK = 0.05  # seconds between two looks at a lock that another process holds
_GLANCE = 0.01  # and at one that others only look at (`held`): a look takes no longer


class LockFile(FileIO):
    """A file, open for reading and appending, that this process holds until it is closed."""

    def __init__(self, path: Path) -> None:
        self.lease: SoftFileLease | None = None
        super().__init__(path, "a+")

    def write(self, data: bytes) -> int:
        """Write all of it, or raise, naming the file: a disk that gets full amid it takes a part and says nothing."""
        left = memoryview(data)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from error
        return len(data)

    def close(self) -> None:
        """Let others have it."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()
        super().close()


def lock(path: Path, **where: str) -> LockFile | None:
    """Hold the file `path`, made where it is missing, until it is closed or this process ends, however it ends.

    Args:
        where: `place` and `then` of `unwritable`.

    Returns:
        The file; None where another process holds it.

    Raises:
        FileError: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = LockFile(path)
            try:
                file.lease = _take(file, path)
            except BlockingIOError:
                with file:
                    if not _looked_at(file):
                        return None
                time.sleep(_GLANCE)
                continue
            if _same(file.fileno(), path):
                return file
            file.close()  # who held it before has removed it: this lock would keep nobody out
    except OSError as error:
        raise unwritable(path, error, **where) from error


def held(path: Path) -> bool:
    """Whether another process holds the file `path` now."""
    try:
        with FileIO(path) as file:
            lease = _take(file, path, fcntl.LOCK_SH)
            if lease is not None:
                lease.release()
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, this process' alone, to be filled and given that name; else it is removed.

    What a killed process left there is removed. The lock is on the folder itself, so that nothing else is left of it.

    Raises:
        FileError: it cannot be made.
    """
    aside = path.parent / f".{path.name}.partial"
    while True:
        with ExitStack() as stack:
            try:
                aside.mkdir(parents=True, exist_ok=True)
                handle = os.open(aside, os.O_RDONLY)
                stack.callback(os.close, handle)
                lease = _wait(handle, aside)
            except OSError as error:
                raise unwritable(path.parent, error) from error
            if lease is not None:
                stack.callback(lease.release)
            if not _same(handle, aside):
                continue  # who held it before has given it its name: this lock would keep nobody out
            try:
                clear(aside)
                yield aside
            finally:
                if _same(handle, aside):
                    shutil.rmtree(aside)
            return


def _looked_at(file: FileIO) -> bool:
    """Whether those who have it only look (`held`), each for a moment."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait(handle: int, path: Path) -> SoftFileLease | None:
    while True:
        try:
            return _take(handle, path)
        except BlockingIOError:
            time.sleep(_LOOK)


def _same(handle: int, path: Path) -> bool:
    """Whether what is open as `handle` still goes by the name `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _take(file: FileIO | int, path: Path, kind: int = fcntl.LOCK_EX) -> SoftFileLease | None:
    """Lock what is open as `file`; where the file system cannot, the lease that stands for it.

    Raises:
        BlockingIOError: another process holds it. OSError: neither can be had.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    else:
        return None
    from filelock import SoftFileLease, Timeout  # what never meets such a file system starts without it

    beside = path.with_name(f".{path.name.removeprefix('.')}{HOLDER}")
    ended = partial(_ended, path)
    lease = SoftFileLease(beside, timeout=0, lease_duration=_LEASE, thread_local=False, on_compromise=ended)
    before, until = None, time.monotonic() + 2 * _LEASE
    while True:
        try:
            lease.acquire()
        except Timeout as error:
            now, empty = _touched(beside)
            alive, over = time.time() - now < _LEASE, time.monotonic() > until
            if over and empty and not alive:  # it was killed before it had written who it is
                beside.unlink(missing_ok=True)
            elif over or (alive and now == before):
                raise BlockingIOError(errno.EWOULDBLOCK, "another process holds it") from error
            else:  # it may be one that only looks (`held`); or dead, which this very lease has to see
                time.sleep(_LOOK if now == before else _GLANCE)
                before = now
        else:
            return lease


def _touched(holder: Path) -> tuple[float, bool]:
    """When, in seconds since 1970 (0: it is gone), and whether nothing is in it."""
    try:
        told = holder.stat()
    except FileNotFoundError:
        return 0.0, True
    return told.st_mtime, not told.st_size


def _ended(path: Path, _: LeaseCompromise) -> None:
    """This process stood still for so long that another one may write there now: it must not."""
    _LOG.critical(
        f"Error: this process stood still for {_LEASE:.0f} s (stopped, or the file system hung), and another one has "
        f"taken its lock on {path}.\nThis one ends; what it had finished is kept."
    )
    os._exit(1)
