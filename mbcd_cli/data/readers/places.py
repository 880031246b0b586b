"""What readers of published datasets share: finding split tables and media on disk, quickly, in their known layouts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbcd_cli.data.modalities import default_modality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import READERS, Listing, NoMediaError
from mbcd_cli.data.records import Clip, Media, modality_order
from mbcd_cli.errors import ManifestError, SettingsError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings import DatasetSettings, ReaderSettings

_ARCHIVES = (".tar", ".tar.gz", ".zip")
_KINDS = ("video", "audio", "flow")
MAKES_FLOW = {"flow": "; --compute-flow makes it from the video"}
Row = dict[str, str | int]
"""A clip of a split table: its fields, as patterns of paths name them."""


class SplitSettings(ReaderSettings):
    """A reader of split tables."""

    splits: Path | None = None
    """Folder of the split tables, relative to the root; default: the usual places."""


class Disk:
    """Answers "is it there" from directory listings, each read once: 10,000 clips share a few folders.

    Attributes:
        denied: folders asked for that may not be read.
    """

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self.denied: list[str] = []

    def names(self, folder: str) -> frozenset[str]:
        """Names in a folder; none when there is no such folder."""
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    self._names[folder] = frozenset(entry.name for entry in entries)
            except OSError as error:
                self._names[folder] = frozenset()
                if isinstance(error, PermissionError):
                    self._deny(folder)
        return self._names[folder]

    def _deny(self, folder: str) -> None:
        at = Path(folder)
        while at.parent != at and not os.access(at.parent, os.X_OK):  # the one at fault lies above
            at = at.parent
        if str(at) not in self.denied:
            self.denied.append(str(at))

    def has(self, path: str) -> bool:
        """Whether a file or folder is there, from its folder's listing."""
        folder, name = os.path.split(path)
        return name in self.names(folder)


@dataclass(frozen=True, slots=True)
class MediaLayout:
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
        archives: files beside the places of those rows that are still to be unpacked.
        denied: folders looked into that may not be read.
    """

    places: list[tuple[str, MediaLayout]] = field(default_factory=list)
    hits: Counter[tuple[str, MediaLayout]] = field(default_factory=Counter)
    missing: int = 0
    archives: list[str] = field(default_factory=list)
    denied: list[str] = field(default_factory=list)

    @property
    def why_missing(self) -> str:
        """What stands against the missing rows' media, and the remedy; empty where nothing is known."""
        causes = []
        for texts, what in ((self.denied, "give yourself the right to read"), (self.archives, "unpack")):
            if texts:
                causes.append(f"; {what} {texts[0]}" + (f" and {len(texts) - 1} more" if len(texts) > 1 else ""))
        return "".join(causes)


def find_media(rows: Sequence[Row], places: Sequence[MediaLayout], bases: Sequence[Path], disk: Disk) -> Found:
    """For every row the first place, in the order given, that is on disk; earlier bases win.

    Args:
        rows: the fields that patterns name.
        places: the known layouts of this modality.
        bases: folders below which to look.
        disk: listings read so far.
    """
    candidates = [(str(base), place) for place in places for base in bases if _begins(str(base), place, disk)]
    media = Found()
    picks: list[tuple[str, MediaLayout] | None] = []
    for row in rows:
        pick = next((c for c in candidates if disk.has(path_of(c, row))), None)
        picks.append(pick)
        if pick is not None:
            media.hits[pick] += 1
    likeliest = media.hits.most_common(1)[0][0] if media.hits else (str(bases[0]), places[0])
    media.places = [pick or likeliest for pick in picks]
    media.missing = sum(pick is None for pick in picks)
    if media.missing:
        lacking = [row for row, pick in zip(rows, picks, strict=True) if pick is None]
        paths = dict.fromkeys(path_of(c, row).removesuffix("/u") for c in candidates for row in lacking)
        media.archives = [path + end for path in paths for end in _ARCHIVES if disk.has(path + end)]
        media.denied = list(disk.denied)
    return media


def _begins(base: str, place: MediaLayout, disk: Disk) -> bool:
    """Whether the fixed beginning of a pattern exists: most layouts are ruled out by one look."""
    first = place.pattern.split("/")[0]
    return bool(disk.names(base)) and ("{" in first or first in disk.names(base))


def path_of(candidate: tuple[str, MediaLayout], row: Row, *, second: bool = False) -> str:
    """The path of a row's media at a place."""
    base, place = candidate
    return f"{base}/{(place.second if second else place.pattern).format_map(row)}"


def found_line(name: str, found: Found, total: int) -> str:
    """One line: how a modality lies on disk and how much of it is there."""
    kinds = Counter({})
    for (base, place), count in found.hits.items():
        kinds[f"{place.layout} under {base}"] += count
    where = ", ".join(f"{kind} ({count})" if len(kinds) > 1 else kind for kind, count in kinds.most_common())
    return f"{name}: {where}; {total - found.missing} of {total} clips found"


@dataclass(frozen=True, slots=True)
class SplitTables:
    """What the split tables of a dataset say.

    Attributes:
        folder: where they are.
        rows: of all of them. labels: names of the classes.
        domains: those asked for.
        warnings: what is unusual about them.
    """

    folder: Path
    rows: list[Row]
    labels: tuple[str, ...]
    domains: tuple[str, ...]
    warnings: list[str]


def listing_of(
    name: str,
    tables: SplitTables,
    asked: Mapping[str, tuple[str, Modality]],
    media_of: Mapping[str, Found],
    media: Callable[[str, int, Row], Media],
    *,
    root: Path,
    places: Mapping[str, Sequence[MediaLayout]],
    computed: str | None,
    remedies: Mapping[str, str],
    holds: str,
) -> Listing:
    """The clips of split tables, with those modalities of which anything is on disk, or can be computed.

    Args:
        asked: kind -> name and settings. media_of: per kind.
        media: (kind, number of a row, the row) -> where it lies.
        places: per kind, where its media were looked for.
        computed: what flow is computed from where there is none; None where it is not.
        remedies: kind -> what is said where there is none, and nothing else is known.
        holds: folders by which the root is told.

    Raises:
        NoMediaError: no media of any modality.
    """
    total, warnings, notes = len(tables.rows), tables.warnings, [f"split tables: {tables.folder}"]
    used = {}
    for kind, (modality, settings) in asked.items():
        where = media_of[kind]
        if where.hits:
            notes.append(found_line(modality, where, total))
            if where.missing:
                lacking = f"nothing is on disk for {where.missing} of {total} clips{where.why_missing}"
                warnings.append(f"{modality}: {lacking}")
        elif kind == "flow" and computed is not None:
            notes.append(f"{modality}: computed from {computed}")
        else:
            remedy = where.why_missing or remedies.get(kind, "")
            warnings.append(f"{modality}: there is none under {root}, so it is left out{remedy}")
            continue
        used[kind] = (modality, settings)
    missing = not used
    used = used or dict(asked)
    clips = [
        Clip(
            *(row["id"], row["domain"], row["split"], row["label"], tables.labels[row["label"]]),
            {modality: media(kind, index, row) for kind, (modality, _) in used.items()},
            row.get("group", ""),
            (row["start"], row["stop"]) if "start" in row else None,
        )
        for index, row in enumerate(tables.rows)
    ]
    settings_of = dict(used.values())
    listing = Listing(
        name=name,
        clips=clips,
        domains=tables.domains,
        label_names=tables.labels,
        modalities={modality: settings_of[modality] for modality in modality_order(list(settings_of))},
        warnings=warnings,
        notes=notes,
    )
    if missing:
        looked = [f"  {root / place.pattern}" for kind in asked for place in places[kind][:2]]
        looked += [f"  {asked[kind][0]}{where.why_missing}" for kind, where in media_of.items() if where.why_missing]
        error = NoMediaError(
            f"{root}: no media of the clips in {tables.folder} are there. Looked for, among others:\n"
            + "\n".join(looked),
            f"Name the folder that holds {holds} with --root.",
        )
        error.listing = listing
        raise error
    return listing


def check_rows(folder: Path, rows: Sequence[Row], problems: list[str]) -> None:
    """Refuse split tables with problems, or with one clip twice.

    Raises:
        ManifestError: all of them, fifty listed.
    """
    problems += [f"clip {id_} is there twice" for id_, n in Counter(row["id"] for row in rows).items() if n > 1]
    if problems:
        shown = "\n".join(f"  {text}" for text in problems[:50])
        more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise ManifestError(f"{folder}: the split tables are wrong.\n{shown}{more}", "Get the tables again.")


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
    if not os.access(root, os.R_OK | os.X_OK):
        raise ManifestError(f"{root}: the dataset's root may not be read.", "Give yourself the right to read it.")
    return root


def check_root(reader: str, root: Path | None) -> None:
    """Refuse a root that cannot be read before anything slow is imported; readers that generate media make theirs.

    Raises:
        ManifestError: it is no folder, or may not be read.
    """
    entry = READERS.get(reader)
    if root is not None and entry is not None and not entry.generates:
        root_of(DatasetSettings(root=root))


def split_folder(dataset: DatasetSettings, root: Path, usual: Sequence[str], names: Sequence[str]) -> Path:
    """The folder of the split tables: `dataset.reader.splits`, or the first usual one that holds any of `names`.

    The root may also be the media folder that lies inside the split folder.

    Raises:
        ManifestError: none holds any; the places looked in are listed.
    """
    if dataset.reader.splits is not None:
        folders = [root / dataset.reader.splits, Path(dataset.reader.splits)]
    else:
        folders = [root, *(root / name for name in usual), *(root.parent / name for name in usual), root.parent]
    for folder in dict.fromkeys(folders):
        if any((folder / name).is_file() for name in names):
            return folder
    looked = "\n".join(f"  {folder}" for folder in dict.fromkeys(folders))
    raise ManifestError(
        f"{root}: there are no split tables ({names[0]}, ...). Looked in:\n{looked}",
        "Put them into one of these folders, or name theirs with --set dataset.reader.splits=DIR.",
    )


def pick_domains(dataset: DatasetSettings, domains: Sequence[str]) -> tuple[str, ...]:
    """The domains asked for, by default all known ones.

    Raises:
        ManifestError: an unknown domain.
    """
    unknown = [name for name in dataset.domains if name not in domains]
    if unknown:
        raise ManifestError(
            f"dataset.domains: there is no domain {', '.join(map(repr, unknown))}.",
            f"{did_you_mean(unknown[0], domains)}It has: {', '.join(domains)}.",
        )
    return tuple(dict.fromkeys(dataset.domains)) or tuple(domains)


def by_kind(modalities: Mapping[str, Modality]) -> dict[str, tuple[str, Modality]]:
    """Kind -> (name, settings); by default one modality of each kind these datasets have.

    Raises:
        SettingsError: a kind they do not have, or one asked for twice.
    """
    chosen: dict[str, tuple[str, Modality]] = {}
    for name, settings in (modalities or {kind: default_modality(kind) for kind in _KINDS}).items():
        if settings.kind not in _KINDS:
            raise SettingsError(f"modalities.{name}: this dataset holds {', '.join(_KINDS)} only.", "Leave it out.")
        if settings.kind in chosen:
            raise SettingsError(
                f"modalities.{name}: {chosen[settings.kind][0]} already reads this dataset's {settings.kind}.",
                "Name one modality per kind.",
            )
        chosen[settings.kind] = (name, settings)
    return chosen


def check_label(value: str, classes: int) -> int | None:
    """A label from 0 to classes - 1, or None."""
    label = whole_number(value)
    return label if label is not None and 0 <= label < classes else None


def whole_number(cell: str) -> int | None:
    """Of a cell: "122", and "122.0" as tables are written that were columns of floats; None of anything else."""
    match = re.fullmatch(r"\s*([+-]?\d{1,15})(?:\.0*)?\s*", cell)
    return int(match[1]) if match else None
