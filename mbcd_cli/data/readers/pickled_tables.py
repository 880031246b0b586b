"""Split tables: CSV with a header, and pickled pandas frames read without pandas and without running anything.

A pickle is a program. `read_pickled_frame` runs it on an unpickler that knows only inert stand-ins for the few names
a frame of numbers and strings needs; any other name ends the reading before anything is called.
"""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mbcd_cli.errors import ManifestError

Columns = dict[str, list[Any]]
"""Column name -> values, all of one length."""

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


class _Dtype:
    """Stand-in for numpy.dtype: only its name and byte order are kept."""

    def __init__(self, name: str = "O", *_: object) -> None:
        self.name = str(name).lstrip("<>|=")
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">", "|") else "<"

    def numbers(self) -> np.dtype:
        if self.name not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "b1"):
            raise ValueError(f"columns of type {self.name!r}")
        return np.dtype(self.order.replace("|", "=") + self.name)


class _Array:
    """Stand-in for numpy.ndarray: numbers of a few types, or plain Python objects."""

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0, object)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):
            flat = np.empty(len(data), object)
            flat[:] = data
        else:
            flat = np.frombuffer(data, dtype.numbers())
        self.values = flat.reshape(shape, order="F" if fortran else "C")


def _frombuffer(data: Any, dtype: _Dtype, shape: tuple, order: str = "C", *_: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


class _Index:
    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        held = (data or {}).get("data")
        self.name = (data or {}).get("name")
        self.labels = _flat(held) if held is not None else []


def _new_index(_: object, data: Mapping[str, Any]) -> _Index:
    return _Index(data)


class _Backed:
    """Stand-in for pandas' string arrays: they wrap an array of objects."""

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0, object)

    def __setstate__(self, state: Any) -> None:
        found = [part for part in state if isinstance(part, _Array)] if isinstance(state, tuple) else []
        if len(found) != 1:
            raise ValueError("a string array of an unknown make")
        self.values = found[0].values


def _unpickle_backed(*args: object) -> _Backed:
    backed = _Backed()
    if args and isinstance(args[-1], tuple):
        backed.__setstate__(args[-1])
    return backed


class _Manager:
    """Stand-in for pandas' BlockManager: axes, and blocks of equally typed columns."""

    def __init__(self, blocks: Any = (), axes: Any = ()) -> None:
        self.blocks, self.axes = list(blocks), list(axes)

    def __setstate__(self, state: tuple) -> None:
        held = state[3]["0.14.1"]
        self.axes = list(held["axes"])
        self.blocks = [(block["values"], block["mgr_locs"]) for block in held["blocks"]]


def _block(values: Any, placement: Any, *_: object, **__: object) -> tuple[Any, Any]:
    return values, placement


class _Frame:
    def __init__(self) -> None:
        self.manager: Any = None

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.manager = state.get("_mgr", state.get("_data"))


class _Nothing:
    """Stand-in for types that carry no values of their own (string dtypes, index classes)."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _multiarray(module: str) -> dict[tuple[str, str], Callable]:
    return {
        (f"numpy.{module}.multiarray", "_reconstruct"): _Array,
        (f"numpy.{module}.numeric", "_frombuffer"): _frombuffer,
    }


_ALLOWED: dict[tuple[str, str], Callable] = {
    **_multiarray("core"),
    **_multiarray("_core"),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("builtins", "slice"): slice,
    ("pandas", "DataFrame"): _Frame,
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas.core.internals.blocks", "new_block"): _block,
    ("pandas._libs.internals", "_unpickle_block"): _block,
    ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"): _unpickle_backed,
    ("pandas.arrays", "StringArray"): _Nothing,
    ("pandas.core.arrays.string_", "StringArray"): _Nothing,
    ("pandas", "StringDtype"): _Nothing,
    ("pandas.core.arrays.string_", "StringDtype"): _Nothing,
    ("pandas.core.indexes.base", "_new_Index"): _new_index,
    ("pandas.core.indexes.base", "Index"): _Nothing,
    ("pandas.core.indexes.numeric", "Int64Index"): _Nothing,
    ("pandas", "Index"): _Nothing,
    ("pandas", "RangeIndex"): _Nothing,
    ("pandas.core.indexes.range", "RangeIndex"): _Nothing,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise _ForeignNameError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: object) -> Any:
        raise _ForeignNameError(f"a persistent id ({pid})")


class _ForeignNameError(Exception):
    pass


def _flat(held: Any) -> list[Any]:
    return held.values.ravel().tolist() if isinstance(held, _Array | _Backed) else list(held)


def _columns(manager: _Manager) -> Columns:
    names = [str(name) for name in manager.axes[0].labels]
    found: dict[int, list[Any]] = {}
    for values, placement in manager.blocks:
        if isinstance(placement, slice):
            places = list(range(*placement.indices(len(names))))
        else:
            places = [int(place) for place in _flat(placement)]
        rows = values.values.reshape(len(places), -1)
        found.update({place: row.tolist() for place, row in zip(places, rows, strict=True)})
    table = {name: found[place] for place, name in enumerate(names)}
    index = manager.axes[1]
    if index.name is not None and index.labels:
        table.setdefault(str(index.name), index.labels)
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
            frame = _Unpickler(stream).load()
        if not isinstance(frame, _Frame) or not isinstance(frame.manager, _Manager):
            raise ValueError(f"a pickled {type(frame).__name__.strip('_').lower()}, no frame")
        return _columns(frame.manager)
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
