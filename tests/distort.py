"""Structured damage: one place of a tree, of an HDF5 file, of a table or of a container changed, and stamped again.

Checksums tell damage, not malice: where a file carries its own it is written anew, so that what is behind it is tried.
`draw` is hypothesis' (`data.draw`).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import pickletools
import shutil
import struct
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tomli_w
import torch
from hypothesis import strategies as st

from mbcd_cli import checksums

Draw = Callable[[st.SearchStrategy], Any]

NUMBERS = [0, 1, -1, 7, 2**31, -(2**63), 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
TEXTS = ["", "x", "../x", "/", "a\nb", "\x00", "\x1b[31m", "ü" * 300, "9" * 5000, "[bold]", "nan", "2024-01-01"]
NESTED = [[], {}, [[]], [0], {"a": {}}, [None], {"": 0}, [1, "a", {}], list(range(1000))]
ODD = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *NESTED])
DEEP = "[" * 100_000


def _places(tree: object, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in children:
        yield from _places(value, (*path, key))


def _tensor(draw: Draw, value: torch.Tensor) -> torch.Tensor:
    """Of another shape, type or with other values."""
    return draw(
        st.sampled_from(
            [
                value.reshape(-1)[:0],
                value.reshape(-1),
                value[None],
                value.double() if value.is_floating_point() else value.float(),
                value.to(torch.complex64),
                value.bool(),
                torch.full_like(value, float("nan")) if value.is_floating_point() else value - 10**6,
                torch.zeros(3),
                torch.tensor(1),
                value.to_sparse() if value.dim() else value,
            ]
        )
    )


def tree(draw: Draw, value: Any) -> Any:
    """The tree with one place gone, of another type, doubled, renamed or swapped with another."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return draw(ODD)
    # A depth first, so that long lists of figures do not hide the few keys above them.
    depth = draw(st.sampled_from(sorted({len(place) for place in places})))
    *above, key = draw(st.sampled_from([place for place in places if len(place) == depth]))
    holder, holders = value, [value]
    for step in above:
        holder = holder[step]
        holders.append(holder)
    if isinstance(holder, tuple):
        changed: Any = list(holder)
        parent = holders[-2] if len(holders) > 1 else None
        if not isinstance(parent, dict | list):
            return value
        parent[above[-1]] = holder = changed
    old = holder[key]
    what = draw(st.sampled_from(["odd", "gone", "renamed", "twice", "other", "within"]))
    if isinstance(old, torch.Tensor) and what in ("odd", "twice"):
        holder[key] = _tensor(draw, old)
    elif what == "gone":
        del holder[key]
    elif what == "renamed" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["x", "", f"{key}x", "a.b", "checksum"]))] = holder.pop(key)
    elif what == "twice" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
    elif what == "other":
        place = draw(st.sampled_from(places))
        try:
            found = value
            for step in place:
                found = found[step]
            holder[key] = copy.deepcopy(found)
        except (LookupError, TypeError):
            holder[key] = None
    elif what == "within":
        holder[key] = [old]
    else:
        holder[key] = draw(ODD)
    return value


# --- files of our own, stamped again -------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    """As `files.write_json` would, whatever it is."""
    text = json.dumps(value, indent=1)
    if isinstance(value, dict):
        text = json.dumps({**value, "checksum": checksums.PLACE}, indent=1)
    path.write_text(text)
    checksums.stamp(path)


def json_file(draw: Draw, path: Path) -> None:
    value = json.loads(path.read_text())
    value.pop("checksum", None)
    write_json(path, tree(draw, value))


def text_file(draw: Draw, path: Path) -> None:
    """One line of a text gone, doubled, cut, changed or of other characters."""
    lines = path.read_bytes().splitlines(keepends=True) or [b""]
    at = draw(st.integers(0, len(lines) - 1))
    line = lines[at]
    cut = draw(st.integers(0, len(line)))
    lines[at : at + 1] = draw(
        st.sampled_from(
            [
                [],
                [line, line],
                [line[:cut]],
                [line[:cut], b"\n", line[cut:]],
                [line[:cut], draw(st.sampled_from(TEXTS[:8])).encode(), line[cut:]],
                [line.replace(b",", b";")],
                [line.replace(b'"', b"")],
                [b"\xff\xfe", line],
                [line.rstrip(b"\r\n"), b"\r"],
                [line.rstrip(b"\r\n"), b",,,\n"],
                [b'"', line],
                [b"\n", line],
                [line[:cut], b"\x00", line[cut:]],
                [line[:cut], b"9" * 400, line[cut:]],
                [line[:cut], b"x" * 200_000, line[cut:]],
                [DEEP.encode(), b"\n"],
                lines[: at or 1],
            ]
        )
    )
    path.write_bytes(b"".join(lines))
    checksums.stamp(path)


def torch_file(draw: Draw, path: Path) -> None:
    torch.save(tree(draw, torch.load(path, weights_only=True)), path)
    checksums.stamp(path)


def _datasets(file: h5py.File) -> list[tuple[str, str | None]]:
    """(object, attribute or None) of everything in the file."""
    names = ["/"]
    file.visit(names.append)
    return [(name, None) for name in names[1:]] + [(name, key) for name in names for key in file[name].attrs]


def hdf5_file(draw: Draw, path: Path) -> None:
    aside = path.with_suffix(".aside")  # what was opened before may still be open
    shutil.copy(path, aside)
    with h5py.File(aside, "r+") as file:
        name, attribute = draw(st.sampled_from(sorted(_datasets(file), key=str)))
        if attribute is not None:
            _attribute(draw, file[name].attrs, attribute)
        elif isinstance(file[name], h5py.Group):
            what = draw(st.sampled_from(["gone", "array", "empty"]))
            del file[name]
            if what == "array":
                file[name] = np.arange(3)
            elif what == "empty":
                file.create_group(name)
        else:
            _dataset(draw, file, name)
    aside.replace(path)
    checksums.stamp(path)


def _attribute(draw: Draw, attributes: h5py.AttributeManager, key: str) -> None:
    old = attributes[key]
    if isinstance(old, str) and old[:1] in ("{", "[") and draw(st.booleans()):
        attributes[key] = json.dumps(tree(draw, json.loads(old)))
        return
    value = draw(st.sampled_from([None, "", "x", "{}", "[]", "null", DEEP[:60_000], 0, -1, 2.5, [1, 2], b"\xff", "٣"]))
    if value is None:
        del attributes[key]
    else:
        attributes[key] = np.void(value) if isinstance(value, bytes) else value


def _dataset(draw: Draw, file: h5py.File, name: str) -> None:
    old = file[name][()]
    text = file[name].dtype.kind in "OS"
    if text and file[name].shape == () and old[:1] == b"{" and draw(st.booleans()):
        value = json.loads(old)
        del file[name]
        file[name] = json.dumps(tree(draw, value))
        return
    values = np.asarray(old)
    kept = dict(file[name].attrs.items())
    numbers = np.zeros(values.shape) if text else values
    made = {
        "empty": lambda: values[:0] if values.ndim else values,
        "scalar": lambda: 3,
        "half": lambda: values[: len(values) // 2] if values.ndim else values,
        "twice": lambda: np.concatenate([values, values]) if values.ndim else values,
        "column": lambda: values[..., None],
        "float": lambda: numbers.astype(np.float64) + 0.5,
        "small": lambda: numbers.astype(np.int8),
        "text": lambda: ["x"] * (len(values) if values.ndim else 1),
        "bytes": lambda: np.full(values.shape, b"\xff", "S1"),
        "bool": lambda: numbers.astype(bool),
        "compound": lambda: np.zeros(values.shape, [("a", "i4"), ("b", "f8")]),
        "null": lambda: h5py.Empty("f4"),
        "large": lambda: np.full(values.shape, 2**40),
        "negative": lambda: np.full(values.shape, -(2**40)),
        "nan": lambda: np.full(values.shape, np.nan),
    }
    what = draw(st.sampled_from(["gone", "group", "link", "outside", "chunked", "virtual", *made]))
    del file[name]
    if what in made:
        file[name] = made[what]()
    elif what == "group":
        file.create_group(name)
    elif what == "link":
        file[name] = h5py.SoftLink(draw(st.sampled_from(["/nowhere", f"/{name}", "/"])))
    elif what == "outside":
        file[name] = h5py.ExternalLink("/etc/passwd", "/x")
    elif what == "chunked" and values.ndim and values.size and not text:
        file.create_dataset(name, data=values, chunks=True, compression="gzip")
    elif what == "virtual" and values.ndim and not text:
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[...] = h5py.VirtualSource("/etc/passwd", "x", values.shape)
        file.create_virtual_dataset(name, layout)
    if what in made or what == "group":
        for key, value in kept.items():
            file[name].attrs[key] = value


def toml_file(draw: Draw, path: Path) -> None:
    """A setting gone, renamed, of another type or value."""
    values = tree(draw, tomllib.loads(path.read_text()))
    with contextlib.suppress(TypeError, ValueError, AttributeError):  # TOML has no such value, and the file stays
        path.write_text(tomli_w.dumps(values) + f"\n# {checksums.PLACE}\n")
    checksums.stamp(path)


def pickle_file(draw: Draw, path: Path) -> None:
    """An opcode or a value of a pickle changed, gone, doubled; what it calls stays unknown to it."""
    data = bytearray(path.read_bytes())
    at = draw(st.sampled_from([place for _, _, place in pickletools.genops(bytes(data))]))
    size = draw(st.integers(1, 8))
    what = draw(st.sampled_from(["gone", "twice", "other", "cut", "deep"]))
    if what == "gone":
        del data[at : at + size]
    elif what == "twice":
        data[at:at] = data[at : at + size]
    elif what == "other":
        data[at] = draw(st.sampled_from(b"()]}.NKMJRcb0uast\x80\x81\x85\x86\x94\x8c\x95"))
    elif what == "cut":
        del data[at:]
    else:
        data[at:at] = b"(" * 10_000
    path.write_bytes(data)


def of_cache(damage: Callable[[Draw, Path], None]) -> Callable[[Draw, Path], None]:
    """The same damage to a file of a cache, whose index then tells the file's new checksum."""

    def damaged(draw: Draw, path: Path) -> None:
        damage(draw, path)
        index = path.parent / "index.h5"
        with h5py.File(index, "r+") as file:
            files = json.loads(file["files"].asstr()[()])
            files[path.name] = checksums.checksum(path)
            file["files"][()] = json.dumps(files)
        checksums.stamp(index)

    return damaged


# --- arrays --------------------------------------------------------------------------------------------------------


def npy_file(draw: Draw, path: Path) -> None:
    """Another header before the same values, or other values under the same one."""
    data = path.read_bytes()
    length = struct.unpack_from("<H", data, 8)[0]
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    fields = {
        "descr": ["'|O'", "'<f4'", "'<U9'", "'<M8[s]'", "'<c16'", "[('a', '<f4')]", "'|V8'", "5", "'<f999'", "'|b1'"],
        "fortran_order": ["True", "0", "None"],
        "shape": ["()", "(0,)", "(-1,)", "(10**9,)", "(99999999999,)", "(2, 3)", "(1, 1, 6)", "6", "('a',)", "(6.0,)"],
    }
    field = draw(st.sampled_from(sorted(fields)))
    start = header.index(f"'{field}': ") + len(field) + 4
    end = header.index(", '", start) if ", '" in header[start:] else header.index(", }", start)
    changed = header[:start] + draw(st.sampled_from(fields[field])) + header[end:]
    special = draw(st.sampled_from(["header", "length", "version", "magic", "body", "deep", "unclosed"]))
    if special == "deep":
        changed = "(" * 500 + changed
    elif special == "unclosed":
        changed = header[: draw(st.integers(0, len(header)))]
    size = draw(st.sampled_from([0, 1, len(changed) - 1, 65535])) if special == "length" else len(changed)
    head = bytearray(b"\x93NUMPY\x01\x00" + struct.pack("<H", size))
    if special == "version":
        head[6] = draw(st.sampled_from([0, 2, 3, 9, 255]))
    elif special == "magic":
        head[draw(st.integers(0, 5))] ^= 255
    elif special == "body":
        changed, body = header, body[: draw(st.integers(0, len(body)))] + draw(st.binary(max_size=30))
    path.write_bytes(bytes(head) + changed.encode("latin1") + body)


# --- containers of sound and pictures ------------------------------------------------------------------------------

_PARTS = {
    "mp4": ("ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf stbl stsd stts ctts stss stsc stsz stco mdat avc1 "
            "mp4v esds"),
    "riff": "RIFF fmt  data LIST fact avih strh strf idx1 movi 00dc INFO WAVE",
    "flac": "fLaC",
    "ogg": "OggS vorbis OpusHead",
    "mkv": "\x1a\x45\xdf\xa3 \x18\x53\x80\x67 \x15\x49\xa9\x66 \x16\x54\xae\x6b \x1f\x43\xb6\x75 \x1c\x53\xbb\x6b \xa3",
    "aiff": "FORM COMM SSND",
    "flv": "FLV onMetaData duration",
}  # fmt: skip
NAMES = sorted({name.encode("latin1") for text in _PARTS.values() for name in text.split(" ") if name})
_WORDS = [0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def media_file(draw: Draw, path: Path) -> None:
    """A field of the header set to an extreme, a part gone, doubled, moved or cut; Ogg pages get their sums again."""
    data = bytearray(path.read_bytes())
    if len(data) < 16:  # of an earlier damage
        return
    there = [(data.find(name, at), name) for name in NAMES for at in _all(data, name)]
    what = draw(st.sampled_from(["field", "field", "field", "gone", "twice", "cut", "zeros", "swap", "name", "head"]))
    if not there or what == "head":
        at = draw(st.integers(0, min(len(data) - 4, 200)))
    else:
        at = draw(st.sampled_from(sorted({place for place, _ in there})))
    size = draw(st.sampled_from([1, 2, 4, 8, 16, 64, 1000]))
    if what in ("field", "head"):
        place = at + draw(st.integers(-8, 48))
        width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["big", "little"]))
        place = min(max(place, 0), len(data) - width)
        value = draw(st.sampled_from(_WORDS)) & ((1 << 8 * width) - 1)
        data[place : place + width] = value.to_bytes(width, order)
    elif what == "gone":
        del data[at : at + size]
    elif what == "twice":
        data[at:at] = data[at : at + size]
    elif what == "cut":
        del data[at + draw(st.integers(0, 64)) :]
    elif what == "zeros":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif what == "name":
        data[at : at + 4] = draw(st.sampled_from([name for name in NAMES if len(name) == 4]))
    else:
        other = draw(st.integers(0, len(data) - 1))
        data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    path.write_bytes(_ogg_summed(data) if data[:4] == b"OggS" else data)


def _all(data: bytes, name: bytes) -> Iterator[int]:
    at = data.find(name)
    while at >= 0:
        yield at
        at = data.find(name, at + 1)


def _crc(data: bytes) -> int:
    """Of an Ogg page (RFC 3533, 6): polynomial 0x04c11db7, no reflection."""
    value = 0
    for byte in data:
        value = value << 8 & 0xFFFFFFFF ^ _TABLE[value >> 24 ^ byte]
    return value


def _entry(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


_TABLE = [_entry(byte) for byte in range(256)]


def _ogg_summed(data: bytearray) -> bytearray:
    """Every page with the sum of what it holds now."""
    starts = [*_all(data, b"OggS"), len(data)]
    for at, end in itertools.pairwise(starts):
        if end - at >= 27:
            data[at + 22 : at + 26] = bytes(4)
            data[at + 22 : at + 26] = struct.pack("<I", _crc(bytes(data[at:end])))
    return data
