"""Split tables: CSV with a header, and pickled pandas frames read without pandas and without running anything.

A pickle is a program. `read_pickled_frame` runs it on an unpickler that knows only inert stand-ins for the few names
a frame of numbers and strings needs: they keep what they are given, and what that means is read off them afterwards.
Any other name ends the reading before anything is called.

Letters: N rows.
"""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np

from mbcd_cli.errors import ManifestError

Columns = dict[str, list[object]]
"""Column name -> values, N each."""

_LARGEST = 256 * 2**20
_USE_CSV = "Get the table again from its publisher, or put the same table beside it as CSV with a header."


def read_table(path: Path) -> Columns:
    """A split table by its suffix: .csv, or .pkl.

    Raises:
        ManifestError: it cannot be read, or is a pickle of something else than a plain frame.
    """
    return read_csv(path) if path.suffix.lower() == ".csv" else read_pickled_frame(path)


def read_csv(path: Path) -> Columns:
    """A CSV table with a header: column -> strings.

    Raises:
        ManifestError: it cannot be read, is not UTF-8, or has rows of another length than its header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream, strict=True) if any(cell.strip() for cell in row)]
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}).", "Check its permissions.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: not a UTF-8 CSV table ({error}).", "Save it as UTF-8 CSV.") from None
    if not rows:
        raise ManifestError(f"{path}: the table is empty.", _USE_CSV)
    header, *body = rows
    bad = [n for n, row in enumerate(body, start=2) if len(row) != len(header)]
    if bad:
        listed = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise ManifestError(f"{path}: rows {listed} do not have the header's {len(header)} cells.", "Mend them.")
    return {name.strip(): [row[i].strip() for row in body] for i, name in enumerate(header)}


# --- pickled frames ------------------------------------------------------------------------------------------------


class _Inert:
    """Stands for an object that a frame needs, and does nothing.

    Attributes:
        given: what it was made with. state: what it was then told to hold.
    """

    def __new__(cls, *given: object, **_: object) -> _Inert:
        made = super().__new__(cls)
        made.given, made.state = given, None
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Array(_Inert):
    """numpy.ndarray: numbers of a few types, or plain Python objects."""

    @property
    def values(self) -> np.ndarray:
        _, shape, dtype, fortran, content = self.state
        if isinstance(content, list):
            flat = np.empty(len(content), object)
            flat[:] = content
        else:
            flat = np.frombuffer(content, _number_type(dtype))
        return flat.reshape(shape, order="F" if fortran else "C")


class _Buffer(_Array):
    """The same, as protocol 5 has it."""

    @property
    def values(self) -> np.ndarray:
        content, dtype, shape, order = self.given[:4]
        return np.frombuffer(bytes(content), _number_type(dtype)).reshape(shape, order=order)


class _Strings(_Array):
    """pandas' arrays of strings wrap an array of objects."""

    @property
    def values(self) -> np.ndarray:
        held = self.given[-1] if self.state is None else self.state
        (wrapped,) = (part for part in held if isinstance(part, _Array))
        return wrapped.values


class _Frame(_Inert):
    pass


_STAND_INS: dict[type, tuple[str, ...]] = {
    _Array: ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    _Buffer: ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    _Strings: ("pandas._libs.arrays.__pyx_unpickle_NDArrayBacked",),
    _Frame: ("pandas.DataFrame", "pandas.core.frame.DataFrame"),
    _Inert: (
        *("numpy.ndarray", "numpy.dtype"),
        "pandas.core.internals.managers.BlockManager",
        *("pandas.core.internals.blocks.new_block", "pandas._libs.internals._unpickle_block"),
        *("pandas.core.indexes.base._new_Index", "pandas.core.indexes.base.Index", "pandas.Index"),
        *("pandas.core.indexes.numeric.Int64Index", "pandas.core.indexes.range.RangeIndex", "pandas.RangeIndex"),
        *(f"pandas.{place}.String{what}" for place in ("arrays", "core.arrays.string_") for what in ("Array", "Dtype")),
        "pandas.StringDtype",
    ),
    slice: ("builtins.slice",),
}
_ALLOWED = {name: stand_in for stand_in, names in _STAND_INS.items() for name in names}


class _ForeignNameError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if f"{module}.{name}" not in _ALLOWED:
            raise _ForeignNameError(f"{module}.{name}")
        return _ALLOWED[f"{module}.{name}"]

    def persistent_load(self, pid: object) -> object:
        raise _ForeignNameError(f"a persistent id ({pid})")


def _number_type(dtype: _Inert) -> np.dtype:
    """Of a numpy.dtype: made with its name, told its byte order."""
    name, order = str(dtype.given[0]).lstrip("<>|="), dtype.state[1] if dtype.state else "<"
    if name not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "b1"):
        raise ValueError(f"columns of type {name!r}")
    return np.dtype((order if order in "<>" else "=") + name)


def _flat(held: object) -> list[object]:
    return held.values.ravel().tolist() if isinstance(held, _Array) else list(held)


def _columns(frame: object) -> Columns:
    """What a frame's blocks of equally typed columns hold."""
    if not isinstance(frame, _Frame):
        raise ValueError(f"a pickled {type(frame).__name__.strip('_').lower()}, no frame")
    manager = frame.state.get("_mgr", frame.state.get("_data"))
    if manager.state is None:
        blocks, axes = [block.given[:2] for block in manager.given[0]], manager.given[1]
    else:
        state = manager.state[3]["0.14.1"]
        blocks, axes = [(block["values"], block["mgr_locs"]) for block in state["blocks"]], state["axes"]
    header, index = (axis.given[1] for axis in axes)
    names = [str(name) for name in _flat(header["data"])]
    columns: dict[int, list[object]] = {}
    for array, placement in blocks:
        at = range(*placement.indices(len(names))) if isinstance(placement, slice) else map(int, _flat(placement))
        places = list(at)
        rows = array.values.reshape(len(places), -1)
        columns.update({place: row.tolist() for place, row in zip(places, rows, strict=True)})
    table = {name: columns[place] for place, name in enumerate(names)}
    if index.get("name") is not None and index.get("data") is not None:
        table.setdefault(str(index["name"]), _flat(index["data"]))
    if len({len(column) for column in table.values()}) > 1:
        raise ValueError("columns of different lengths")
    return table


def read_pickled_frame(path: Path) -> Columns:
    """A pickled pandas frame of numbers and strings: column -> values (a named index becomes a column).

    Frames written by pandas 0.2x to 3.x are read; nothing but stand-ins of this module is ever called.

    Raises:
        ManifestError: it cannot be read, asks for any other name, or is no such frame.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ManifestError(f"{path}: too large for a split table ({path.stat().st_size / 1e6:.0f} MB).", _USE_CSV)
        with path.open("rb") as stream:
            return _columns(_Unpickler(stream).load())
    except _ForeignNameError as error:
        raise ManifestError(
            f"{path}: the pickle asks for {error}, which no split table needs; nothing of it was executed.", _USE_CSV
        ) from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}).", "Check its permissions.") from None
    except ManifestError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way inside the unpickler
        raise ManifestError(f"{path}: no pickled table that can be read ({error}).", _USE_CSV) from None
