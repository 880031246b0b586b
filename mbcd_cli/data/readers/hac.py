"""HAC (Human-Animal-Cartoon): three domains, seven actions (Dong et al., NeurIPS 2023; docs/datasets.md).

Split tables are HAC_train_only_human.csv, ... with rows `file.mp4,label` and no header; media lie in
`{domain}/videos/x.mp4`, `{domain}/flow/x_flow_x.mp4` and `x_flow_y.mp4`, `{domain}/audio/x.wav`.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
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
)
from mbcd_cli.data.records import SPLITS, Media
from mbcd_cli.settings import DatasetSettings

DOMAINS = ("human", "animal", "cartoon")
ACTIONS = ("sleeping", "watching tv", "eating", "drinking", "swimming", "running", "opening door")
CLIPS = {
    ("human", "train"): 1111,
    ("human", "test"): 276,
    ("animal", "train"): 730,
    ("animal", "test"): 176,
    ("cartoon", "train"): 870,
    ("cartoon", "test"): 218,
}
SPLIT_FOLDERS = ("HAC_Splits", "splits")
PLACES = {
    "video": (MediaLayout("one file per clip", "{domain}/videos/{file}"),),
    "flow": (MediaLayout("one file per clip", "{domain}/flow/{stem}_flow_x.mp4", "{domain}/flow/{stem}_flow_y.mp4"),),
    "audio": (MediaLayout("one wav per clip", "{domain}/audio/{stem}.wav"),),
}


def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The clips of the selected domains; media are looked for, but not opened.

    The sound of a clip carries its video as `clock`, or its flow where `modalities.audio.follow` names that, so that
    its span can follow the frames a view samples. A modality of which nothing at all is on disk is left out with a
    warning.

    Args:
        dataset: `root`, `reader.splits`, `name`, `domains` and `compute_flow`.
        modalities: at most one per kind; empty means video, audio and flow.

    Raises:
        ManifestError: no root, no split tables, an unknown domain, a wrong table (all bad rows are listed), or no
            media of any modality.
        SettingsError: a modality of a kind that the dataset does not have.
    """
    root = root_of(dataset)
    domains = pick_domains(dataset, DOMAINS)
    asked = by_kind(modalities)
    names = [f"HAC_{split}_only_{domain}.csv" for domain in domains for split in SPLITS]
    splits = split_folder(dataset, root, SPLIT_FOLDERS, names)
    tables = _read_splits(splits, domains)
    disk = Disk()
    bases = list(dict.fromkeys([root, root / "HAC", splits, *([root.parent] if root == splits else [])]))
    media_of = {kind: find_media(tables.rows, PLACES[kind], bases, disk) for kind in asked}
    # The video tells where the other files should be, and the sound its times.
    videos = find_media(tables.rows, PLACES["video"], bases, disk) if "video" not in media_of else media_of["video"]
    follows_flow = _follows_flow(asked) and (dataset.compute_flow or bool(media_of["flow"].hits))
    return listing_of(
        *(dataset.name or "hac", tables, asked, media_of, partial(_media, media_of, videos, follows_flow)),
        root=root,
        places=PLACES,
        computed="the videos" if dataset.compute_flow and videos.hits else None,
        remedies=MAKES_FLOW,
        holds="human/, animal/ and cartoon/",
    )


def _follows_flow(asked: Mapping[str, tuple[str, Modality]]) -> bool:
    """Whether the sound's span is told by the flow's frames, as the protocol does where there is no video."""
    follow = asked["audio"][1].guide if "audio" in asked else None
    return follow is not None and "flow" in asked and follow == asked["flow"][0]


def _media(media_of: Mapping[str, Found], videos: Found, follows_flow: bool, kind: str, index: int, row: Row) -> Media:
    video = Path(path_of(videos.places[index], row))
    if kind == "flow" and not media_of[kind].hits:
        return Media(video, computed=1)
    place = media_of[kind].places[index]
    path = Path(path_of(place, row))
    if kind == "flow":
        return Media(path, Path(path_of(place, row, second=True)), clock=video if videos.hits else None)
    if kind == "audio" and follows_flow:
        computed = int(not media_of["flow"].hits)
        return Media(
            path, clock=video if computed else Path(path_of(media_of["flow"].places[index], row)), computed=computed
        )
    return Media(path, clock=video) if kind == "audio" and videos.hits else Media(path)


def _read_splits(folder: Path, domains: tuple[str, ...]) -> SplitTables:
    """The rows of all tables as fields, and what is unusual about them.

    Raises:
        ManifestError: tables are missing, or rows wrong.
    """
    rows: list[Row] = []
    warnings: list[str] = []
    problems: list[str] = []
    for domain in domains:
        for split in SPLITS:
            path = folder / f"HAC_{split}_only_{domain}.csv"
            listed = _rows(path, domain, split, problems)
            rows += listed
            if len(listed) != CLIPS[domain, split] and not problems:
                expected = CLIPS[domain, split]
                warnings.append(f"{path.name}: {len(listed)} clips where the published split has {expected}")
        both = Counter(row["file"] for row in rows if row["domain"] == domain)
        shared = sum(count > 1 for count in both.values())
        if shared:
            warnings.append(
                f"{domain}: {shared} files are both in the train and in the test split (as published): "
                "validation on this domain is a little too good"
            )
        labels: dict[str, set[int]] = {}
        for row in (row for row in rows if row["domain"] == domain):
            labels.setdefault(row["file"], set()).add(row["label"])
        if odd := [file for file, several in labels.items() if len(several) > 1]:
            warnings.append(f"{domain}: {len(odd)} files have two labels, the first {odd[0]} (in train and in test)")
    check_rows(folder, rows, problems)
    return SplitTables(folder, rows, ACTIONS, domains, warnings)


def _source(stem: str) -> Row:
    """The YouTube video that a clip was cut from and, where its name tells, between which seconds."""
    match = re.fullmatch(r"([\w-]{11})(?:_(\d{6})_(\d{6})|-\d{3})", stem)
    if not match:
        return {}
    span = {} if match[2] is None else {"start": int(match[2]), "stop": int(match[3])}
    return {"group": match[1], **span}


def _rows(path: Path, domain: str, split: str, problems: list[str]) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            table = [(line, row) for line, row in enumerate(csv.reader(stream), start=1) if any(row)]
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
        return []
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{path.name}: not a UTF-8 CSV table ({error})")
        return []
    rows = []
    for line, cells in table:
        if len(cells) != 2:
            problems.append(f"{path.name}, line {line}: {len(cells)} cells where file,label are expected")
            continue
        file, label = cells[0], check_label(cells[1], len(ACTIONS))
        stem, _, suffix = file.rpartition(".")
        if not stem or not suffix or file.startswith(".") or any(c in file for c in "/\\\0"):
            problems.append(f"{path.name}, line {line}: {file!r} is no file name")
        elif label is None:
            problems.append(f"{path.name}, line {line}: label {cells[1]!r} is not one of 0 to {len(ACTIONS) - 1}")
        else:
            fields = {"domain": domain, "split": split, "file": file, "stem": stem, "label": label}
            rows.append({"id": f"{domain}-{split}-{stem}", **fields, **_source(stem)})
    return rows
