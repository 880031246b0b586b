"""What generated datasets have in common: a marker, a manifest; of vectors one .npy per clip and modality.

Letters: N clips, D values.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing, manifest
from mbcd_cli.data.records import SPLITS
from mbcd_cli.errors import ManifestError
from mbcd_cli.files import rename, sync_all
from mbcd_cli.locks import folder_aside
from mbcd_cli.settings import DatasetSettings

_MARKER = "generated.json"


@dataclass(frozen=True, slots=True)
class Vectors:
    """A generated dataset in memory.

    Attributes:
        values: modality -> [N, D] float32.
        labels, domains, splits: [N] class, index of the domain, 0 train or 1 test.
        domain_names, label_names: by index.
    """

    values: Mapping[str, np.ndarray]
    labels: np.ndarray
    domains: np.ndarray
    splits: np.ndarray
    domain_names: Sequence[str]
    label_names: Sequence[str]


def marker_of(root: Path) -> dict[str, object] | None:
    """What fixes the generated dataset in `root`, or None where there is no whole one."""
    try:
        marker = json.loads((root / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def generate(root: Path, marker: Mapping[str, object], fill: Callable[[Path], None]) -> None:
    """Have `root` hold the dataset of this marker, whole or not at all; nothing is done where it does.

    Args:
        fill: writes the dataset into an empty folder.

    Raises:
        ManifestError: `root` holds something else, or cannot be written.
    """
    root = root.absolute()
    if marker_of(root) == marker:
        return
    try:
        with folder_aside(root) as aside:
            holding = marker_of(root)
            if holding == marker:  # another process was quicker
                return
            if root.exists() and (not root.is_dir() or any(root.iterdir())):
                what = "another generated dataset" if holding is not None else "something else"
                raise ManifestError(f"{root} holds {what}.", "Remove it, or choose another folder with --root.")
            fill(aside)
            (aside / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
            sync_all(aside)
            rename({aside: root})
    except OSError as error:
        raise ManifestError(f"{root} cannot be written: {error}", "Choose another folder with --root.") from error


def write_vectors(folder: Path, data: Vectors) -> None:
    """`data` as `<modality>/<id>.npy` and manifest.csv."""
    for name in data.values:
        (folder / name).mkdir()
    rows = []
    for index, label in enumerate(data.labels):
        clip = f"c{index:05d}"
        for name, values in data.values.items():
            np.save(folder / name / f"{clip}.npy", values[index].astype(np.float32))
        domain, split = data.domain_names[data.domains[index]], SPLITS[data.splits[index]]
        files = [f"{name}/{clip}.npy" for name in data.values]
        rows.append([clip, domain, split, int(label), data.label_names[label], *files])
    write_manifest(folder, list(data.values), rows)


def write_manifest(folder: Path, modalities: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """manifest.csv of rows (id, domain, split, label, label_name, one file per modality)."""
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([["id", "domain", "split", "label", "label_name", *modalities], *rows])


def read_vectors(
    dataset: DatasetSettings, modalities: Mapping[str, Modality], *, root: Path, has: Sequence[str]
) -> Listing:
    """The clips of a generated dataset in `root`, by default with all modalities that it has."""
    asked = modalities or {name: ArrayModality() for name in has}
    return manifest.read(dataset.model_copy(update={"root": root}), asked)
