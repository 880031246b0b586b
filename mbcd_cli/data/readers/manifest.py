"""The manifest reader: a CSV table with one row per clip and one column per modality.

Columns: id, domain, split (train or test), label (0, 1, ...), optionally label_name, then one column per modality with
paths relative to the dataset's root. Optional spans inside the files: start, stop (or start_s, stop_s) in seconds, or
start_frame, stop_frame (zero-based, stop exclusive) in native frames; fps, the frames per second of folders of frames;
group, the recording that a clip is a part of.
Lines count from 1, the header.
"""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from mbcd_cli.data.clips import Clips
from mbcd_cli.data.modalities import KINDS, default_modality, infer_kind
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.csv_table import CsvTable, inside, lines_error, path_fault, read_bytes
from mbcd_cli.data.readers.places import root_of
from mbcd_cli.data.records import SPLITS, Clip, Media, modality_order
from mbcd_cli.errors import ManifestError
from mbcd_cli.naming import did_you_mean, name_faults
from mbcd_cli.settings import DatasetSettings, ManifestSettings

REQUIRED = ("id", "domain", "split", "label")
SPANS = {
    "start": ("start", "s"),
    "start_s": ("start", "s"),
    "start_frame": ("start", "frame"),
    "stop": ("stop", "s"),
    "stop_s": ("stop", "s"),
    "stop_frame": ("stop", "frame"),
}
RATE = "fps"
"""Column with the frames per second of a row's folders of frames; files have times of their own."""
GROUP_COLUMN = "group"
"""Column with the recording or source video that a row's clip is a part of."""


def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The listing of a manifest. Media files are not looked at: bad ones are found when they are decoded.

    Args:
        dataset: `root`, `manifest`, `name`, `domains`, `classes` and `compute_flow`.
        modalities: the modalities asked for; empty takes every column that is one, with its kind's defaults.

    Raises:
        ManifestError: the table is missing, or wrong; all bad lines are listed together.
    """
    root, path = locate_table(dataset)
    parsed = parse(CsvTable(read_bytes(path)), dataset, modalities, root=root, path=path)
    domains = _domains(parsed.clips, dataset, path)
    clips = parsed.clips
    if set(domains) < set(clips.domain_names):
        clips = Clips(clip for clip in clips if clip.domain in domains)
    warnings = _lacking_splits(clips, domains, dataset)
    labels, without = _label_names(clips, parsed.names, dataset)
    return Listing(
        name=dataset.name or default_name(root, path),
        clips=clips,
        domains=domains,
        label_names=labels,
        modalities=parsed.modalities,
        warnings=warnings + without,
        notes=parsed.notes,
        tables=[path],
    )


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a table says: clips in its order, label -> name where it names them, modalities in fusion order, notes."""

    clips: Clips
    names: dict[int, str]
    modalities: dict[str, Modality]
    notes: list[str]


def parse(
    table: CsvTable, dataset: DatasetSettings, modalities: Mapping[str, Modality], *, root: Path, path: Path
) -> Parsed:
    """The clips of a manifest's table, every row of it.

    Raises:
        ManifestError: the header is wrong, there is no row, or rows are wrong; all bad lines are listed together.
    """
    columns = _columns(table, dataset, modalities, root=root, path=path)
    reader = _Rows(columns, dataset, root)
    clips = Clips(clip for line, cells in table.rows if (clip := reader.clip(line, cells)) is not None)
    problems = sorted(table.problems + reader.problems + reader.repeated(table))
    if problems:
        raise lines_error(path, problems)
    ordered = {name: columns.modalities[name] for name in modality_order(list(columns.modalities))}
    return Parsed(clips, reader.names, ordered, columns.notes)


# --- the file ------------------------------------------------------------------------------------------------------


def locate_table(dataset: DatasetSettings) -> tuple[Path, Path]:
    """The root folder and the table.

    Raises:
        ManifestError: one of them is not there.
    """
    root = root_of(dataset)
    own = dataset.reader if isinstance(dataset.reader, ManifestSettings) else ManifestSettings()
    path = root / own.manifest
    if not path.is_file():
        raise ManifestError(
            f"{path}: there is no such manifest.",
            "Write one (one row per clip), or name another with --manifest FILE.",
        )
    return root, path


@dataclass(slots=True)
class _Columns:
    """What each column means."""

    at: dict[str, int]
    width: int
    paths: dict[str, int]
    spans: list[tuple[str, int, str]]
    modalities: dict[str, Modality]
    clock: int | None
    rate: int | None
    flow_from: dict[str, int]
    notes: list[str] = field(default_factory=list)


def _suffixes(table: CsvTable, columns: Mapping[str, int]) -> dict[str, set[str]]:
    """Of some columns those that their files have."""
    ends: dict[str, dict[str, str]] = {name: {} for name in columns}  # few, of however many files
    for _, cells in table.rows:
        for name, column in columns.items():
            if len(cells) > column and cells[column]:
                file = cells[column].partition("|")[0]
                file = file.partition("#")[0] if ".npy#" in file else file
                ends[name][file[file.rfind(".") :]] = file
    return {name: {PurePosixPath(file).suffix.lower() for file in files.values()} for name, files in ends.items()}


def _kind_of(name: str, suffixes: set[str], table: CsvTable, column: int, root: Path) -> str | None:
    """Kind of a column: its files' names decide, where all say the same, before its own name does.

    But flow is stored as video too, and video files hold sound: there the column's name says which.
    """
    told = next((kind for kind, settings in KINDS.items() if suffixes and suffixes <= {*settings.suffixes}), None)
    named = infer_kind(name)
    if told is None or named is None or not suffixes <= {*KINDS[named].also_in}:
        return told or named
    cells = (cells[column] for _, cells in table.rows if len(cells) > column and cells[column])
    return named if KINDS[named].may_hold([path for cell in cells if (path := inside(root, cell))]) else told


def _columns(
    table: CsvTable, dataset: DatasetSettings, asked: Mapping[str, Modality], *, root: Path, path: Path
) -> _Columns:
    header = table.header
    bad_header = [text for line, text in table.problems if line == 1]
    if bad_header:
        raise ManifestError(f"{path}: its header is {bad_header[0]}.", "Save the table as UTF-8 CSV.")
    if not header:
        raise ManifestError(f"{path}: the manifest is empty.", f"It begins with a header: {','.join(REQUIRED)},...")
    problems: list[str] = []
    missing = [name for name in REQUIRED if name not in header]
    if not missing and not table.problems and next(iter(table.rows), None) is None:
        raise ManifestError(f"{path}: the manifest is empty.", "Add one row per clip below the header.")
    if missing:
        hint = " (cells are separated by commas)" if len(header) == 1 and re.search(r"[;\t]", header[0]) else ""
        problems.append(f"the header lacks {', '.join(missing)}{hint}")
    problems += [f"column {name!r} is there twice" for name in sorted({n for n in header if header.count(n) > 1})]
    if "" in header:
        problems.append(f"column {header.index('') + 1} has no name")
    at = {name: index for index, name in reversed(list(enumerate(header)))}
    units = {SPANS[name][1] for name in header if name in SPANS}
    if len(units) > 1:
        problems.append("spans are given in seconds and in frames: keep one of the two")
    if len([n for n in header if n in SPANS]) > len({SPANS[n][0] for n in header if n in SPANS}) and len(units) == 1:
        problems.append("start or stop is given twice")
    kinds: dict[str, str] = {}
    files = [n for n in at if n not in ("", "label_name", RATE, GROUP_COLUMN, *REQUIRED) and n not in SPANS]
    unsaid = {n: at[n] for n in files if n not in asked or asked[n] == default_modality(n)}
    suffixes = _suffixes(table, unsaid)
    for name in sorted(files, key=at.get):
        kind = asked[name].kind if name in asked else None
        if name in unsaid:  # nobody said more than its name
            kind = _kind_of(name, suffixes[name], table, at[name], root) or kind
        if kind is None:
            problems.append(
                f"unknown column {name!r}: if it is a modality, say of which kind "
                f"(--set modalities.{name}.kind={'|'.join(KINDS)}), else remove it"
            )
        else:
            kinds[name] = kind
    modalities = {
        name: default_modality(name, kinds[name]) if kinds.get(name, settings.kind) != settings.kind else settings
        for name, settings in asked.items()
    } or {name: default_modality(name, kind) for name, kind in kinds.items()}
    video = next((n for n in kinds if kinds[n] == "video" and n in modalities), None) or next(
        (n for n in kinds if kinds[n] == "video"), None
    )
    notes: list[str] = []
    if not asked and dataset.compute_flow and video is not None and "flow" not in kinds.values():
        modalities["flow"] = default_modality("flow")
    flow_from: dict[str, int] = {}
    for name, settings in modalities.items():
        if name in kinds:
            continue
        computable = settings.computed_from is not None and video is not None
        if computable and dataset.compute_flow:
            flow_from[name] = at[video]
            notes.append(f"{name} is computed from {video}")
        else:
            hint = " (--compute-flow makes it from the video)" if computable else ""
            problems.append(f"there is no column for modality {name!r}{hint}. {did_you_mean(name, kinds)}".rstrip(". "))
    if not modalities and not problems:
        problems.append("there is no column of a modality (video, audio, flow, ...)")
    if problems:
        lines = "\n".join(f"  line 1: {text}" for text in problems)
        raise ManifestError(f"{path}: the header is wrong.\n{lines}", "Correct the header; nothing was written.")
    ignored = [name for name in kinds if name not in modalities]
    if ignored:
        both = ",".join([*modalities, *ignored])
        notes.append(f"columns not asked for: {', '.join(ignored)} (--modalities {both} takes them too)")
    return _Columns(
        at=at,
        width=len(header),
        paths={name: at[name] for name in modalities if name in kinds},
        spans=[(SPANS[name][0], at[name], SPANS[name][1]) for name in header if name in SPANS],
        modalities=modalities,
        clock=at[video] if video is not None else None,
        rate=at.get(RATE),
        flow_from=flow_from,
        notes=notes,
    )


# --- the rows ------------------------------------------------------------------------------------------------------


class _Rows:
    """Turns rows into clips and gathers what is wrong with them."""

    def __init__(self, columns: _Columns, dataset: DatasetSettings, root: Path) -> None:
        self.columns = columns
        self.dataset = dataset
        self.root = root
        self.problems: list[tuple[int, str]] = []
        self.names: dict[int, str] = {}
        self._lines, self._hashes = array("q"), array("q")  # of every id: a million of them would be 200 MB of texts
        self._name_line: dict[int, int] = {}
        self._label_of: dict[str, int] = {}

    def clip(self, line: int, cells: list[str]) -> Clip | None:
        """The clip of one row, or None after noting all that is wrong with the row."""
        if len(cells) != self.columns.width:
            self.problems.append((line, f"{len(cells)} cells where the header has {self.columns.width}"))
            return None
        at = self.columns.at
        faults: list[str] = []
        # One name has several spellings in Unicode, which look the same.
        identity, domain = (unicodedata.normalize("NFC", cells[at[name]]) for name in ("id", "domain"))
        split = cells[at["split"]]
        faults += name_faults("id", identity)
        faults += name_faults("domain", domain)
        if "," in domain:
            faults.append(f"domain {domain!r} holds a comma")
        if split not in SPLITS:
            faults.append(f"split {split!r} is neither train nor test")
        label = self._label(cells[at["label"]], faults)
        named = unicodedata.normalize("NFC", cells[at["label_name"]]) if "label_name" in at else ""
        span = self._span(cells, faults)
        media = self._rated(cells, self._media(cells, span, faults), faults)
        if not faults and label is not None and named:
            self._check_name(label, named, line, faults)
        if identity:
            self._lines.append(line)
            self._hashes.append(hash(identity))
        if faults or label is None:
            self.problems += [(line, text) for text in faults]
            return None
        return Clip(identity, domain, split, label, named or str(label), media, *self._recording(cells, span))

    def _recording(self, cells: list[str], span: Mapping[str, object]) -> tuple[str, tuple[float, float] | None]:
        """What a clip is a part of: what the table says, or the file that a span is of; and that span."""
        columns = self.columns
        group = unicodedata.normalize("NFC", cells[columns.at[GROUP_COLUMN]]) if GROUP_COLUMN in columns.at else ""
        if not span:
            return group, None
        first = next(iter([*columns.paths.values(), *columns.flow_from.values()]))
        return group or cells[first], (span.get("start", 0.0), span.get("stop", math.inf))

    def repeated(self, table: CsvTable) -> list[tuple[int, str]]:
        """Lines whose id an earlier one has."""
        hashes = np.array(self._hashes, np.int64)
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        alike = set(np.array(self._lines, np.int64)[counts[inverse] > 1].tolist())
        first: dict[str, int] = {}
        repetitions = []
        for line, cells in table.rows if alike else ():
            if line in alike:
                identity = unicodedata.normalize("NFC", cells[self.columns.at["id"]])
                if first.setdefault(identity, line) != line:
                    repetitions.append((line, f"id {identity!r} is already on line {first[identity]}"))
        return repetitions

    def _label(self, cell: str, faults: list[str]) -> int | None:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", cell):
            faults.append(f"label {cell!r} is not an integer")
            return None
        label, classes = int(cell), self.dataset.classes
        if label < 0 or (classes is not None and label >= classes):
            end = f"{classes - 1}" if classes is not None else "..."
            faults.append(f"label {label} is out of range (classes are 0 to {end})")
            return None
        return label

    def _check_name(self, label: int, name: str, line: int, faults: list[str]) -> None:
        if self.names.get(label, name) != name:
            earlier = self._name_line[label]
            faults.append(f"label {label} is called {name!r} here and {self.names[label]!r} on line {earlier}")
        elif self._label_of.get(name, label) != label:
            other = self._label_of[name]
            faults.append(f"label_name {name!r} is label {label} here and {other} on line {self._name_line[other]}")
        else:
            self.names[label] = name
            self._label_of[name] = label
            self._name_line.setdefault(label, line)

    def _span(self, cells: list[str], faults: list[str]) -> dict[str, object]:
        span: dict[str, object] = {}
        for end, index, unit in self.columns.spans:
            cell = cells[index]
            if not cell:
                continue
            try:
                value = float(int(cell)) if unit == "frame" else float(cell)
            except ValueError:
                value = math.nan
            if not math.isfinite(value) or value < 0:
                what = "a frame number" if unit == "frame" else "a time in seconds"
                faults.append(f"{end} {cell!r} is not {what}")
                continue
            span[end], span["unit"] = value, unit
        if "start" in span and "stop" in span and not span["start"] < span["stop"]:  # type: ignore[operator]
            faults.append(f"stop ({span['stop']:g}) is not after start ({span['start']:g})")
        return span

    def _media(self, cells: list[str], span: dict[str, object], faults: list[str]) -> dict[str, Media]:
        media: dict[str, Media] = {}
        columns = self.columns
        for name, settings in columns.modalities.items():
            computed = name in columns.flow_from
            cell = cells[columns.flow_from[name] if computed else columns.paths[name]]
            if computed:
                path = inside(self.root, cell)
                if path is not None:  # a bad path is reported once, with the video's own column
                    media[name] = Media(path, computed=1, **span)
                elif not any(index == columns.flow_from[name] for index in columns.paths.values()):
                    faults.append(f"{name}: {path_fault(cell)}")
                continue
            files = settings.cell_files(cell)
            paths = [inside(self.root, file) for file in files]
            misplaced = [path_fault(file) for file, path in zip(files, paths, strict=True) if path is None]
            if misplaced:
                faults.append(f"{name}: {misplaced[0]}")
                continue
            if len(files) > 2:
                faults.append(f"{name}: more than two files are named")
                continue
            extra: dict[str, object] = dict(span) if settings.spanned else {}
            if (row := settings.cell_row(cell)) is not None:
                if not re.fullmatch(r"[0-9]{1,15}", row):
                    faults.append(f"{name}: row {row!r} of {files[0]} is not a whole number from 0")
                    continue
                extra |= {"start": int(row), "stop": int(row) + 1, "unit": "row"}
            if settings.clocked and span.get("unit") == "frame":
                clock = None if columns.clock is None else inside(self.root, cells[columns.clock])
                if columns.clock is None:
                    faults.append(f"{name}: a span in frames needs a video column that tells their times")
                    continue
                extra["clock"] = clock
            media[name] = Media(paths[0], paths[1] if len(paths) == 2 else None, **extra)
        for name, settings in columns.modalities.items():
            guide = media.get(settings.guide)
            if name in media and guide is not None and not span:
                media[name] = replace(media[name], clock=guide.path, computed=guide.computed)
        return media

    def _rated(self, cells: list[str], media: dict[str, Media], faults: list[str]) -> dict[str, Media]:
        """The media of a row, with the rate of those that are folders of frames."""
        cell = "" if self.columns.rate is None else cells[self.columns.rate]
        if not cell:
            return media
        try:
            rate = float(cell)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            faults.append(f"{RATE} {cell!r} is not a number of frames per second")
            return media
        timed = {
            name: replace(item, rate=rate)
            for name, item in media.items()
            if _is_folder(item.path) or (item.clock is not None and _is_folder(item.clock))
        }
        if media and not timed:
            faults.append(f"{RATE} {cell} is given, and the row names no folder of frames: files have their own times")
        return media | timed


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir() or not (path.suffix or path.exists())
    except OSError:  # said when the clip is decoded
        return True


# --- the whole -----------------------------------------------------------------------------------------------------


def _domains(clips: Clips, dataset: DatasetSettings, path: Path) -> tuple[str, ...]:
    present = clips.domain_names
    asked = tuple(dict.fromkeys(unicodedata.normalize("NFC", name) for name in dataset.domains))
    unknown = [name for name in asked if name not in present]
    if unknown:
        raise ManifestError(
            f"{path}: there is no domain {', '.join(map(repr, unknown))}.",
            f"{did_you_mean(unknown[0], present)}It has: {', '.join(present)}.",
        )
    return asked or present


def _lacking_splits(clips: Clips, domains: tuple[str, ...], dataset: DatasetSettings) -> list[str]:
    """Domains with clips of one split only: what they can still be used for is said."""
    present = clips.splits_of
    whole = "" if dataset.target_split == "all" else ", by all its clips (--set dataset.target_split=all)"
    lacking = {"train": "it can only be a target", "test": f"it can only be a target{whole}"}
    return [
        f"domain {domain} has no clips of the {split} split: {consequence}"
        for split, consequence in lacking.items()
        for domain in domains
        if split not in present[domain]
    ]


def _label_names(clips: Clips, names: Mapping[int, str], dataset: DatasetSettings) -> tuple[tuple[str, ...], list[str]]:
    classes = dataset.classes or int(clips.labels.max()) + 1
    labels = tuple(names.get(label, str(label)) for label in range(classes))
    present = set(np.unique(clips.labels).tolist())
    without = [labels[label] for label in range(classes) if label not in present]
    if not without:
        return labels, []
    shown = ", ".join(without[:10]) + (", ..." if len(without) > 10 else "")
    return labels, [f"{len(without)} of {classes} classes have no clips: {shown}"]


def default_name(root: Path, path: Path) -> str:
    """What a dataset is called in the cache when nobody says."""
    base = root.resolve().name or "dataset"
    name = base if path.name == "manifest.csv" else f"{base}-{path.stem}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "dataset"
