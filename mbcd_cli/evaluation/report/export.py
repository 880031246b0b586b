"""Predictions and embeddings as files: CSV for people and tables, HDF5 for programs.

Letters: N clips, C classes, D_k features of modality k.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mbcd_cli.files import written_hdf5
from mbcd_cli.scoring.metrics import predicted, probabilities
from mbcd_cli.scoring.predictions import Predictions


def _said(predictions: Predictions, label_names: Sequence[str]) -> dict[str, tuple[list[str], np.ndarray]]:
    """Prefix of a head's columns -> (N predicted classes, "" where there is none; probabilities [N, C])."""
    heads = {"": predictions.fused, **{f"{name}_": logits for name, logits in predictions.unimodal.items()}}
    return {
        prefix: (["" if k < 0 else label_names[k] for k in predicted(logits)], probabilities(logits))
        for prefix, logits in heads.items()
    }


def prediction_rows(
    predictions: Predictions,
    *,
    ids: Sequence[str],
    label_names: Sequence[str],
    domain_names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """One row per clip: id, domain, label, predicted class and probability, and every modality's own vote.

    Each is made when it is asked for.

    Args:
        ids: of the whole clip table, indexed by `predictions.clips`.
    """
    heads = {"": predictions.fused, **{f"{n}_": logits for n, logits in predictions.unimodal.items()}}
    said = {prefix: (predicted(logits), probabilities(logits).max(axis=1)) for prefix, logits in heads.items()}
    labels = predictions.labels.numpy()
    p_label = probabilities(predictions.fused)[np.arange(len(labels)), labels]
    for n, clip in enumerate(predictions.clips.tolist()):
        domain, label = domain_names[int(predictions.domains[n])], label_names[labels[n]]
        row: dict[str, Any] = {"id": ids[clip], "domain": domain, "label": label}
        for prefix, (guess, p) in said.items():
            row[f"{prefix}predicted"] = label_names[guess[n]] if guess[n] >= 0 else ""
            row[f"{prefix}probability"] = round(float(p[n]), 6)
            if prefix == "":
                row["label_probability"] = round(float(p_label[n]), 6)
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
        for name, logits in {"fused": predictions.fused, **predictions.unimodal}.items():
            file.create_dataset(f"logits/{name}", data=logits.numpy())
        for name, features in (predictions.features or {}).items():
            file.create_dataset(f"features/{name}", data=features.numpy())
    return path


def vote_rows(
    predictions: Predictions, *, ids: Sequence[str], label_names: Sequence[str], domain_names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row per new clip: clip, class and probability, and the class and probability of every modality's vote.

    A clip without a prediction (non-finite outputs) has an empty class and probability 0. Where any label is known
    (0 or more) `label` and `label_probability` follow, empty for the clips whose label is not.

    Args:
        ids: of the whole clip table, indexed by `predictions.clips`.
        domain_names: adds the column `domain`.
    """
    said = _said(predictions, label_names)
    labels = predictions.labels.tolist()
    rows = []
    for n, clip in enumerate(predictions.clips.tolist()):
        row: dict[str, Any] = {"clip": ids[clip]}
        if domain_names:
            row["domain"] = domain_names[int(predictions.domains[n])]
        for prefix, (names, p) in said.items():
            row |= {f"{prefix}class": names[n], f"{prefix}probability": round(float(p[n].max()), 6)}
        if max(labels) >= 0:
            known = labels[n] >= 0
            row["label"] = label_names[labels[n]] if known else ""
            row["label_probability"] = round(float(said[""][1][n, labels[n]]), 6) if known else ""
        rows.append(row)
    return rows


def hardest_rows(rows: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` rows (of `prediction_rows`) whose label got the least probability, the least first."""
    return heapq.nsmallest(count, rows, key=lambda row: (row["label_probability"], row["id"]))
