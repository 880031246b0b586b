"""The clips of a dataset as columns: a million of them are some hundred megabytes, and objects only where asked for.

Letters: N clips.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from mbcd_cli.data.records import SPLITS, Clip, Media

AnyItem = TypeVar("AnyItem")
AT_ONCE = 1024
"""Clips that are looked at together where each makes objects: so few that Python collects no garbage in between."""
_FIELDS = tuple(field.name for field in fields(Media))
_FILES = tuple(_FIELDS.index(name) for name in ("path", "path_v", "clock"))
_OTHERS = tuple(at for at in range(len(_FIELDS)) if at not in _FILES)
_DEFAULTS = tuple(field.default for field in fields(Media))
_NO_SPAN = (np.nan, np.nan)


def chunks(items: Iterable[AnyItem]) -> Iterator[list[AnyItem]]:
    """Runs of at most `AT_ONCE` items."""
    source = iter(items)
    while chunk := list(islice(source, AT_ONCE)):
        yield chunk


class Digest:
    """SHA-256 of what `json.dumps` makes of a list, which is never held as one text.

    Args:
        begin: what stands before the first item.
    """

    def __init__(self, begin: str = "[") -> None:
        self._hash, self._separator = hashlib.sha256(begin.encode()), ""

    def add(self, items: Sequence[object]) -> None:
        """Further items, one at least."""
        self._hash.update((self._separator + json.dumps(items)[1:-1]).encode())
        self._separator = ", "

    def hexdigest(self, end: str = "]") -> str:
        """Of all items, with `end` behind the last."""
        whole = self._hash.copy()
        whole.update(end.encode())
        return whole.hexdigest()


class Texts(Sequence[str]):
    """Many short texts in one buffer: 8 bytes each beside their own, where a `str` takes 50."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._buffer, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """One more; names of files may hold bytes that are no UTF-8."""
        self._buffer += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._buffer[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends):
            yield self._buffer[start:end].decode("utf-8", "surrogatepass")


class MediaColumn(Sequence[Media]):
    """One modality's media of many clips: a line of text each, folders apart.

    Attributes:
        absent: clips that have none. packed: clips that are rows of packed arrays.
    """

    def __init__(self, media: Iterable[Media] = ()) -> None:
        self._lines = Texts()
        self._folders: list[Path] = []
        self._numbers: dict[str, int] = {}
        self.absent = self.packed = 0
        # A packed array is named by many clips.
        self._apart, self._path = lru_cache(maxsize=256)(self._split), lru_cache(maxsize=256)(self._joined)
        for item in media:
            self.append(item)

    def append(self, media: Media | None) -> None:
        """Of one more clip; None where it has none."""
        if media is None:
            self._lines.append("")
            self.absent += 1
            return
        self.packed += media.unit == "row"
        values = [getattr(media, name) for name in _FIELDS]
        for at in _FILES:
            if values[at] is not None:
                values[at] = self._apart(values[at])
        while values[-1] == _DEFAULTS[len(values) - 1]:
            values.pop()
        self._lines.append(json.dumps(values))

    def _split(self, path: Path) -> str:
        folder, name = os.path.split(path)
        number = self._numbers.setdefault(folder, len(self._folders))
        if number == len(self._folders):
            self._folders.append(Path(folder))
        return f"{number}/{name}"

    def __len__(self) -> int:
        return len(self._lines)

    def has(self, index: int) -> bool:
        """Whether a clip has this modality."""
        return bool(self._lines[index])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        values = json.loads(self._lines[index])
        for at in _FILES:
            if at < len(values) and values[at] is not None:
                values[at] = self._path(values[at])
        return Media(*values)

    def _joined(self, file: str) -> Path:
        number, _, name = file.partition("/")
        return self._folders[int(number)] / name

    def described(self) -> Iterator[tuple[list[str], list[object]]]:
        """Of every clip its files, for `path`, and what else its media holds, in the order of its fields."""
        for line in self._lines:
            values = json.loads(line)
            values += _DEFAULTS[len(values) :]
            files = [file for at in _FILES if (file := values[at]) is not None]
            yield files, [values[at] for at in _OTHERS]

    def path(self, file: str) -> Path:
        """A file that `described` gives."""
        return self._path(file)


class Clips(Sequence[Clip]):
    """The clips of a dataset; each is made when it is asked for.

    Attributes:
        ids: of the clips.
        domains: [N] int32, indices into `domain_names` (in the order in which they appear).
        splits: [N] int8, 0 train, 1 test. labels: [N] int32.
        media: per modality, of every clip.
        groups: the recording of every clip. spans: [N, 2] float64, begin and end in it; NaN where nothing tells, and
            [0, 2] where nothing does of any.
    """

    def __init__(self, clips: Iterable[Clip] = ()) -> None:
        self.ids, self.groups = Texts(), Texts()
        self.media: dict[str, MediaColumn] = {}
        domains, splits, classes, spans = array("i"), array("b"), array("i"), array("d")
        numbers: dict[str, int] = {}
        named: dict[tuple[int, str], int] = {}
        for count, clip in enumerate(clips):
            self.ids.append(clip.id)
            self.groups.append(clip.group)
            if clip.span is not None or spans:
                spans.extend(_NO_SPAN * (count - len(spans) // 2) + (clip.span or _NO_SPAN))
            domains.append(numbers.setdefault(clip.domain, len(numbers)))
            splits.append(SPLITS.index(clip.split))
            classes.append(named.setdefault((clip.label, clip.label_name), len(named)))
            for name in clip.media:
                if name not in self.media:
                    self.media[name] = MediaColumn()
                    for _ in range(count):
                        self.media[name].append(None)
            for name, column in self.media.items():
                column.append(clip.media.get(name))
        self.domain_names = tuple(numbers)
        self.domains, self.splits = np.array(domains, np.int32), np.array(splits, np.int8)
        self.spans = np.array(spans, np.float64).reshape(-1, 2)
        self._named, self._classes = list(named), np.array(classes, np.int32)
        self.labels = np.array([label for label, _ in self._named] or [0], np.int32)[self._classes]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        media = {name: column[index] for name, column in self.media.items() if column.has(index)}
        span = tuple(self.spans[index].tolist()) if len(self.spans) else _NO_SPAN
        return Clip(self.ids[index], *self._row(index), media, self.groups[index], None if np.isnan(span[0]) else span)

    def _row(self, index: int) -> tuple[str, str, int, str]:
        """Domain, split, label and its name."""
        label, name = self._named[self._classes[index]]
        return self.domain_names[self.domains[index]], SPLITS[self.splits[index]], label, name

    @property
    def splits_of(self) -> dict[str, set[str]]:
        """The splits of which a domain has clips, by domain."""
        pairs = np.unique(np.stack([self.domains, self.splits]), axis=1).T.tolist()
        return {
            name: {SPLITS[split] for domain, split in pairs if domain == number}
            for number, name in enumerate(self.domain_names)
        }

    def media_of(self, name: str) -> Sequence[Media]:
        """The media of one modality, of the clips that have it."""
        column = self.media.get(name, MediaColumn())
        return [column[index] for index in range(len(column)) if column.has(index)] if column.absent else column

    @property
    def recordings(self) -> np.ndarray:
        """[N] int32: of every clip the first one of its recording; itself where nothing tells of one."""
        first: dict[str, int] = {}
        named = (first.setdefault(group, at) if group else at for at, group in enumerate(self.groups))
        return np.fromiter(named, np.int32, len(self))

    @cached_property
    def digest(self) -> str:
        """Digest of ids, domains, splits and labels: modalities can be joined only when theirs agree."""
        digest = Digest()
        for chunk in chunks(enumerate(self.ids)):
            digest.add([[identity, *self._row(index)] for index, identity in chunk])
        return digest.hexdigest()
