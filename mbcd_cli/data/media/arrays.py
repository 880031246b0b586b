"""Plain tensors (.npy): one file a clip, or one row of a packed file of many clips.

Letters: N rows, T steps, D values.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np

from mbcd_cli.data.media.checks import REPLACE, Notes, check_present
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError

_HEADER = 1024  # bytes; numpy's own headers of plain arrays take 128


def read_array(media: Media, notes: Notes = None, *, whole: bool = False) -> np.ndarray:
    """A plain tensor, [D] or [T, D], as float32 (int32 where it is `whole`).

    Args:
        media: the file, or the row of a packed one ([N, D] or [N, T, D]); other spans are not applied.
        notes: told of whole numbers that float32 cannot hold, if given.
        whole: only whole numbers that int32 holds are taken.

    Raises:
        MediaError: missing, empty, not a .npy of numbers, of another shape, or with values that are not finite.
    """
    array = load_npy(media.path) if media.unit != "row" else _row(media)
    if array.dtype.kind not in "fiub":
        raise MediaError(media.source, f"it holds {array.dtype} where real numbers are expected", REPLACE)
    if array.ndim not in (1, 2):
        raise MediaError(
            media.source, f"shape {array.shape} where [D] or [T, D] is expected", "Store one clip per file."
        )
    if array.size == 0:
        raise MediaError(media.source, f"it holds no values (shape {array.shape})", REPLACE)
    if whole:
        values = array.astype(np.int32) if array.dtype.kind in "iub" else np.empty(0)
        if not np.array_equal(values, array):
            raise MediaError(media.source, f"it holds {array.dtype} where whole numbers (int32) are expected", REPLACE)
        return values
    with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite, and is reported below
        values = np.asarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise MediaError(media.source, f"{bad} of {values.size} values are not finite (NaN or infinity)", REPLACE)
    if notes is not None and array.dtype.kind in "iu" and (values != array).any():
        notes.append(f"{media.source}: whole numbers over 16777216 are rounded to float32's steps")
    return values


def _row(media: Media) -> np.ndarray:
    """The row of a packed array that is a clip, still in its file.

    Raises:
        MediaError: the file cannot be used, or has no such row.
    """
    try:
        status = media.path.stat()
        packed = _packed(media.path, status.st_mtime_ns, status.st_size)
    except OSError:
        packed = load_npy(media.path)  # which says why
    row = int(media.start or 0)
    if packed.ndim not in (2, 3):
        raise MediaError(
            media.path,
            f"shape {list(packed.shape)} where a packed array, [N, D] or [N, T, D], is expected",
            "Name the file without #ROW where it holds one clip.",
        )
    if row >= len(packed):
        raise MediaError(
            media.source, f"the file has {len(packed)} rows, counted from 0", "Correct the row, or the file."
        )
    return packed[row]


@lru_cache(maxsize=64)
def _packed(path: Path, mtime: int, size: int) -> np.ndarray:
    """A packed array's map, kept for its other rows: opened for each, 2,000 rows take 29 times as long."""
    return np.asarray(load_npy(path))  # numpy.memmap makes an object of its own for every row: 8 times as long


def clip_shape(media: Media) -> tuple[int, ...] | None:
    """`stored_shape` of a clip: of a packed array, that of a row."""
    shape = stored_shape(media.path)
    return shape[1:] if shape is not None and media.unit == "row" else shape


def stored_shape(path: Path) -> tuple[int, ...] | None:
    """The shape that a .npy file's header states; None where it cannot be told. No values are read.

    numpy.load takes 11 times as long; so would this, 4 times, if headers that are alike were parsed again.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER)
        ends = 10 + int.from_bytes(head[8:10], "little") if head[6:7] == b"\1" else _HEADER
        return _shape(head[:ends])
    except Exception:  # a damaged header makes numpy's parser raise almost anything
        return None


@lru_cache(maxsize=4096)
def _shape(header: bytes) -> tuple[int, ...]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]


def load_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, of whatever shape and type, mapped: no values are read.

    Raises:
        MediaError: missing, empty, not a .npy, cut short, pickled objects, or an archive of several.
    """
    check_present(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy's parser raise almost anything
        text = str(error)
        if "allow_pickle" in text or "Python objects" in text:
            raise MediaError(path, "it holds pickled Python objects, which are never loaded", REPLACE) from None
        raise MediaError(path, "not a readable .npy file, or cut short", REPLACE) from None
    if not isinstance(array, np.ndarray):  # an .npz archive
        raise MediaError(path, "an archive where a single array (.npy) is expected", "Store one .npy per clip.")
    return array
