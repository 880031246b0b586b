"""What generated datasets of vectors have in common: one .npy per clip and modality, a manifest, a marker.

Letters: N clips, D values.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbcd_cli.data.records import SPLITS
from mbcd_cli.errors import ManifestError

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


def is_generated(root: Path, marker: Mapping[str, Any]) -> bool:
    """Whether `root` holds this very dataset.

    Raises:
        ManifestError: it holds another one, or something else.
    """
    try:
        found = json.loads((root / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == marker:
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        what = "another generated dataset" if found is not None else "something else"
        raise ManifestError(f"{root} holds {what}.", "Remove it, or choose another folder with --root.")
    return False


def write(root: Path, data: Vectors, marker: Mapping[str, Any]) -> None:
    """Write `data` into `root`, whole or not at all: `<modality>/<id>.npy`, manifest.csv and the marker.

    Raises:
        ManifestError: it cannot be written.
    """
    root = root.absolute()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        try:
            _write(aside, data, marker)
            aside.chmod(0o755)
            aside.replace(root)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if not is_generated(root, marker):  # another process may have been quicker with the same
            raise ManifestError(f"{root} cannot be written: {error}", "Choose another folder with --root.") from error


def _write(folder: Path, data: Vectors, marker: Mapping[str, Any]) -> None:
    for name in data.values:
        (folder / name).mkdir()
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "domain", "split", "label", "label_name", *data.values])
        for index, label in enumerate(data.labels):
            clip = f"c{index:05d}"
            for name, values in data.values.items():
                np.save(folder / name / f"{clip}.npy", values[index].astype(np.float32))
            domain, split = data.domain_names[data.domains[index]], SPLITS[data.splits[index]]
            files = [f"{name}/{clip}.npy" for name in data.values]
            table.writerow([clip, domain, split, int(label), data.label_names[label], *files])
    (folder / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
