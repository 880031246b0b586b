"""Evaluate the models of checkpoints on a prepared dataset: what is tested on which clips, and by what name.

Letters: N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.errors import CacheError, CheckpointError, MbcdError, SettingsError
from mbcd_cli.evaluation.metrics import summaries
from mbcd_cli.evaluation.predict import Predictions, Variant, predict
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.settings import Settings

State = Mapping[str, torch.Tensor]
SOURCE, TARGET = "source", "target"
"""The two sets of clips: the source domains' test split (in-domain), and the unseen target domain."""


class Weights(Protocol):
    """What a checkpoint must offer to be evaluated."""

    student: State
    teacher: State | None
    label_names: Any
    epoch: int


@dataclass(frozen=True, slots=True)
class ClipSet:
    """Clips that are tested together: `name` is source or target, `clips` [N] indices into the clip table."""

    name: str
    clips: np.ndarray
    domains: tuple[str, ...]


def source_domains(settings: Settings, dataset: Dataset) -> tuple[str, ...]:
    """The domains seen in training: those set, or all but the target."""
    training = settings.training
    return training.source_domains or tuple(d for d in dataset.domains if d != training.target_domain)


def clip_sets(settings: Settings, dataset: Dataset) -> list[ClipSet]:
    """What to evaluate on: the sources' test split, and the target's rows (`dataset.target_split`).

    Raises:
        SettingsError: a domain that the dataset does not have.
        MbcdError: no clip at all.
    """
    sources, target = source_domains(settings, dataset), settings.training.target_domain
    missing = [d for d in (*sources, *((target,) if target else ())) if d not in dataset.domains]
    if missing:
        raise SettingsError(
            f"There is no domain {', '.join(map(repr, missing))} in the prepared dataset.",
            f"It has: {', '.join(dataset.domains)}.",
        )
    sets = [_clip_set(SOURCE, dataset, sources, ("test",))]
    if target is not None:
        splits = ("test",) if settings.dataset.target_split == "test" else ("train", "test")
        sets.append(_clip_set(TARGET, dataset, (target,), splits))
    sets = [s for s in sets if len(s.clips)]
    if not sets:
        raise MbcdError(
            f"Neither the sources ({', '.join(sources)}) nor the target ({target}) have clips to test.",
            "Check the splits in the dataset's table, and run `mbcd prepare` again.",
        )
    return sets


def _clip_set(name: str, dataset: Dataset, domains: Sequence[str], splits: Sequence[str]) -> ClipSet:
    try:
        clips = dataset.select(domains=domains, splits=splits)
    except CacheError:  # none of these; one set may be empty while the other is not
        clips = np.empty(0, np.int64)
    return ClipSet(name, clips, tuple(domains))


def build_models(
    settings: Settings,
    dataset: Dataset,
    weights: Weights,
    *,
    device: torch.device,
    source: str = "checkpoint",
) -> dict[str, MultiModalModel]:
    """The models of one checkpoint on `device`: "teacher" (first, where there is one) and "student".

    The teacher averages encoders and fused head; its uni-modal heads are the student's (method.md section 3).

    Raises:
        CheckpointError: the weights do not fit the model of `settings`, or the dataset's classes differ.
    """
    if list(weights.label_names) != list(dataset.label_names):
        raise CheckpointError(
            f"The {source} checkpoint was trained on the classes {', '.join(weights.label_names)}, "
            f"and the prepared dataset has {', '.join(dataset.label_names)}.",
            "Evaluate on a dataset with the same classes in the same order.",
        )
    modalities = dict(dataset.modalities)
    if settings.model.modalities:
        absent = [name for name in settings.model.modalities if name not in modalities]
        if absent:
            raise SettingsError(
                f"The model reads {', '.join(absent)}, which is not prepared.",
                "Run `mbcd prepare` with that modality.",
            )
        modalities = {name: modalities[name] for name in settings.model.modalities}
    states: dict[str, State] = {"student": weights.student}
    if weights.teacher is not None:
        averaged = {k: v for k, v in weights.teacher.items() if not k.startswith("heads.")}
        states = {"teacher": {**weights.student, **averaged}, **states}
    models = {}
    for name, state in states.items():
        model = build_model(
            modalities,
            settings=settings.model,
            classes=len(dataset.label_names),
            live_trunks=settings.cache.live_trunks,
        )
        try:
            model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise CheckpointError(
                f"The {name} in the {source} checkpoint does not fit these settings: {_first(error)}",
                "Evaluate with the settings of the run (`--run RUN` reads them from the run folder).",
            ) from error
        models[name] = model.to(device).requires_grad_(False).eval()
    return models


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One model on one set of clips.

    Attributes:
        checkpoint: best or last; model: teacher or student; clip_set: source or target.
        predictions: on those clips.
        figures: `metrics.summaries` of them: head -> figures.
    """

    checkpoint: str
    model: str
    clip_set: ClipSet
    predictions: Predictions
    figures: dict[str, dict[str, Any]]


Watch = Callable[[Iterable[Batch]], Iterable[Batch]]


def evaluate_models(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Mapping[str, Weights],
    *,
    device: torch.device,
    watch: Watch = lambda batches: batches,
    variants: Callable[[MultiModalModel], Mapping[str, Variant]] = lambda model: {},
) -> tuple[list[Evaluated], MultiModalModel]:
    """Every model of every checkpoint on every set of clips, in that order; and the deployed model, for more.

    Args:
        settings: of the run, with the evaluation slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: best / last -> weights.
        device: where to compute.
        watch: wraps every stream of batches (progress bars).
        variants: the deployed model -> further fused logits to compute from its features.
    """
    sets = clip_sets(settings, dataset)
    chosen = deployed(checkpoints)
    results = []
    kept = None
    for checkpoint, weights in checkpoints.items():
        for name, model in build_models(settings, dataset, weights, device=device, source=checkpoint).items():
            kept = model if (checkpoint, name) == chosen else kept
            for clip_set in sets:
                batches = dataset.batches(clip_set.clips, batch_size=settings.evaluation.batch_size, training=False)
                predictions = predict(
                    model,
                    watch(batches),
                    device=device,
                    precision=settings.runtime.precision,
                    variants=variants(model) if model is kept else None,
                )
                figures = summaries(
                    predictions,
                    label_names=list(dataset.label_names),
                    domain_names=list(dataset.domains),
                    k=settings.evaluation.top_k,
                )
                results.append(Evaluated(checkpoint, name, clip_set, predictions, figures))
    assert kept is not None
    return results, kept


def deployed(checkpoints: Mapping[str, Weights]) -> tuple[str, str]:
    """(checkpoint, model) that is deployed: best where there is one, and its teacher where there is one."""
    checkpoint = "best" if "best" in checkpoints else next(iter(checkpoints))
    return checkpoint, "student" if checkpoints[checkpoint].teacher is None else "teacher"
