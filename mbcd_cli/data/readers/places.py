"""What readers of published datasets share: finding split tables and media on disk, quickly, in their known layouts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbcd_cli.errors import ManifestError, SettingsError
from mbcd_cli.settings import DatasetSettings, Modality, default_modality


class Disk:
    """Answers "is it there" from directory listings, each read once: 10,000 clips share a few folders."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self._exists: dict[str, bool] = {}

    def names(self, folder: str) -> frozenset[str]:
        """Names in a folder; none when there is no such folder."""
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    self._names[folder] = frozenset(entry.name for entry in entries)
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]

    def exists(self, path: str) -> bool:
        """Whether a file is there, without listing its folder (which may hold 100,000 frames)."""
        if path not in self._exists:
            self._exists[path] = Path(path).exists()
        return self._exists[path]

    def has(self, path: str) -> bool:
        """Whether a file or folder is there, from its folder's listing."""
        folder, name = os.path.split(path)
        return name in self.names(folder)


@dataclass(frozen=True, slots=True)
class Place:
    """One way in which a modality may lie on disk.

    Attributes:
        layout: its name, as printed.
        pattern: path below a base folder, with a row's fields in braces.
        second: that of the second file of a flow pair.
    """

    layout: str
    pattern: str
    second: str = ""


@dataclass(slots=True)
class Found:
    """Where a modality's clips were found.

    Attributes:
        places: per row (base folder, place); the likeliest one where nothing was found.
        hits: (base folder, place) -> clips found there, most first.
        missing: rows for which nothing was found.
    """

    places: list[tuple[str, Place]] = field(default_factory=list)
    hits: Counter[tuple[str, Place]] = field(default_factory=Counter)
    missing: int = 0


def locate(rows: Sequence[Mapping[str, Any]], places: Sequence[Place], bases: Sequence[Path], disk: Disk) -> Found:
    """For every row the first place, in the order given, that is on disk; earlier bases win.

    Args:
        rows: the fields that patterns name.
        places: the known layouts of this modality.
        bases: folders below which to look.
        disk: listings read so far.
    """
    candidates = [(str(base), place) for place in places for base in bases if _begins(str(base), place, disk)]
    found = Found()
    picks: list[tuple[str, Place] | None] = []
    for row in rows:
        pick = next((c for c in candidates if disk.has(path_of(c, row))), None)
        picks.append(pick)
        if pick is not None:
            found.hits[pick] += 1
    likeliest = found.hits.most_common(1)[0][0] if found.hits else (str(bases[0]), places[0])
    found.places = [pick or likeliest for pick in picks]
    found.missing = sum(pick is None for pick in picks)
    return found


def _begins(base: str, place: Place, disk: Disk) -> bool:
    """Whether the fixed beginning of a pattern exists: most layouts are ruled out by one look."""
    first = place.pattern.split("/")[0]
    return bool(disk.names(base)) and ("{" in first or first in disk.names(base))


def path_of(candidate: tuple[str, Place], row: Mapping[str, Any], *, second: bool = False) -> str:
    """The path of a row's media at a place."""
    base, place = candidate
    return f"{base}/{(place.second if second else place.pattern).format_map(row)}"


def describe(name: str, found: Found, total: int) -> str:
    """One line: how a modality lies on disk and how much of it is there."""
    kinds = Counter({})
    for (base, place), count in found.hits.items():
        kinds[f"{place.layout} under {base}"] += count
    where = ", ".join(f"{kind} ({count})" if len(kinds) > 1 else kind for kind, count in kinds.most_common())
    return f"{name}: {where}; {total - found.missing} of {total} clips found"


def root_of(dataset: DatasetSettings) -> Path:
    """The dataset's root folder.

    Raises:
        ManifestError: it is not set, or no folder.
    """
    if dataset.root is None:
        raise ManifestError("The dataset's root folder is not set.", "Name it with --root DIR.")
    root = Path(dataset.root)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ManifestError(f"{root}: the dataset's root {what}.", "Correct --root.")
    return root


def split_folder(dataset: DatasetSettings, root: Path, usual: Sequence[str], names: Sequence[str]) -> Path:
    """The folder of the split tables: `dataset.splits`, or the first usual one that holds any of `names`.

    The root may also be the media folder that lies inside the split folder.

    Raises:
        ManifestError: none holds any; the places looked in are listed.
    """
    if dataset.splits is not None:
        folders = [root / dataset.splits, Path(dataset.splits)]
    else:
        folders = [root, *(root / name for name in usual), *(root.parent / name for name in usual), root.parent]
    for folder in dict.fromkeys(folders):
        if any((folder / name).is_file() for name in names):
            return folder
    looked = "\n".join(f"  {folder}" for folder in dict.fromkeys(folders))
    raise ManifestError(
        f"{root}: there are no split tables ({names[0]}, ...). Looked in:\n{looked}",
        "Put them into one of these folders, or name theirs with --set dataset.splits=DIR.",
    )


def pick_domains(dataset: DatasetSettings, known: Sequence[str]) -> tuple[str, ...]:
    """The domains asked for, by default all known ones.

    Raises:
        ManifestError: an unknown domain.
    """
    unknown = [name for name in dataset.domains if name not in known]
    if unknown:
        raise ManifestError(
            f"dataset.domains: there is no domain {', '.join(map(repr, unknown))}.", f"It has: {', '.join(known)}."
        )
    return tuple(dict.fromkeys(dataset.domains)) or tuple(known)


def by_kind(modalities: Mapping[str, Modality]) -> dict[str, tuple[str, Modality]]:
    """Kind -> (name, settings); by default one modality of each kind these datasets have.

    Raises:
        SettingsError: a kind they do not have, or one asked for twice.
    """
    chosen: dict[str, tuple[str, Modality]] = {}
    for name, settings in (modalities or {kind: default_modality(kind) for kind in ("video", "audio", "flow")}).items():
        if settings.kind == "array":
            raise SettingsError(f"modalities.{name}: this dataset holds video, audio and flow only.", "Leave it out.")
        if settings.kind in chosen:
            raise SettingsError(
                f"modalities.{name}: {chosen[settings.kind][0]} already reads this dataset's {settings.kind}.",
                "Name one modality per kind.",
            )
        chosen[settings.kind] = (name, settings)
    return chosen


def check_label(value: str, classes: int) -> int | None:
    """A label from 0 to classes - 1, or None."""
    try:
        label = int(value)
    except ValueError:
        return None
    return label if 0 <= label < classes else None
