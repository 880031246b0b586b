"""Clips that a trained model is to predict: a manifest in which only the media's columns are needed.

`id`, `domain`, `split`, `label` and `label_name` may be missing, cells of the labels may be empty, and columns of
other names are passed over. A class is known by its name where there is one, else by its number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mbcd_cli.data.clips import Clips
from mbcd_cli.data.modalities import infer_kind
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.csv_table import CsvTable, read_bytes
from mbcd_cli.data.readers.manifest import GROUP_COLUMN, RATE, REQUIRED, SPANS, default_name, locate_table, parse
from mbcd_cli.errors import ManifestError
from mbcd_cli.naming import name_faults
from mbcd_cli.settings import DatasetSettings

UNKNOWN = -1
"""Label of a clip whose class nobody has told."""
DOMAIN = "new"
"""Domain of clips whose table names none."""


def read_new(dataset: DatasetSettings, modalities: Mapping[str, Modality], *, label_names: Sequence[str]) -> Listing:
    """The listing of new clips, all of them of the test split; `UNKNOWN` labels where the table has none.

    Args:
        dataset: `root`, `name`, `compute_flow` and the reader's `manifest`.
        modalities: those that the model reads, with its settings.
        label_names: the model's classes.

    Raises:
        ManifestError: the table is missing, or wrong; all bad lines are listed together.
    """
    root, path = locate_table(dataset)
    table = CsvTable(read_bytes(path))
    notes, labels, foreign = _completed(table, modalities, label_names)
    with_classes = dataset.model_copy(update={"classes": len(label_names)})
    parsed = parse(table, with_classes, modalities, root=root, path=path)
    names = {**dict(enumerate(label_names)), UNKNOWN: ""}
    clips = Clips(replace(clip, label=labels[clip.id], label_name=names[labels[clip.id]]) for clip in parsed.clips)
    return Listing(
        name=dataset.name or default_name(root, path),
        clips=clips,
        domains=clips.domain_names,
        label_names=tuple(label_names),
        modalities=parsed.modalities,
        notes=notes + parsed.notes,
        warnings=[_foreign_line(foreign, label_names)] if foreign else [],
    )


def given(manifest: Path | None, root: Path | None) -> tuple[Path, Path]:
    """(root, manifest) of new clips from what was named: the manifest's folder is the root where none is named.

    Raises:
        ManifestError: neither was named.
    """
    if root is None:
        if manifest is None:
            raise ManifestError("No new data is named.", "Use --data-root DIR, --manifest FILE or both.")
        return manifest.parent, Path(manifest.name)
    if manifest is None:
        return root, Path("manifest.csv")
    # Relative to the root, as for `prepare`; a path that only leads somewhere from here is taken as typed.
    return root, manifest if (root / manifest).is_file() or not manifest.is_file() else manifest.resolve()


def _completed(
    table: CsvTable, modalities: Mapping[str, Modality], label_names: Sequence[str]
) -> tuple[list[str], dict[str, int], Counter[str]]:
    """Give `table` every column that a manifest must have; return notes, id -> label, and classes the model lacks."""
    width = len(table.header)
    for line, cells in table.rows:
        if len(cells) != width:
            table.problems.append((line, f"{len(cells)} cells where the header has {width}"))
    table.rows = [(line, cells) for line, cells in table.rows if len(cells) == width]
    keep = [i for i, name in enumerate(table.header) if _is_known(name, modalities)]
    passed = [name for name in table.header if not _is_known(name, modalities)]
    header = [table.header[i] for i in keep]
    rows = [(line, {table.header[i]: cells[i] for i in keep}) for line, cells in table.rows]
    ids = _ids(rows, header, modalities)
    labels: dict[str, int] = {}
    foreign: Counter[str] = Counter()
    filled = []
    for (line, cells), identity in zip(rows, ids, strict=True):
        label, fault = _label(cells, label_names)
        if fault:
            table.problems.append((line, fault))
        if label == UNKNOWN and cells.get("label_name"):
            foreign[cells["label_name"]] += 1
        labels[identity] = label
        cells |= {
            "id": identity,
            "domain": cells.get("domain") or DOMAIN,
            "split": "test",
            "label": str(max(label, 0)),
            "label_name": "",
        }
        filled.append((line, cells))
    if header:
        header += [name for name in (*REQUIRED, "label_name") if name not in header]
    table.header = header
    table.rows = [(line, [cells[name] for name in header]) for line, cells in filled]
    if foreign and all(label == UNKNOWN for label in labels.values()):
        table.problems.append((rows[0][0], f"the model knows {_shown(label_names)}, and no class that is named here"))
    return [f"columns passed over: {', '.join(passed)}"] if passed else [], labels, foreign


def _foreign_line(foreign: Counter[str], label_names: Sequence[str]) -> str:
    names = _shown([f"{name} ({count})" for name, count in foreign.most_common()])
    return (
        f"{foreign.total()} clips are of classes that the model does not know: {names}. They are predicted, and "
        f"left out of the accuracy (it knows {_shown(label_names)})."
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _is_known(name: str, modalities: Mapping[str, Modality]) -> bool:
    return (
        name in (*REQUIRED, "label_name", RATE, GROUP_COLUMN)
        or name in SPANS
        or name in modalities
        or (bool(name) and infer_kind(name) is not None)
    )


def _ids(
    rows: Sequence[tuple[int, Mapping[str, str]]], header: Sequence[str], modalities: Mapping[str, Modality]
) -> list[str]:
    """The ids given; without that column the first file's names where they are distinct, else the line numbers."""
    if "id" in header:
        return [cells["id"] for _, cells in rows]
    first = next((name for name in header if name in modalities or infer_kind(name) is not None), None)
    stems = [PurePosixPath(cells[first]).stem for _, cells in rows] if first else []
    if stems and len(set(stems)) == len(stems) and not any(name_faults("id", stem) for stem in stems):
        return stems
    return [f"line-{line}" for line, _ in rows]


def _label(cells: Mapping[str, str], label_names: Sequence[str]) -> tuple[int, str]:
    """(label, what is wrong with it)."""
    name, number = cells.get("label_name", ""), cells.get("label", "")
    if name:
        return list(label_names).index(name) if name in label_names else UNKNOWN, ""
    if not number:
        return UNKNOWN, ""
    if number.isdecimal() and int(number) < len(label_names):
        return int(number), ""
    return UNKNOWN, f"label {number!r} is none of the model's {len(label_names)} classes (0 to {len(label_names) - 1})"
