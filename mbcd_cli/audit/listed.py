"""What a dataset's tables alone tell: files named twice, recordings in both splits, overlaps, scarce classes.

Letters: N clips, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from mbcd_cli.audit.findings import Across, LabelCounts, Overlap, Recording, ScarceClass, SharedNames
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.records import SPLITS, Media

FEW = 5
"""Clips of a class below which its accuracy moves in steps of more than 20 points."""


def across(clips: Clips, members: Sequence[int]) -> Across:
    """Whether clips (rows) are in both splits, or else in several domains."""
    if len({*clips.splits[[*members]].tolist()}) > 1:
        return "train and test"
    return "domains" if len({*clips.domains[[*members]].tolist()}) > 1 else ""


def same_files(clips: Clips, modality: str) -> list[tuple[int, ...]]:
    """Sets of clips (rows) for which the table names the same span of the same files."""
    places: dict[object, list[int]] = {}
    column = clips.media[modality]
    for index in range(len(column)):
        if column.has(index):
            media = column[index]
            places.setdefault((media.path, media.path_v, media.start, media.stop, media.computed), []).append(index)
    return [tuple(members) for members in places.values() if len(members) > 1]


def by_recording(clips: Clips) -> Iterator[tuple[str, list[int]]]:
    """Name and clips (rows) of every recording of which there are two clips at least."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(clips.groups):
        if group:
            members.setdefault(group, []).append(index)
    yield from ((name, rows) for name, rows in members.items() if len(rows) > 1)


def shared_recordings(clips: Clips) -> list[Recording]:
    """Recordings of which both splits have clips, whatever the domain."""
    shared = []
    for name, rows in by_recording(clips):
        train, test = ([clips.ids[i] for i in rows if clips.splits[i] == split] for split in range(len(SPLITS)))
        if train and test:
            domains = dict.fromkeys(clips.domain_names[clips.domains[i]] for i in rows)
            shared.append(Recording(name, tuple(domains), tuple(train), tuple(test)))
    return shared


def overlaps(clips: Clips, label_names: Sequence[str]) -> list[Overlap]:
    """Pairs of clips of one recording that overlap in time and have different labels."""
    pairs = []
    for name, rows in by_recording(clips) if len(clips.spans) else ():
        timed = sorted((i for i in rows if not np.isnan(clips.spans[i, 0])), key=lambda i: clips.spans[i, 0])
        running: list[int] = []
        for index in timed:
            start, stop = clips.spans[index]
            running = [other for other in running if clips.spans[other, 1] > start]
            for other in running:
                if clips.labels[other] != clips.labels[index]:
                    shorter = min(stop - start, float(np.subtract(*clips.spans[other, ::-1])))
                    shared = min(stop, clips.spans[other, 1]) - start
                    both = (other, index)
                    pairs.append(
                        Overlap(
                            recording=name,
                            clips=(clips.ids[other], clips.ids[index]),
                            labels=(label_names[clips.labels[other]], label_names[clips.labels[index]]),
                            share=float(shared / shorter) if np.isfinite(shorter) else 1.0,
                            domain=", ".join(dict.fromkeys(clips.domain_names[clips.domains[i]] for i in both)),
                            split=" and ".join(dict.fromkeys(SPLITS[clips.splits[i]] for i in both)),
                            across=across(clips, both),
                        )
                    )
            running.append(index)
    return pairs


def label_counts(clips: Clips, classes: int) -> list[LabelCounts]:
    """Clips per class of every domain and split, and how far a domain's labels are from the others'."""
    count = np.zeros((len(clips.domain_names), len(SPLITS), classes), np.int64)
    np.add.at(count, (clips.domains, clips.splits, clips.labels), 1)
    total = count.sum(axis=(0, 1))
    found = []
    for domain, name in enumerate(clips.domain_names):
        own = count[domain].sum(axis=0)
        others = total - own
        distance = float(np.abs(own / own.sum() - others / others.sum()).sum() / 2) if others.any() else None
        found += [
            LabelCounts(name, split, tuple(row), distance)
            for split, row in zip(SPLITS, count[domain].tolist(), strict=True)
        ]
    return found


def scarce_classes(counts: Sequence[LabelCounts], label_names: Sequence[str]) -> list[ScarceClass]:
    """Classes of which a domain's split has fewer than `FEW` clips; splits without any clip are one finding each."""
    scarce = []
    for row in counts:
        if not any(row.counts):
            scarce.append(ScarceClass(row.domain, row.split, "every class", 0))
            continue
        scarce += [
            ScarceClass(row.domain, row.split, label, n)
            for label, n in zip(label_names, row.counts, strict=True)
            if n < FEW
        ]
    return scarce


def shared_names(clips: Clips, modality: str) -> list[SharedNames]:
    """Names of files (with their spans) that two domains both have, and that are not one file."""
    named: list[dict[object, set[Media]]] = [{} for _ in clips.domain_names]
    column = clips.media[modality]
    for index in range(len(column)):
        if column.has(index):
            media = column[index]
            named[clips.domains[index]].setdefault((media.path.stem, media.start, media.stop), set()).add(media)
    return [
        SharedNames((clips.domain_names[a], clips.domain_names[b]), tuple(sorted(key[0] for key in both)))
        for a, b in combinations(range(len(named)), 2)
        if (both := [key for key in named[a].keys() & named[b].keys() if named[a][key] != named[b][key]])
    ]
