"""`mbcd evaluate --run RUN --data-root DIR`: predict new clips with a trained model, from media to predict.csv."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mbcd_cli.data.dataset import CachedDataset, ModalityCache
from mbcd_cli.data.readers.new_clips import UNKNOWN, given, read_new
from mbcd_cli.evaluation.report.export import vote_rows
from mbcd_cli.evaluation.report.results import provenance
from mbcd_cli.files import write_json, write_rows
from mbcd_cli.preparation.prepare import prepare_listing
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.deployed import build_models, deployed
from mbcd_cli.scoring.metrics import summaries
from mbcd_cli.scoring.predictions import predict
from mbcd_cli.settings import ManifestSettings, Settings


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
) -> dict[str, Any]:
    """Prepare new clips as the run's own were, and predict them with the deployed model.

    Args:
        settings: the run's.
        checkpoints: best / last -> checkpoint; the deployed one is used.
        root, manifest: the new data, as `readers.new_clips` reads it.
        cache_dir: folder that keeps what is prepared, so that a second run decodes nothing; None uses a temporary one.
        output: folder for predict.csv, predict.json and rejected.csv; None makes one named after the data.
        max_bad: rejected clips tolerated before `exit_code` is 3.

    Returns:
        What predict.json holds (clips, classes predicted, accuracy where labels are known, rejected clips,
        provenance), `files` and `exit_code`.

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
        wanted = {name: one.model_copy(update={"cut": "input", "weights": None}) for name, one in wanted.items()}
    listing = read_new(dataset, wanted, label_names=label_names)
    # Never the name of a prepared dataset: `train` and `evaluate` must not find these clips in its place.
    listing.name = f"new-{listing.name}"
    with _cache(cache_dir) as folder:
        cache = settings.cache.model_copy(update={"dir": Path(folder)})
        whole = settings.model_copy(update={"dataset": dataset, "cache": cache})
        prepared = prepare_listing(whole, listing, say=say)
        caches = {name: ModalityCache(Path(prepared.modalities[name].folder)) for name in names}
        clips = CachedDataset(listing.name, caches, {name: settings.modalities[name] for name in names})
        figures, rows = _predicted(whole, clips, checkpoints, device, say)
    folder = output or Path(listing.name.replace("new-", "predict-", 1))
    files = {"predictions": write_rows(folder / "predict.csv", rows)}
    rejected = [asdict(bad) for bad in prepared.rejected]
    if rejected:
        files["rejected"] = write_rows(folder / "rejected.csv", rejected)
    else:
        (folder / "rejected.csv").unlink(missing_ok=True)  # of an earlier time
    figures |= {"clips": prepared.clips, "rejected": rejected, "data_root": str(root)}
    files["results"] = write_json(folder / "predict.json", figures)
    return {
        **figures,
        "files": {name: str(path) for name, path in files.items()},
        "exit_code": prepared.exit_code,
        "max_bad": max_bad,
    }


def _cache(folder: Path | None) -> AbstractContextManager[str | Path]:
    return nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory(prefix="mbcd-")


def _predicted(
    settings: Settings, dataset: CachedDataset, checkpoints: Mapping[str, Checkpoint], device: torch.device, say: Say
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and the rows of predict.csv."""
    checkpoint, name = deployed(checkpoints)
    model = build_models(settings, dataset, checkpoints[checkpoint], device=device, source=checkpoint)[name]
    size = settings.evaluation.batch_size
    batches = dataset.batches(dataset.select(domains=dataset.domains), batch_size=size, training=False)
    told = say.over(batches, "predicting, batches")
    found = predict(model, told, device=device, precision=settings.runtime.precision)
    named = dataset.domains if len(dataset.domains) > 1 else ()
    rows = vote_rows(found, ids=dataset.clips.ids, label_names=dataset.label_names, domain_names=named)
    known = found.labels != UNKNOWN
    figures: dict[str, Any] = {
        "checkpoint": checkpoint,
        "model": name,
        "predicted": len(rows),
        "labelled": int(known.sum()),
        "classes": dict(Counter(row["class"] for row in rows).most_common()),
        "accuracy": None,
        "provenance": provenance(dataset, {checkpoint: checkpoints[checkpoint]}, device),
    }
    if known.any():
        figures["accuracy"] = summaries(
            found.rows(known),
            label_names=list(dataset.label_names),
            domain_names=list(dataset.domains),
            k=settings.evaluation.top_k,
        )
    return figures, rows
