"""The results of an evaluation, as results.json holds them, and what they say of the run they are of."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mbcd_cli
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import RunError
from mbcd_cli.evaluation.analyses.corruptions import Corrupted
from mbcd_cli.evaluation.analyses.robustness import Disturbed, MissingModalities
from mbcd_cli.evaluation.analyses.trust import ForeignClips, TrustFigures
from mbcd_cli.evaluation.evaluator import Evaluated
from mbcd_cli.evaluation.report.export import HardestClips
from mbcd_cli.files import flatten, read_json
from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.resolved import method_label
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.scoring.clip_sets import SOURCE, TARGET, source_domains
from mbcd_cli.scoring.history import Oracle
from mbcd_cli.scoring.metrics import HeadFigures
from mbcd_cli.settings import Settings, role_of

RESULTS_FORMAT = 2
"""Version of the layout of results.json."""
_PRETRAINING = " pretraining"
"""Ends the name of what is told of a modality's pretraining in `provenance`."""


SetFigures = dict[str, dict[str, HeadFigures]]
"""Source or target -> head -> figures."""


@dataclass(frozen=True, slots=True)
class Headline:
    """The deployed model's top-1 (0 to 1) of every head, on the target or (without one) in-domain."""

    checkpoint: str
    model: str
    clips: str
    top1: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Results:
    """What an evaluation found: what results.json holds.

    Attributes:
        format: `RESULTS_FORMAT`.
        fingerprints: modality -> fingerprint of its cache.
        settings: `weights_settings`. epochs: checkpoint -> its epoch.
        models: checkpoint -> teacher or student -> figures.
        warnings: what a reader should know. checkpoints: checkpoint -> checksum of its file, where it lies in a run.
        missing: source or target -> figures. provenance: what is behind the figures -> its version.
    """

    format: int
    dataset: str
    fingerprints: dict[str, str]
    method: str
    modalities: list[str]
    target_domain: str | None
    target_split: str
    source_domains: list[str]
    seed: int
    label_names: list[str]
    settings: dict[str, str]
    epochs: dict[str, int]
    models: dict[str, dict[str, SetFigures]]
    headline: Headline
    provenance: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    checkpoints: dict[str, str] = field(default_factory=dict)
    oracle: Oracle | None = field(default=None, metadata=OPTIONAL)
    missing: dict[str, MissingModalities] | None = field(default=None, metadata=OPTIONAL)
    shift: Disturbed | None = field(default=None, metadata=OPTIONAL)
    corruptions: Corrupted | None = field(default=None, metadata=OPTIONAL)
    trust: TrustFigures | None = field(default=None, metadata=OPTIONAL)
    hardest: HardestClips | None = field(default=None, metadata=OPTIONAL)
    ood: ForeignClips | None = field(default=None, metadata=OPTIONAL)

    @property
    def title(self) -> str:
        """One line that says which run this is."""
        where = f"target {self.target_domain}" if self.target_domain else "in-domain"
        return f"{self.dataset}, {'+'.join(self.modalities)}, {self.method}, {where}, seed {self.seed}"

    @property
    def deployed_sets(self) -> SetFigures:
        """The deployed model's figures, those on the target first."""
        sets = self.models[self.headline.checkpoint][self.headline.model]
        return {name: sets[name] for name in (TARGET, SOURCE) if name in sets}

    def clips_name(self, clip_set: str) -> str:
        """`target (street)` or `source (studio, tilted)`."""
        domains = [str(self.target_domain)] if clip_set == TARGET else self.source_domains
        return f"{clip_set} ({', '.join(domains)})"


def results_of(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Mapping[str, Checkpoint],
    evaluated: Iterable[Evaluated],
    *,
    deployed: tuple[str, str],
    device: torch.device,
) -> Results:
    """Figures of every model, what was evaluated, and warnings; `deployed` names checkpoint and model."""
    models: dict[str, dict[str, SetFigures]] = {}
    for on_set in evaluated:
        by_set = models.setdefault(on_set.checkpoint, {}).setdefault(on_set.model, {})
        by_set[on_set.clip_set.name] = on_set.figures
    checkpoint, model = deployed
    sets = models[checkpoint][model]
    headline_set = TARGET if TARGET in sets else next(iter(sets))
    averaged = checkpoints[checkpoint].averaged if checkpoints else None  # none where nothing was trained
    top1 = {head: figures.top1 for head, figures in sets[headline_set].items()}
    results = Results(
        format=RESULTS_FORMAT,
        dataset=dataset.name,
        fingerprints=dict(dataset.fingerprints),
        method=method_label(settings) + ("" if averaged is None else f" ({averaged['label']})"),
        modalities=list(settings.model.modalities or dataset.modalities),
        target_domain=settings.training.target_domain,
        target_split=settings.dataset.target_split,
        source_domains=list(source_domains(settings, dataset)),
        seed=settings.training.seed,
        label_names=list(dataset.label_names),
        settings=weights_settings(settings),
        epochs={name: int(weights.epoch) for name, weights in checkpoints.items()},
        models=models,
        headline=Headline(checkpoint, model, headline_set, top1),
        provenance=provenance(dataset, checkpoints, device),
    )
    results.warnings = _warnings(results, checkpoints)
    return results


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
    versions = {
        "mbcd": mbcd_cli.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}, {device.type}",
    }
    for name, checkpoint in checkpoints.items():
        versions[f"{name} weights, sha256"] = weights_sha256(checkpoint)
    for name, fingerprint in dataset.fingerprints.items():
        versions[f"{name} cache"] = fingerprint
    versions |= {f"{name}{_PRETRAINING}": data for name, data in pretraining_of(dataset).items()}
    for name, cache in dataset.caches.items():
        for key, value in cache.provenance.items():
            versions[f"{name} cache, {key.replace('_', ' ')}"] = str(value)
    return versions


def pretraining_of(dataset: Dataset) -> dict[str, str]:
    """Modality -> the data that its encoder's weights were trained on; `none`, or `unknown`, where that is so.

    Of arrays only who made them knows: they may be another model's features.
    """
    told = {}
    for name, modality in dataset.modalities.items():
        cache = dataset.caches.get(name)
        passport = json.loads(cache.passport) if cache is not None and cache.passport else {}
        prepared = passport.get("sha256") is not None or modality.kind == "array"
        known = passport.get("wants", {}).get("pretraining") or "unknown" if prepared else "none"
        told[name] = modality.pretraining or known
    return told


def pretraining_words(modalities: Sequence[str], provenance: Mapping[str, str]) -> str:
    """What `provenance` tells of these modalities' pretraining, said once where it is all the same."""
    told = {name: provenance.get(f"{name}{_PRETRAINING}", "unknown") for name in modalities}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{name} {data}" for name, data in told.items())


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluation wrote, as the JSON that it is: perhaps another version's, or no evaluation's at all.

    Raises:
        RunError: no such file, or a damaged one.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        raise RunError(f"There is no {path}.", "Run `mbcd evaluate --run RUN` first.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}", "Evaluate that run again.") from error


def _warnings(results: Results, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """What a reader of the figures should know: another cache, diverged models, absent classes."""
    warnings = []
    for name, checkpoint in checkpoints.items():
        trained = checkpoint.fingerprints
        changed = [m for m, f in results.fingerprints.items() if m in trained and trained[m] != f]
        if changed:
            warnings.append(f"The {name} checkpoint was trained on another cache of {', '.join(changed)}.")
    for name, models in results.models.items():
        for model, sets in models.items():
            for clip_set, heads in sets.items():
                if bad := sum(head.unpredicted for head in heads.values()):
                    warnings.append(f"The {name} {model} diverged: {bad} non-finite outputs on {clip_set} are wrong.")
    headline = results.headline
    for clip_set, heads in results.models[headline.checkpoint][headline.model].items():
        absent = [name for name, figures in heads["fused"].per_class.items() if figures.clips == 0]
        if absent:
            warnings.append(f"No {clip_set} clip of class {', '.join(absent)}: left out of the mean class accuracy.")
    return warnings
