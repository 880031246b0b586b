"""Files that a kill, a full disk or a second process leaves whole: written aside, JSON by the line."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from mbcd_cli.checksums import PLACE, USER_BLOCK, stamp, verified
from mbcd_cli.errors import FileError

if TYPE_CHECKING:
    import h5py

_LAST = "\uffff"  # sorts after every name
_KEPT = 1 << 20  # bytes of one write that HDF5 may read again
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = {
    errno.EROFS: "the file system can only be read",
    errno.EACCES: "this user may not",
    errno.EPERM: "this user may not",
}
_HOST = re.sub(r"[^\w-]", "-", os.uname().nodename)
with suppress(OSError):  # containers may share their host's name, and each numbers its processes anew
    _HOST += f"-{Path('/proc/self/ns/pid').stat().st_ino:x}"
_AT_ONCE = 8
"""Files that wait for the disk at a time."""
_waiting: dict[Path, tuple[Path, dict[str, str]]] | None = None
"""Within `synced_at_once`: what lies where it was written -> its name, and `where` of `unwritable`."""
_tidied: set[Path] = set()
"""Folders in which this process has deleted what the dead left: a folder of 100,000 runs is looked through once."""


def unwritable(
    path: Path, error: OSError, *, place: str = "--output", then: str = "run the same command again"
) -> FileError:
    """The one answer to a full disk, a read-only file system and missing rights.

    Args:
        place, then: the flag that names another folder; what to do once there is room.
    """
    if error.errno in _FULL or "No space left" in str(error):
        return FileError(
            f"The disk is full: {path} cannot be written.",
            f"Free some space, or name another folder with {place}; then {then}.",
        )
    why = _FORBIDDEN.get(error.errno or 0) or (os.strerror(error.errno) if error.errno else error)
    return FileError(f"{path} cannot be written: {why}.", f"Name another folder with {place}, or mend this one.")


def make_folder(path: Path, *, place: str = "--output") -> None:
    """Make the folder of what long work will write at its end, and see before it that files can be written there.

    Raises:
        FileError: they cannot; `place` is the flag that names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise unwritable(path, error, place=place) from error


@contextmanager
def written(path: Path, *, lasting: bool = True, **where: str) -> Iterator[Path]:
    """Where to write a file that appears under its name only when it is complete and on disk.

    Until then `path` is what it was before; when the block raises nothing is left behind. Folders are made. What a
    kill leaves lies beside it as `.NAME.HOST.PID.partial`; that of processes of this machine that are gone is deleted
    when a process first writes into a folder. A file with a place for its checksum gets it (`checksums.stamp`).

    Args:
        lasting: whether it has to survive a power cut; what is written anew before it is read need not wait for that.
        where: `place` and `then` of `unwritable`.

    Raises:
        FileError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    waits = lasting and _waiting is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path.parent)
        if waits:
            _waiting.pop(aside, None)  # it is written over; the order is that of the last words
        yield aside
        stamp(aside, path.name)
        if waits:
            _waiting[aside] = path, where
            return
        if lasting:
            sync(aside)
        aside.replace(path)
        if lasting:
            sync(path.parent)
    except OSError as error:
        if not error.errno:
            raise
        raise unwritable(path, error, **where) from error
    finally:
        if not waits or aside not in _waiting:
            with suppress(OSError):  # the first error is the one to tell
                aside.unlink(missing_ok=True)


@contextmanager
def synced_at_once(folders: Sequence[Path]) -> Iterator[dict[Path, FileError]]:
    """Within the block nothing of `written` and `sync` waits for the disk: all files do together, at its end.

    A disk that is given several files at a time takes half as long (docs/performance.md). Files have their names when
    the block has ended, in the order in which they were written; until then what had a name before has it.

    Args:
        folders: all that is written lies in them. Of one in which a file does not get to the disk, those that follow it
            get no name either: they may speak of it.

    Yields:
        Filled at the end: such folders -> why.
    """
    global _waiting
    failed: dict[Path, FileError] = {}
    _waiting = waiting = {}
    try:
        yield failed
    finally:
        _waiting = None
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            named: dict[Path, tuple[Path, dict[str, str]]] = {}
            for (source, (path, where)), error in zip(waiting.items(), pool.map(_unsynced, waiting), strict=True):
                owner = next(folder for folder in folders if path.is_relative_to(folder))
                try:
                    if error is not None:
                        raise error
                    if source != path and owner not in failed:
                        source.replace(path)
                        named[path.parent] = owner, where
                except OSError as error:
                    failed.setdefault(owner, unwritable(path, error, **where))
                if source != path:
                    source.unlink(missing_ok=True)
            for (folder, (owner, where)), error in zip(named.items(), pool.map(_unsynced, named), strict=True):
                if error is not None:
                    failed.setdefault(owner, unwritable(folder, error, **where))


def _unsynced(path: Path) -> OSError | None:
    try:
        sync(path)
    except OSError as error:
        return error
    return None


def write_text(path: Path, text: str, *, lasting: bool = True, **where: str) -> Path:
    """`written`, for a text file; returns `path`."""
    with written(path, lasting=lasting, **where) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Mapping[str, Any], **where: str) -> Path:
    """`written`, for one JSON object, indented and with sorted keys, its checksum last; returns `path`."""
    text = json.dumps({**value, _LAST: PLACE}, indent=2, sort_keys=True, allow_nan=False)
    return write_text(path, text.replace(json.dumps(_LAST), '"checksum"') + "\n", **where)


def read_json(path: Path) -> dict[str, Any]:
    """The object that `write_json` wrote.

    Raises:
        OSError: it is missing. ValueError: damaged, or no JSON object.
    """
    verified(path)
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["checksum"]
    return value


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]], **where: str) -> Path:
    """`written`, for a table as CSV, names that are no UTF-8 spelled out; returns `path`."""
    how = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with written(path, **where) as aside, aside.open("w", **how) as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], **where: str) -> Path:
    """`write_table`, of rows that all have the first one's columns."""
    rest = iter(rows)
    first = next(rest, {})
    return write_table(path, list(first), ([*row.values()] for row in chain([first] if first else [], rest)), **where)


def rename(places: Mapping[Path, Path]) -> None:
    """Rename files or folders, `{from: to}`, in their order, and bring their new names to the disk."""
    for source, target in places.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    for folder in dict.fromkeys(target.parent for target in places.values()):
        sync(folder)


def give_place(aside: Path, place: Path, files: Sequence[Path | str], *, earlier: Iterable[Path] = ()) -> None:
    """Move `files` (relative) from `aside` to `place`, the last of which tells of the others, for those of `earlier`.

    The last one's earlier form goes first and it comes last, on the disk too: what is there always fits it, or there
    is none.
    """
    *others, last = files
    remove(place / last, *earlier)
    rename({aside / file: place / file for file in others})
    rename({aside / last: place / last})


def size_text(count: int) -> str:
    """Bytes in words: 1.2 GB, 340 MB, 12 kB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:.{1 if unit == 1e9 else 0}f} {name}"


def sync(path: Path, **where: str) -> None:
    """Bring a file, or the names in a folder, to the disk, so that a power cut does not undo them.

    Args:
        where: `place` and `then` of `unwritable`, for one that waits (`synced_at_once`).
    """
    if _waiting is not None:
        _waiting[path] = path, where
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """`sync`, of everything in a folder, `_AT_ONCE` files at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for error in pool.map(_unsynced, (*folder.rglob("*"), folder)):
            if error is not None:
                raise error


def remove(*paths: Path) -> None:
    """Delete files, whether or not they are there, and bring that to the disk.

    Raises:
        FileError: this user may not, or the disk can only be read.
    """
    for path in paths:
        try:
            if path.exists():
                path.unlink()
                sync(path.parent)
        except OSError as error:
            raise unwritable(path, error) from error


def clear(folder: Path, *, but: Collection[str] = ()) -> None:
    """Delete what a folder holds, but for what has one of these names; of a link to a folder the link."""
    for entry in folder.iterdir():
        if entry.name not in but:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`, or will hold it."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_partial(path: Path, of: str = "") -> bool:
    """Whether this is what a killed process left half written (of the file named `of`)."""
    return re.fullmatch(rf"\.{re.escape(of) or '.+'}\.[\w-]+\.\d+\.partial", path.name) is not None


def _of_the_dead(partial: Path) -> bool:
    """Whether this was left half written by a process of this machine that is gone."""
    _, host, pid, _ = partial.name.rsplit(".", 3)
    if host != _HOST:
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    with suppress(OSError):  # Linux: one that its parent, gone or busy, has not yet asked about has ended, too
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    return False


def remove_partial(folder: Path, *, of: str = "", ours: Callable[[Path], bool] = lambda path: True) -> None:
    """Delete what killed processes left half written in `folder`; only who holds the folder's lock may call this.

    Args:
        of: name of one file; all files' where empty.
        ours: which of them are this process' to delete.
    """
    for path in folder.glob(".*.partial"):
        if is_partial(path, of) and ours(path):
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Delete, once per process, what gone processes of this machine have left half written in `folder`."""
    if (folder := folder.absolute()) not in _tidied:
        _tidied.add(folder)
        remove_partial(folder, ours=_of_the_dead)


def delete(path: Path) -> None:
    """Delete a file of `written`, and what killed processes have left half written of it."""
    path.unlink(missing_ok=True)
    remove_partial(path.parent, of=path.name, ours=_of_the_dead)


def open_hdf5(path: Path, mode: str = "r", *, walk: bool = True, **options: object) -> h5py.File:
    """An HDF5 file, opened without HDF5's own lock, which fails where there are no locks.

    Nobody needs it: a file is written aside, by one process, and what has its name is complete and never changed.

    Args:
        walk: look whether everything that it names is in it, which takes ten times as long as opening it.

    Raises:
        OSError: it is missing or damaged, or what it is read for lies in another file.
    """
    import h5py  # what only locks or reads lines starts without it

    if mode == "r" and path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise OSError("it is no plain file")
    file = h5py.File(path, mode, locking=False, **options)
    if mode == "r" and walk:
        try:
            _check_inside(file)
        except BaseException:
            file.close()
            raise
    return file


def _check_inside(file: h5py.File) -> None:
    """Everything that a file names is in it: HDF5 follows links, virtual and external datasets without a word.

    Raises:
        OSError: something is not.
    """
    import h5py

    def fault(name: str, link: h5py.HardLink | h5py.SoftLink | h5py.ExternalLink) -> str | None:
        if not isinstance(link, h5py.HardLink):
            return f"{name} is a link to something else"
        values = file[name]
        outside = isinstance(values, h5py.Dataset) and (values.is_virtual or values.external)
        return f"{name} takes its values from another file" if outside else None

    found = file.visititems_links(fault)
    if found:
        raise OSError(found)


@contextmanager
def written_file(path: Path, **where: str) -> Iterator[BufferedWriter]:
    """`written`, for one open file: its first failure is what is told, whatever the library that writes makes of it."""
    with _remembered(path, **where) as raw, BufferedWriter(raw) as file:
        yield file


@contextmanager
def _remembered(path: Path, **where: str) -> Iterator[FileIO]:
    with written(path, **where) as aside, _Remembering(aside, "w+") as raw:
        try:
            yield raw
        finally:
            if raw.error is not None:
                raise raw.error


@contextmanager
def written_hdf5(path: Path, *, libver: str | None = None, **where: str) -> Iterator[h5py.File]:
    """`written`, for an HDF5 file that is open inside the block."""
    import h5py

    with (
        _remembered(path, **where) as raw,
        h5py.File(raw, "w", libver=libver, userblock_size=USER_BLOCK) as file,
    ):
        yield file


class _Remembering(FileIO):
    """A file whose first failure is kept, and told to nobody meanwhile.

    HDF5 drops errors on its way out of an object, prints others, and would leave a file with a hole in it; torch makes
    an error of its own of them, that does not say what the disk said. What HDF5 has written it may read again, and
    reading something else has ended in a fault of its memory: it is kept, but for long runs of rows, which it never
    looks at.
    """

    error: OSError | None = None

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._unwritten: list[tuple[int, bytes]] = []

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        at, done = self.tell(), 0
        while self.error is None and done < len(view):
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.error = error
        if 0 < len(view) - done <= _KEPT:
            self._unwritten.append((at + done, bytes(view[done:])))
        return len(view)

    def readinto(self, buffer: bytearray | memoryview) -> int:
        at, view = self.tell(), memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        if self.error is None:
            return count
        view[count:] = bytes(len(view) - count)
        for start, data in self._unwritten:
            first, last = max(start, at), min(start + len(data), at + len(view))
            if first < last:
                view[first - at : last - at] = data[first - start : last - start]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


def append_record(path: Path, record: Mapping[str, object], **where: str) -> None:
    """Add `record` to a .jsonl file, as one line, in place of a last one that was cut off.

    Raises:
        FileError: it cannot be written.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    try:
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
    except OSError as error:
        raise unwritable(path, error, **where) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, none where it is missing; a last line cut off by a kill is left out.

    Raises:
        FileError: another line is no JSON.
    """
    records = []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise FileError(f"{path}, line {number}: not JSON ({error}).", "Remove that line.") from error
        if isinstance(record, dict):
            records.append(record)
    return records


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"view": {"crop": 56}} -> {"view.crop": 56}; empty mappings leave nothing."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
