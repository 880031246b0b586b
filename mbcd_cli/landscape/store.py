"""A grid of measured points on disk that a killed process leaves whole.

An HDF5 file torn while it is open for writing cannot be read again. So the file is only ever written aside
and renamed, every few seconds and at the end; in between each measured point is appended at once to a
journal beside it (`NAME.journal-RANK`, one text line with a checksum), which opening and reading fold in.

Layout: `x` [nx], `y` [ny] axes; `loss`, `accuracy` [ny, nx] float64, NaN where not computed; `computed`
[ny, nx] bool (a computed loss may itself be NaN or infinite); `points` [K, 4] every point ever computed (x,
y, loss, accuracy), also those of earlier, other grids; `marks` [J, 2] with the attribute `labels`;
attributes `format`, `identity` (JSON: what the values depend on) and `about` (JSON: titles, axis names,
summary figures).
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbcd_cli import checksums
from mbcd_cli.errors import FOREIGN, MbcdError
from mbcd_cli.files import flatten, open_hdf5, remove, remove_partial, written_hdf5
from mbcd_cli.locks import lock

if TYPE_CHECKING:
    import h5py

GRID_FORMAT = "mbcd-surface-1"
ARRAYS_FORMAT = "mbcd-arrays-1"
_DIGITS = 12
"""Coordinates that agree to this many significant digits are the same point."""


class StoreError(MbcdError):
    """A landscape file is damaged, in use, or belongs to something else."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What a file holds; arrays as in the module's docstring."""

    path: Path
    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    computed: np.ndarray
    points: np.ndarray
    identity: dict[str, Any]
    about: dict[str, Any]
    marks: np.ndarray
    mark_labels: tuple[str, ...]

    @property
    def missing(self) -> int:
        """Grid points that are not computed yet."""
        return int((~self.computed).sum())

    @property
    def non_finite(self) -> int:
        """Computed grid points whose loss is NaN or infinite."""
        return int((self.computed & ~np.isfinite(self.loss)).sum())


def axis(span: float, points: int) -> np.ndarray:
    """`points` equidistant coordinates from -span to span [points]; symmetric, with an exact 0 when odd.

    Coordinates shared by a coarser and a finer axis are bit for bit the same.
    """
    return np.array([(2 * i - (points - 1)) / (points - 1) * span for i in range(points)])


def _key(x: float, y: float) -> tuple[float, float]:
    return float(f"{x:.{_DIGITS}g}") + 0.0, float(f"{y:.{_DIGITS}g}") + 0.0


def _journals(path: Path) -> list[Path]:
    prefix = f"{path.name}.journal-"
    return sorted(p for p in path.parent.glob("*.journal-*") if p.name.startswith(prefix))


def _line(text: str) -> bytes:
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _replay(path: Path, identity: Mapping[str, object]) -> list[tuple[float, float, float, float]]:
    """The journal's whole records; a torn last line is dropped."""
    points = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        text, _, check = line.decode(errors="replace").rpartition(" ")
        if _line(text) != line + b"\n" or not check:
            break
        try:
            if number == 0:
                _same_identity(path, json.loads(text), identity)
                continue
            x, y, loss, accuracy = (float.fromhex(part) for part in text.split())
        except FOREIGN as error:
            raise _damaged(path, error) from error
        points.append((x, y, loss, accuracy))
    return points


def _same_identity(path: Path, stored: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Refuse a file that belongs to something else, naming what differs."""
    old, new = flatten(stored), flatten(json.loads(json.dumps(wanted)))
    different = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    if different:
        lines = [f"  {key}: {old.get(key)!r} in the file, {new.get(key)!r} now" for key in different]
        raise StoreError(
            f"{path} was measured on something else:\n" + "\n".join(lines),
            "Choose another --output, or remove the file (or pass --overwrite) to measure anew.",
        )


def _damaged(path: Path, why: object) -> StoreError:
    return StoreError(f"{path} is not a readable landscape file ({why}).", "Remove it and measure anew.")


def _load(path: Path) -> Grid:
    try:
        checksums.verified(path)
        with open_hdf5(path) as file:
            _check_format(file, GRID_FORMAT)
            marks = file["marks"]
            grid = Grid(
                path=path,
                x=file["x"][()],
                y=file["y"][()],
                loss=file["loss"][()],
                accuracy=file["accuracy"][()],
                computed=file["computed"][()],
                points=file["points"][()],
                identity=json.loads(file.attrs["identity"]),
                about=json.loads(file.attrs["about"]),
                marks=marks[()],
                mark_labels=tuple(json.loads(marks.attrs["labels"])),
            )
        _check(grid)
    except (OSError, *FOREIGN) as error:
        raise _damaged(path, error) from error
    return grid


def _check_format(file: h5py.File, wanted: str) -> None:
    name = file.attrs.get("format")
    if not isinstance(name, str) or name != wanted:
        raise ValueError(f"its format is {str(name)[:40]!r}, not {wanted!r}")


def _check(grid: Grid) -> None:
    """Refuse arrays that do not fit together.

    Raises:
        ValueError: they do not.
    """
    table = (len(grid.y), len(grid.x))
    shapes = {
        "x": table[1:],
        "y": table[:1],
        "loss": table,
        "accuracy": table,
        "computed": table,
        "points": (len(grid.points), 4),
        "marks": (len(grid.mark_labels), 2),
    }
    for name, shape in shapes.items():
        values = getattr(grid, name)
        kind = "b" if name == "computed" else "f"
        if not isinstance(values, np.ndarray) or values.dtype.kind != kind or values.shape != shape:
            raise ValueError(f"its {name} is no array {list(shape)} of {'truth values' if kind == 'b' else 'floats'}")
    if not (np.isfinite(grid.x).all() and np.isfinite(grid.y).all() and np.isfinite(grid.marks).all()):
        raise ValueError("its axes or marks are not finite")
    if not (isinstance(grid.identity, dict) and isinstance(grid.about, dict)):
        raise ValueError("what it was measured on is not told")
    if not all(isinstance(label, str) for label in grid.mark_labels):
        raise ValueError("its labels are no texts")


def _arrange(
    x: np.ndarray, y: np.ndarray, points: Mapping[tuple[float, float], tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points by coordinates -> (loss, accuracy, computed) on the grid, each [ny, nx]."""
    loss, accuracy = np.full((len(y), len(x)), np.nan), np.full((len(y), len(x)), np.nan)
    computed = np.zeros(loss.shape, dtype=bool)
    for row, b in enumerate(y):
        for column, a in enumerate(x):
            value = points.get(_key(a, b))
            if value is not None:
                loss[row, column], accuracy[row, column] = value
                computed[row, column] = True
    return loss, accuracy, computed


def read_grid(path: Path) -> Grid:
    """The file with its journals, whether or not a process still fills it.

    Raises:
        StoreError: the file is missing, damaged or not a landscape file.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"There is no landscape file {path}.", "Run `mbcd landscape` without --plot-only first.")
    grid = _load(path)
    late = [point for journal in _journals(path) for point in _replay(journal, grid.identity)]
    if not late:
        return grid
    points = _by_key([*map(tuple, grid.points), *late])
    loss, accuracy, computed = _arrange(grid.x, grid.y, points)
    return replace(grid, loss=loss, accuracy=accuracy, computed=computed, points=_table(points))


def _by_key(
    rows: Sequence[tuple[float, float, float, float]],
) -> dict[tuple[float, float], tuple[float, float]]:
    return {_key(x, y): (float(loss), float(accuracy)) for x, y, loss, accuracy in rows}


def _table(points: Mapping[tuple[float, float], tuple[float, float]]) -> np.ndarray:
    return np.array([(*key, *value) for key, value in points.items()], dtype=float).reshape(-1, 4)


class GridStore:
    """Opens or creates a grid file and records points into it; use as a context manager.

    Args:
        path: the HDF5 file.
        x, y: axes [nx], [ny]; an existing file is rearranged onto them, keeping every point it ever held.
        identity: what the values depend on (JSON-able); an existing file with another one is refused.
        about: titles, axis names and summary figures for plots (JSON-able).
        marks: label -> (x, y) of places to mark.
        rank: number of this process among those that share the grid; rank 0 owns the file, the others only
            append to their journals. Rank 0 must have opened it before the others do.
        overwrite: start anew instead of resuming.
        fold_seconds: the file is brought up to date this often.

    Raises:
        StoreError: damaged, of another identity, or being filled by another process.
        FileError: the folder cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        *,
        x: Sequence[float] | np.ndarray,
        y: Sequence[float] | np.ndarray = (0.0,),
        identity: Mapping[str, object],
        about: Mapping[str, object] | None = None,
        marks: Mapping[str, tuple[float, float]] | None = None,
        rank: int = 0,
        overwrite: bool = False,
        fold_seconds: float = 10.0,
    ) -> None:
        self.path = Path(path)
        self.x, self.y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        self.about, self.marks = dict(about or {}), dict(marks or {})
        self._identity = json.loads(json.dumps(identity))
        self._rank, self._fold_seconds = rank, fold_seconds
        self._points: dict[tuple[float, float], tuple[float, float]] = {}
        self._journal_path = self.path.with_name(f"{self.path.name}.journal-{rank}")
        existing = self.path.exists() and (rank > 0 or not overwrite)
        if existing:
            _same_identity(self.path, _load(self.path).identity, self._identity)
        journal = lock(self._journal_path)
        if journal is None:
            raise StoreError(
                f"{self.path} is being filled by another process.", "Wait for it, or choose another --output."
            )
        self._journal = journal
        try:
            if existing:
                self._points = _by_key(list(map(tuple, read_grid(self.path).points)))
            elif rank == 0:
                # Without their file (removed, or to be overwritten) journals mean nothing.
                remove(*self._other_journals())
            self._last_fold = time.monotonic()
            if rank == 0:
                remove_partial(self.path.parent, of=self.path.name)
                self.fold(ranks=existing)
            else:
                self._reset_journal()
        except BaseException:
            self._journal.close()
            raise

    def _other_journals(self) -> list[Path]:
        return [path for path in _journals(self.path) if path != self._journal_path]

    def __enter__(self) -> GridStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def missing(self) -> np.ndarray:
        """Grid points not computed yet: [K, 2] of (row, column), row by row."""
        todo = [
            (row, column)
            for row, b in enumerate(self.y)
            for column, a in enumerate(self.x)
            if _key(a, b) not in self._points
        ]
        return np.array(todo, dtype=np.int64).reshape(-1, 2)

    def record(self, row: int, column: int, loss: float, accuracy: float) -> None:
        """One measured point; once this returns, killing the process does not lose it."""
        x, y = float(self.x[column]), float(self.y[row])
        loss, accuracy = float(loss), float(accuracy)
        self._points[_key(x, y)] = (loss, accuracy)
        self._journal.write(_line(" ".join(v.hex() for v in (x, y, loss, accuracy))))
        if self._rank == 0 and time.monotonic() - self._last_fold > self._fold_seconds:
            self.fold()

    def fold(self, *, ranks: bool = False) -> None:
        """Bring the file up to date and empty the journal; `ranks` folds the other processes' journals too.

        The rename comes before the journal is emptied: a kill in between folds the same points twice, which
        is harmless.
        """
        others = self._other_journals() if ranks else []
        for journal in others:
            self._points.update(_by_key(_replay(journal, self._identity)))
        loss, accuracy, computed = _arrange(self.x, self.y, self._points)
        with written_hdf5(self.path) as file:
            file.attrs["format"] = GRID_FORMAT
            file.attrs["identity"] = json.dumps(self._identity, sort_keys=True)
            file.attrs["about"] = json.dumps(self.about, sort_keys=True)
            arrays = {"x": self.x, "y": self.y, "loss": loss, "accuracy": accuracy, "computed": computed}
            for name, array in {**arrays, "points": _table(self._points)}.items():
                file[name] = array
            file["marks"] = np.array(list(self.marks.values()), dtype=float).reshape(-1, 2)
            file["marks"].attrs["labels"] = json.dumps(list(self.marks))
        remove(*others)
        self._reset_journal()
        self._last_fold = time.monotonic()

    def _reset_journal(self) -> None:
        self._journal.truncate(0)
        self._journal.write(_line(json.dumps(self._identity, sort_keys=True)))

    def close(self) -> None:
        """Fold (rank 0) and remove the journal; other ranks leave theirs for rank 0 to fold."""
        if self._journal.closed:
            return
        try:
            if self._rank == 0:
                self.fold()
                remove(self._journal_path)
        finally:
            self._journal.close()


def save_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], *, identity: Mapping[str, object], about: Mapping[str, object]
) -> Path:
    """Write one finished analysis to `path`, whole or not at all: name -> array [...]; the rest is JSON-able.

    Raises:
        FileError: it cannot be written.
    """
    with written_hdf5(path) as file:
        file.attrs["format"] = ARRAYS_FORMAT
        file.attrs["identity"] = json.dumps(identity, sort_keys=True)
        file.attrs["about"] = json.dumps(about, sort_keys=True)
        for name, array in arrays.items():
            file[name] = array
    return path


def load_arrays(
    path: Path, *, identity: Mapping[str, object] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(name -> array [...], about) of a file of `save_arrays`; with `identity`, one of something else is refused.

    Raises:
        StoreError: damaged, or of another identity.
    """
    try:
        checksums.verified(path)
        with open_hdf5(path) as file:
            _check_format(file, ARRAYS_FORMAT)
            if identity is not None:
                _same_identity(path, json.loads(file.attrs["identity"]), identity)
            return {name: file[name][()] for name in file}, json.loads(file.attrs["about"])
    except (OSError, *FOREIGN) as error:
        raise _damaged(path, error) from error
