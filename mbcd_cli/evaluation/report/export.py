"""Predictions and embeddings as files: CSV for people and tables, HDF5 for programs.

Letters: N clips, C classes, D_k features of modality k.
"""

from __future__ import annotations

import heapq
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mbcd_cli.checksums import verified
from mbcd_cli.data.clips import Digest, chunks
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import FOREIGN, RunError
from mbcd_cli.files import open_hdf5, written_hdf5
from mbcd_cli.scoring.metrics import predicted, probabilities
from mbcd_cli.scoring.predictions import Predictions

ClipRow = dict[str, str | float]
"""Column -> cell, of a CSV file."""


OUTCOMES = "evaluation/outcomes.h5"
"""Where a run has the outcomes of its evaluation."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What the deployed model got right, clip by clip: what comparing runs needs.

    Attributes:
        digest: of the clips' ids, in order: outcomes of one digest are of the same clips.
        correct: [N] bool. recordings: [N] int, `ClipTable.recordings`.
    """

    digest: str
    correct: np.ndarray
    recordings: np.ndarray


def write_outcomes(predictions: Predictions, dataset: Dataset, output: Path) -> Path:
    """Write which of N clips the fused head gets right, as `OUTCOMES` under `output`."""
    clips, digest = predictions.clips.numpy(), Digest()
    for chunk in chunks(clips.tolist()):
        digest.add([dataset.clips.ids[clip] for clip in chunk])
    with written_hdf5(output / OUTCOMES) as file:
        file.attrs["digest"] = digest.hexdigest()
        for name, values in (
            ("correct", predicted(predictions.fused) == predictions.labels.numpy()),
            ("recordings", dataset.clips.recordings[clips].astype(np.int32)),
        ):
            file.create_dataset(name, data=values, compression="gzip")
    return output / OUTCOMES


def read_outcomes(run: Path) -> Outcomes:
    """What `write_outcomes` wrote of a run.

    Raises:
        RunError: it is not there, or damaged.
    """
    path = run / OUTCOMES
    try:
        verified(path)
        with open_hdf5(path) as file:
            return Outcomes(str(file.attrs["digest"]), file["correct"][()].astype(bool), file["recordings"][()])
    except (OSError, *FOREIGN) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise RunError(f"{path} {why}.", f"Run `mbcd evaluate --run {shlex.quote(str(run))}` again.") from error


@dataclass(frozen=True, slots=True)
class HardestClips:
    """The set of clips they are of, and their rows, the least probable label first."""

    clips: str
    rows: list[ClipRow]


def _votes(predictions: Predictions, label_names: Sequence[str]) -> dict[str, tuple[list[str], np.ndarray]]:
    """Prefix of a head's columns -> (N predicted classes, "" where there is none; their probabilities [N])."""
    return {
        "" if head == "fused" else f"{head}_": (
            ["" if label < 0 else label_names[label] for label in predicted(logits)],
            probabilities(logits).max(axis=1),
        )
        for head, logits in predictions.heads.items()
    }


def prediction_rows(
    predictions: Predictions,
    *,
    ids: Sequence[str],
    label_names: Sequence[str],
    domain_names: Sequence[str],
) -> Iterator[ClipRow]:
    """One row per clip: id, domain, label, predicted class and probability, and every modality's own vote.

    Each is made when it is asked for.

    Args:
        predictions: of N labelled clips.
        ids: of the whole clip table, indexed by `predictions.clips`.
        label_names: C names. domain_names: those that `predictions.domains` indexes.
    """
    votes, labels = _votes(predictions, label_names), predictions.labels.numpy()
    of_label = probabilities(predictions.fused)[np.arange(len(labels)), labels]
    for n, clip in enumerate(predictions.clips.tolist()):
        domain, label = domain_names[int(predictions.domains[n])], label_names[labels[n]]
        row: ClipRow = {"id": ids[clip], "domain": domain, "label": label}
        for prefix, (classes, p) in votes.items():
            row |= {f"{prefix}predicted": classes[n], f"{prefix}probability": round(float(p[n]), 6)}
            if prefix == "":
                row["label_probability"] = round(float(of_label[n]), 6)
        yield row


def write_hdf5(
    predictions: Predictions,
    path: Path,
    *,
    ids: Sequence[str],
    label_names: Sequence[str],
    domain_names: Sequence[str],
) -> Path:
    """Write ids, labels, domains, logits/<head> [N, C] and features/<modality> [N, D_k] as HDF5."""
    with written_hdf5(path) as file:
        text = h5py.string_dtype()
        file.create_dataset("id", data=np.array([ids[i] for i in predictions.clips.tolist()], object), dtype=text)
        file.create_dataset("label", data=predictions.labels.numpy())
        file.create_dataset("domain", data=predictions.domains.numpy())
        file.create_dataset("label_names", data=np.array(label_names, object), dtype=text)
        file.create_dataset("domain_names", data=np.array(domain_names, object), dtype=text)
        for name, logits in predictions.heads.items():
            file.create_dataset(f"logits/{name}", data=logits.numpy())
        for name, features in (predictions.features or {}).items():
            file.create_dataset(f"features/{name}", data=features.numpy())
    return path


def vote_rows(
    predictions: Predictions, *, ids: Sequence[str], label_names: Sequence[str], domain_names: Sequence[str] = ()
) -> list[ClipRow]:
    """One row per new clip: clip, class and probability, and the class and probability of every modality's vote.

    A clip without a prediction (non-finite outputs) has an empty class and probability 0. Where any label is known
    (0 or more) `label` and `label_probability` follow, empty for the clips whose label is not.

    Args:
        predictions: of N clips; a label below 0 is not known.
        ids: of the whole clip table, indexed by `predictions.clips`.
        label_names: C names. domain_names: adds the column `domain`.
    """
    votes, labels = _votes(predictions, label_names), predictions.labels.tolist()
    fused = probabilities(predictions.fused)
    rows = []
    for n, clip in enumerate(predictions.clips.tolist()):
        row: ClipRow = {"clip": ids[clip]}
        if domain_names:
            row["domain"] = domain_names[int(predictions.domains[n])]
        for prefix, (classes, p) in votes.items():
            row |= {f"{prefix}class": classes[n], f"{prefix}probability": round(float(p[n]), 6)}
        if max(labels) >= 0:
            labelled = labels[n] >= 0
            row["label"] = label_names[labels[n]] if labelled else ""
            row["label_probability"] = round(float(fused[n, labels[n]]), 6) if labelled else ""
        rows.append(row)
    return rows


def hardest_rows(rows: Iterable[ClipRow], count: int) -> list[ClipRow]:
    """The `count` rows (of `prediction_rows`) whose label got the least probability, the least first."""
    return heapq.nsmallest(count, rows, key=lambda row: (row["label_probability"], row["id"]))
