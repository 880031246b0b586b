"""The results of an evaluation as one JSON-able dict, and the small files beside a run it is made from."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mbcd_cli
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import RunError
from mbcd_cli.evaluation.evaluator import Evaluated
from mbcd_cli.files import flatten, read_json
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.scoring.clip_sets import TARGET, source_domains
from mbcd_cli.settings import Settings, role_of

RESULTS_FORMAT = 2
"""Version of the layout of results.json."""


def describe_run(settings: Settings, dataset: Dataset, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """What was evaluated: dataset, method, domains, seed and checkpoints."""
    training = settings.training
    return {
        "format": RESULTS_FORMAT,
        "dataset": dataset.name,
        "fingerprints": dict(dataset.fingerprints),
        "method": settings.method.name,
        "modalities": list(settings.model.modalities or dataset.modalities),
        "target_domain": training.target_domain,
        "target_split": settings.dataset.target_split,
        "source_domains": list(source_domains(settings, dataset)),
        "seed": training.seed,
        "label_names": list(dataset.label_names),
        "settings": weights_settings(settings),
        "epochs": {name: int(checkpoint.epoch) for name, checkpoint in checkpoints.items()},
    }


def weights_settings(settings: Settings) -> dict[str, str]:
    """Dotted name -> value of every setting that trained weights depend on."""
    flat = flatten(settings.model_dump(mode="json"))
    return {key: str(value) for key, value in flat.items() if role_of(key) in ("weights", "cache")}


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, shapes, types and bytes of all weights of a checkpoint: equal weights, equal digest."""
    digest = hashlib.sha256()
    for model, state in (("student", checkpoint.student), ("teacher", checkpoint.teacher or {})):
        for name in sorted(state):
            values = state[name].detach().cpu().contiguous()
            digest.update(f"{model}.{name} {tuple(values.shape)} {values.dtype}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def provenance(dataset: Dataset, checkpoints: Mapping[str, Checkpoint], device: torch.device) -> dict[str, str]:
    """Versions, weights and caches behind the figures, flat: what -> value."""
    found = {
        "mbcd": mbcd_cli.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}, {device.type}",
    }
    for name, checkpoint in checkpoints.items():
        found[f"{name} weights, sha256"] = weights_sha256(checkpoint)
    for name, fingerprint in dataset.fingerprints.items():
        found[f"{name} cache"] = fingerprint
    for name, cache in dataset.caches.items():
        for key, value in cache.provenance.items():
            found[f"{name} cache, {key.replace('_', ' ')}"] = str(value)
    return found


def gathered_results(about: Mapping[str, Any], results: Iterable[Evaluated], chosen: tuple[str, str]) -> dict[str, Any]:
    """`about` with the figures: models[checkpoint][teacher|student][source|target][head], and the headline.

    The headline repeats the deployed (`chosen`) model's top-1 of every head on the target (without one, in-domain).
    """
    models: dict[str, Any] = {}
    for one in results:
        models.setdefault(one.checkpoint, {}).setdefault(one.model, {})[one.clip_set.name] = one.figures
    checkpoint, model = chosen
    sets = models[checkpoint][model]
    measured_on = TARGET if TARGET in sets else next(iter(sets))
    return {
        **about,
        "models": models,
        "headline": {
            "checkpoint": checkpoint,
            "model": model,
            "clips": measured_on,
            "top1": {head: figures["top1"] for head, figures in sets[measured_on].items()},
        },
    }


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluation wrote.

    Raises:
        RunError: no such file, or a damaged one.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        raise RunError(f"There is no {path}.", "Run `mbcd evaluate --run RUN` first.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}", "Evaluate that run again.") from error


def result_warnings(figures: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """What a reader of the figures should know: another cache, diverged models, absent classes."""
    found = []
    for name, checkpoint in checkpoints.items():
        trained = checkpoint.fingerprints
        changed = [m for m, f in figures["fingerprints"].items() if m in trained and trained[m] != f]
        if changed:
            found.append(f"The {name} checkpoint was trained on another cache of {', '.join(changed)}.")
    for checkpoint, models in figures["models"].items():
        for model, sets in models.items():
            for clip_set, heads in sets.items():
                bad = sum(head["unpredicted"] for head in heads.values())
                if bad:
                    found.append(
                        f"The {checkpoint} {model} diverged: {bad} non-finite outputs on {clip_set} are wrong."
                    )
    headline = figures["headline"]
    for clip_set, heads in figures["models"][headline["checkpoint"]][headline["model"]].items():
        absent = [name for name, entry in heads["fused"]["per_class"].items() if entry["clips"] == 0]
        if absent:
            found.append(f"No {clip_set} clip of class {', '.join(absent)}: left out of the mean class accuracy.")
    return found
