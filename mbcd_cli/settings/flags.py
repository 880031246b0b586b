"""The one table from a setting to its flag; its help, type and choices are those of the setting."""

from __future__ import annotations

import re

FLAGS = {
    "dataset.reader": "DATASET",
    "dataset.root": "--root",
    "dataset.reader.manifest": "--manifest",
    "dataset.name": "--dataset --name",
    "dataset.compute_flow": "--compute-flow/--no-compute-flow",
    "dataset.max_bad": "--max-bad",
    "dataset.missing_frames": "--missing-frames",
    "model.modalities": "--modalities",
    "method.name": "--method",
    "optimizer.lr": "--lr",
    "training.target_domain": "--target-domain",
    "training.source_domains": "--source-domains",
    "training.epochs": "--epochs",
    "training.chassis": "--chassis",
    "training.batch_size": "--batch-size",
    "training.seed": "--seed",
    "training.limit_clips": "--limit-clips",
    "training.max_steps": "--max-steps",
    "evaluation.analyses": "--analyses",
    "evaluation.export": "--export",
    "adapt.rule": "--rule",
    "cache.dir": "--cache-dir",
    "cache.views": "--views",
    "cache.workers": "--workers",
    "cache.weights_dir": "--weights-dir",
    "cache.random_weights": "--random-weights",
    "runtime.device": "--device",
    "runtime.threads": "--threads",
}
"""Setting -> its flag; a name without dashes is an argument, and needed."""


def flag_of(path: str) -> str:
    """The flag of a setting as a user writes it, for messages: --cache-dir."""
    return re.split("[ /]", FLAGS[path])[0] if path in FLAGS else "the command line"
