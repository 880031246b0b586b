"""`mbcd evaluate --run RUN --data-root DIR`: predict new clips with a trained model, from media to predict.csv."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from mbcd_cli.data.dataset import CachedDataset, ModalityCache
from mbcd_cli.data.readers.new_clips import UNKNOWN, given, read_new
from mbcd_cli.data.records import Rejected
from mbcd_cli.evaluation.report.export import ClipRow, vote_rows
from mbcd_cli.evaluation.report.results import provenance
from mbcd_cli.files import write_json, write_rows
from mbcd_cli.json_values import json_values
from mbcd_cli.preparation.answer import Prepared
from mbcd_cli.preparation.prepare import prepare_listing
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.deployed import build_models, deployed
from mbcd_cli.scoring.metrics import HeadFigures, figures_of_heads
from mbcd_cli.scoring.predictions import predict
from mbcd_cli.settings import ManifestSettings, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFigures:
    """What predict.json holds.

    Attributes:
        checkpoint, model: what predicted.
        clips: in the table. predicted: those of them that could be used. labelled: those whose class is known.
        classes: class -> clips predicted as it, "" for those without a prediction.
        accuracy: head -> figures on the labelled clips; None without any.
        rejected: clips that could not be used, and why.
    """

    checkpoint: str
    model: str
    clips: int
    predicted: int
    labelled: int
    classes: dict[str, int]
    accuracy: dict[str, HeadFigures] | None
    rejected: list[Rejected]
    data_root: str
    provenance: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted(NewFigures):
    """What `predict_new` returns: name -> path of what it wrote; 3 where more clips were rejected than `max_bad`."""

    files: dict[str, Path]
    exit_code: int
    max_bad: str


def predict_new(
    settings: Settings,
    checkpoints: Mapping[str, Checkpoint],
    *,
    root: Path | None,
    manifest: Path | None,
    cache_dir: Path | None,
    output: Path | None,
    device: torch.device,
    max_bad: str = "0",
    say: Say = SILENT,
) -> Predicted:
    """Prepare new clips as the run's own were, and predict them with the deployed model.

    Args:
        settings: the run's.
        checkpoints: best / last -> checkpoint; the deployed one is used.
        root, manifest: the new data, as `readers.new_clips` reads it.
        cache_dir: folder that keeps what is prepared, so that a second run decodes nothing; None uses a temporary one.
        output: folder for predict.csv, predict.json and rejected.csv; None makes one named after the data.
        max_bad: rejected clips tolerated before `exit_code` is 3.

    Raises:
        ManifestError: the table is wrong. CacheError: all clips were rejected.
        CheckpointError: the trunk's weights are not those of the run.
    """
    root, manifest = given(manifest, root)
    label_names = next(iter(checkpoints.values())).label_names
    # The run's limits on bad media hold; where the clips lie does not.
    dataset = settings.dataset.model_copy(
        update={
            "reader": ManifestSettings(manifest=manifest),
            "root": root,
            "name": None,
            "domains": (),
            "classes": len(label_names),
            "target_split": "test",
            "compute_flow": True,
            "max_bad": max_bad,
        }
    )
    names = settings.model.modalities or tuple(settings.modalities)
    wanted = {name: settings.modalities[name] for name in names}
    if settings.cache.live_trunks:  # decoded views are all that the model needs: the checkpoint holds the trunks
        whole_view = {"cut": "input", "weights": None}
        wanted = {name: modality.model_copy(update=whole_view) for name, modality in wanted.items()}
    listing = read_new(dataset, wanted, label_names=label_names)
    # Never the name of a prepared dataset: `train` and `evaluate` must not find these clips in its place.
    listing.name = f"new-{listing.name}"
    with _cache(cache_dir) as folder:
        cache = settings.cache.model_copy(update={"dir": Path(folder)})
        whole = settings.model_copy(update={"dataset": dataset, "cache": cache})
        prepared = prepare_listing(whole, listing, say=say)
        caches = {name: ModalityCache(Path(prepared.modalities[name].folder)) for name in names}
        clips = CachedDataset(listing.name, caches, {name: settings.modalities[name] for name in names})
        figures, rows = _predicted(whole, clips, checkpoints, prepared, device, say)
    folder = output or Path(listing.name.replace("new-", "predict-", 1))
    files = {"predictions": write_rows(folder / "predict.csv", rows)}
    if figures.rejected:
        files["rejected"] = write_rows(folder / "rejected.csv", map(asdict, figures.rejected))
    else:
        (folder / "rejected.csv").unlink(missing_ok=True)  # of an earlier time
    files["results"] = write_json(folder / "predict.json", json_values(figures))
    held = {field.name: getattr(figures, field.name) for field in fields(figures)}
    return Predicted(**held, files=files, exit_code=prepared.exit_code, max_bad=max_bad)


def _cache(folder: Path | None) -> AbstractContextManager[str | Path]:
    return nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory(prefix="mbcd-")


def _predicted(
    settings: Settings,
    dataset: CachedDataset,
    checkpoints: Mapping[str, Checkpoint],
    prepared: Prepared,
    device: torch.device,
    say: Say,
) -> tuple[NewFigures, list[ClipRow]]:
    """Figures and the rows of predict.csv."""
    checkpoint, name = deployed(checkpoints)
    model = build_models(settings, dataset, checkpoints[checkpoint], device=device, source=checkpoint)[name]
    evaluation = settings.evaluation
    clips = dataset.select(domains=dataset.domains)
    batches = say.over(dataset.batches(clips, batch_size=evaluation.batch_size, training=False), "predicting, batches")
    predictions = predict(model, batches, device=device, precision=settings.runtime.precision)
    named = dataset.domains if len(dataset.domains) > 1 else ()
    rows = vote_rows(predictions, ids=dataset.clips.ids, label_names=dataset.label_names, domain_names=named)
    labelled, accuracy = predictions.labels != UNKNOWN, None
    if labelled.any():
        names = {"label_names": list(dataset.label_names), "domain_names": list(dataset.domains)}
        accuracy = figures_of_heads(predictions.rows(labelled), **names, k=evaluation.top_k)
    figures = NewFigures(
        checkpoint=checkpoint,
        model=name,
        clips=prepared.clips,
        predicted=len(rows),
        labelled=int(labelled.sum()),
        classes=dict(Counter(str(row["class"]) for row in rows).most_common()),
        accuracy=accuracy,
        rejected=prepared.rejected,
        data_root=str(settings.dataset.root),
        provenance=provenance(dataset, {checkpoint: checkpoints[checkpoint]}, device),
    )
    return figures, rows
