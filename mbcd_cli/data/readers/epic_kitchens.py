"""EPIC-Kitchens with the MM-SADA domains: kitchens P08, P01, P22 as D1, D2, D3, and eight verbs (docs/datasets.md).

Three layouts are read, below the root, the split folder or an EPIC-mp4 folder of either: folders of frames, one mp4 per
clip, whole videos. Split tables are D1_train.csv, ... with a header, or D1_train.pkl, ... as distributed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mbcd_cli.data.media.folders import counts_from
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.pickled_tables import read_table
from mbcd_cli.data.readers.places import (
    MAKES_FLOW,
    Disk,
    Found,
    MediaLayout,
    Row,
    SplitTables,
    by_kind,
    check_label,
    check_rows,
    find_media,
    listing_of,
    path_of,
    pick_domains,
    root_of,
    split_folder,
    whole_number,
)
from mbcd_cli.data.records import SPLITS, Media
from mbcd_cli.errors import ManifestError
from mbcd_cli.settings import DatasetSettings

PARTICIPANTS = {"D1": "P08", "D2": "P01", "D3": "P22"}
VERBS = ("take", "put down", "open", "close", "wash", "cut", "stir", "pour")
CLIPS = {
    ("D1", "train"): 1543,
    ("D1", "test"): 435,
    ("D2", "train"): 2495,
    ("D2", "test"): 750,
    ("D3", "train"): 3897,
    ("D3", "test"): 974,
}
RATE = 60.0
"""Frames per second of the annotations, and of the frames that were extracted from the videos."""
SPLIT_FOLDERS = ("MM-SADA_Domain_Adaptation_Splits", "splits")
COLUMNS = (
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
    "verb_class",
)

FRAMES, CLIP_FILES, WHOLE = "frame folders", "one file per clip", "whole videos"
_CLIP_STEM = "{split}/{domain}/{domain}_{video}_{start}_{stop}_{label}"
_CLIP = f"{_CLIP_STEM}.mp4"
_FLOW_CLIP = "flow/{split}/{domain}/{domain}_{video}_{flow_start}_{flow_stop}_{label}"
_WHOLE_FOLDERS = (
    "",
    "videos/",
    "video/",
    "videos/{participant}/",
    "videos/train/{participant}/",  # both of our splits are cut from the training videos of EPIC-Kitchens-55
    "videos/{split}/{participant}/",
    "video/{split}/{domain}/",
    "{participant}/videos/",
    "{participant}/",
)
# As EPIC-Kitchens itself is downloaded: 55 (its training videos hold both of our splits), and 100.
_OFFICIAL = ("{kind}/train/{participant}/{video}", "frames_rgb_flow/{kind}/train/{participant}/{video}")
VIDEO = (
    MediaLayout(FRAMES, "rgb/{split}/{domain}/{video}"),
    *(MediaLayout(FRAMES, pattern.replace("{kind}", "rgb")) for pattern in _OFFICIAL),
    MediaLayout(FRAMES, "{participant}/rgb_frames/{video}"),
    MediaLayout(CLIP_FILES, f"video/{_CLIP}"),
    MediaLayout(CLIP_FILES, f"rgb/{_CLIP}"),
    *(MediaLayout(WHOLE, f"{folder}{{video}}.{suffix}") for folder in _WHOLE_FOLDERS for suffix in ("MP4", "mp4")),
)
FLOW = (
    *(
        MediaLayout(FRAMES, f"{folder}/u", f"{folder}/v")
        for folder in (
            "flow/{split}/{domain}/{video}",
            *(pattern.replace("{kind}", "flow") for pattern in _OFFICIAL),
            "{participant}/flow_frames/{video}",
        )
    ),
    MediaLayout(CLIP_FILES, f"{_FLOW_CLIP}_u.mp4", f"{_FLOW_CLIP}_v.mp4"),
    # The same, named after the frames of the video.
    MediaLayout(CLIP_FILES, f"flow/{_CLIP_STEM}_u.mp4", f"flow/{_CLIP_STEM}_v.mp4"),
)
AUDIO = tuple(
    MediaLayout("one wav per video", f"{folder}{{video}}.wav")
    for folder in (
        "rgb/{split}/{domain}/",
        "audio/{split}/{domain}/",
        "audio/",
        "{participant}/audio/",
        *_WHOLE_FOLDERS,
    )
)
PLACES = {"video": VIDEO, "flow": FLOW, "audio": AUDIO}
_ABSENT_REMEDIES = {**MAKES_FLOW, "audio": "; extract one wav per video from the videos"}


def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The clips of the selected domains; media are looked for, but not opened.

    A modality of which nothing at all is on disk is left out with a warning; single missing files are found when their
    clips are decoded (or by `presence.check_media`).

    Args:
        dataset: `root`, `reader.splits`, `name`, `domains` and `compute_flow`.
        modalities: at most one per kind; empty means video, audio and flow.

    Raises:
        ManifestError: no root, no split tables, an unknown domain, a wrong table (all bad rows are listed), or no
            media of any modality.
        SettingsError: a modality of a kind that the dataset does not have.
    """
    root = root_of(dataset)
    domains = pick_domains(dataset, tuple(PARTICIPANTS))
    asked = by_kind(modalities)
    names = [f"{domain}_{split}.{end}" for domain in domains for split in SPLITS for end in ("csv", "pkl")]
    splits = split_folder(dataset, root, SPLIT_FOLDERS, names)
    tables = _read_splits(splits, domains)
    disk, bases = Disk(), _bases(root, splits)
    media_of = {kind: find_media(tables.rows, PLACES[kind], bases, disk) for kind in asked}
    hit = {kind: where for kind, where in media_of.items() if where.hits}
    return listing_of(
        *(dataset.name or "epic-kitchens", tables, asked, media_of, partial(_media, hit or media_of)),
        root=root,
        places=PLACES,
        computed=asked["video"][0] if dataset.compute_flow and "video" in hit else None,
        remedies=_ABSENT_REMEDIES,
        holds="rgb/ (or video/), flow/ and audio/",
    )


def narrations(dataset: DatasetSettings, domains: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Verb -> the distinct narrations of its training clips in these domains; no other domain's table is opened.

    Args:
        dataset: `root` and `reader.splits`.

    Raises:
        ManifestError: no root, no table, a wrong one, one without narrations, or a verb that has none.
    """
    root = root_of(dataset)
    names = [f"{domain}_train.{end}" for domain in domains for end in ("csv", "pkl")]
    splits = split_folder(dataset, root, SPLIT_FOLDERS, names)
    found: dict[str, dict[str, None]] = {verb: {} for verb in VERBS}
    for domain in domains:
        path = next((p for end in ("csv", "pkl") if (p := splits / f"{domain}_train.{end}").is_file()), None)
        if path is None:
            raise ManifestError(f"{splits}: there is no {domain}_train.csv or .pkl.", "Complete the split folder.")
        table = read_table(path)
        if lacking := [name for name in ("narration", "verb_class") if name not in table]:
            raise ManifestError(
                f"{path}: it lacks the columns {', '.join(lacking)}.", "Get it from its publisher, or write prompts."
            )
        for line, (text, verb) in enumerate(zip(table["narration"], table["verb_class"], strict=True), start=1):
            label = check_label(str(verb), len(VERBS))
            if label is None:
                raise ManifestError(f"{path}, row {line}: verb_class {verb!r} is none.", "Mend the table.")
            if words := " ".join(str(text).split()):
                found[VERBS[label]][words] = None
    if bare := [verb for verb, texts in found.items() if not texts]:
        raise ManifestError(
            f"{splits}: the training clips of {', '.join(domains)} have no narration of {', '.join(bare)}.",
            "Write prompts of your own, for --prompts FILE.",
        )
    return {verb: tuple(texts) for verb, texts in found.items()}


def _bases(root: Path, splits: Path) -> list[Path]:
    near = [root, root / "EPIC-mp4", splits, splits / "EPIC-mp4"]
    if root == splits or root.name == "EPIC-mp4":
        near += [root.parent, root.parent / "EPIC-mp4"]
    return list(dict.fromkeys(near))


def _media(media_of: Mapping[str, Found], kind: str, index: int, row: Row) -> Media:
    # Published flow has half the frame rate of the annotations: it is told by every second frame.
    computed = 2 if kind == "flow" and kind not in media_of else 0
    place = media_of["video" if computed else kind].places[index]
    path = Path(path_of(place, row))
    second = Path(path_of(place, row, second=True)) if place[1].second else None
    if kind == "audio" or place[1].layout == WHOLE:
        # Seconds rather than frames: a few recordings have another frame rate than the annotations' 60 per second.
        rate = None if kind == "audio" else RATE
        return Media(path, second, row["start_s"], row["stop_s"], "s", computed, rate=rate)
    if place[1].layout == CLIP_FILES:
        if second:
            return Media(path, second, frames=row["flow_stop"] - row["flow_start"])
        return Media(path, computed=computed, frames=row["stop"] - row["start"], rate=RATE)
    # File names carry the annotation's numbers; spans count from the folder's first number, 0 or 1.
    base = counts_from(path, second)
    first, last = (row["flow_start"], row["flow_stop"]) if second else (row["start"], row["stop"])
    start = max(first - base, 0)
    return Media(path, second, start, start + last - first, "frame", computed)


# --- the tables ----------------------------------------------------------------------------------------------------


def _read_splits(folder: Path, domains: tuple[str, ...]) -> SplitTables:
    """The rows of all tables as fields, and what is unusual about them.

    Raises:
        ManifestError: tables are missing, or rows wrong.
    """
    absent = [
        f"{domain}_{split}"
        for domain in domains
        for split in SPLITS
        if not any((folder / f"{domain}_{split}.{end}").is_file() for end in ("csv", "pkl"))
    ]
    if absent:
        raise ManifestError(
            f"{folder}: there are no tables {', '.join(absent)} (.csv or .pkl).",
            "Complete the split folder, or choose domains with --set dataset.domains=...",
        )
    rows: list[Row] = []
    warnings: list[str] = []
    problems: list[str] = []
    for domain in domains:
        for split in SPLITS:
            path, *others = [p for end in ("csv", "pkl") if (p := folder / f"{domain}_{split}.{end}").is_file()]
            listed = _rows(path, domain, split, problems)
            if others and not problems and (differing := _differing(listed, others[0], domain, split)):
                warnings.append(f"{path.name} is taken, and {others[0].name} beside it {differing}")
            rows += listed
            expected = CLIPS[domain, split]
            if len(listed) != expected and not problems:
                warnings.append(f"{path.name}: {len(listed)} clips where the published split has {expected}")
            others = {row["participant"] for row in listed} - {PARTICIPANTS[domain]}
            if others:
                warnings.append(
                    f"{path.name}: {domain} is kitchen {PARTICIPANTS[domain]}, and it holds {', '.join(sorted(others))}"
                )
    check_rows(folder, rows, problems)
    return SplitTables(folder, rows, VERBS, domains, warnings)


def _differing(rows: list[Row], path: Path, domain: str, split: str) -> str:
    """How another table of the same clips differs, or an empty string."""
    problems: list[str] = []
    try:
        others = _rows(path, domain, split, problems)
    except ManifestError:
        return "cannot be read"
    if problems:
        return f"is wrong ({problems[0]})"
    by_id = {row["id"]: row for row in others}
    differing = [row["id"] for row in rows if by_id.get(row["id"]) != row]
    differing += sorted(by_id.keys() - {row["id"] for row in rows})
    return f"differs in {len(differing)} clips, the first {differing[0]}" if differing else ""


def _rows(path: Path, domain: str, split: str, problems: list[str]) -> list[Row]:
    table = read_table(path)
    lacking = [name for name in COLUMNS if name not in table]
    if lacking:
        problems.append(f"{path.name}: it lacks the columns {', '.join(lacking)}")
        return []
    rows = []
    numbers = table.get("uid", list(range(len(table["video_id"]))))
    for line, (uid, *cells) in enumerate(zip(numbers, *(table[name] for name in COLUMNS), strict=True), start=1):
        try:
            rows.append(_row(str(uid), [str(cell) for cell in cells], domain, split))
        except ValueError as error:
            problems.append(f"{path.name}, row {line}: {error}")
    return rows


def _row(uid: str, cells: list[str], domain: str, split: str) -> Row:
    participant, video, start_at, stop_at, start, stop, verb = cells
    for what, value in (("uid", uid), ("participant_id", participant), ("video_id", video)):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", value):  # they become parts of paths
            raise ValueError(f"{what} {value!r} is no such name")
    label = check_label(verb, len(VERBS))
    if label is None:
        raise ValueError(f"verb_class {verb!r} is not one of 0 to {len(VERBS) - 1}")
    first, last = whole_number(start), whole_number(stop)
    for what, value, number in (("start_frame", start, first), ("stop_frame", stop, last)):
        if number is None:
            raise ValueError(f"{what} {value!r} is not a frame number")
    begin, end = seconds(start_at), seconds(stop_at)
    if not 0 <= first < last:
        raise ValueError(f"frames {first} to {last} are no span")
    if not begin < end:
        raise ValueError(f"time stamps {start_at} to {stop_at} are no span")
    flow_start = math.ceil(first / 2)
    return {
        "id": f"{video}-{uid}",
        "domain": domain,
        "split": split,
        "participant": participant,
        "video": video,
        "group": video,
        "label": label,
        "start": first,
        "stop": last,
        "start_s": begin,
        "stop_s": end,
        "flow_start": flow_start,
        "flow_stop": flow_start + (last - first) // 2,
    }


def seconds(stamp: str) -> float:
    """ "00:01:02.50" -> 62.5.

    Raises:
        ValueError: not a time stamp.
    """
    if not re.fullmatch(r"\d{1,4}:\d\d?:\d\d?(\.\d{0,12})?", stamp):
        raise ValueError(f"{stamp[:40]!r} is not a time stamp (HH:MM:SS.ss)")
    hours, minutes, rest = stamp.split(":")
    return (int(hours) * 60 + int(minutes)) * 60 + float(rest)
