"""Evaluate the models of checkpoints on a prepared dataset: what is tested on which clips, and by what name.

Letters: N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import MbcdError
from mbcd_cli.model import MultiModalModel
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import ClipSet, clip_sets
from mbcd_cli.scoring.deployed import Weights, build_models, deployed
from mbcd_cli.scoring.metrics import HeadFigures, figures_of_heads
from mbcd_cli.scoring.predictions import Predictions, Variant, predict
from mbcd_cli.settings import Settings


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One model on one set of clips.

    Attributes:
        checkpoint: best or last. model: teacher or student. clip_set: source or target.
        predictions: on those N clips.
        figures: `metrics.figures_of_heads` of them.
    """

    checkpoint: str
    model: str
    clip_set: ClipSet
    predictions: Predictions
    figures: dict[str, HeadFigures]


def evaluate_models(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Mapping[str, Weights],
    *,
    device: torch.device,
    say: Say = SILENT,
    variants: Callable[[MultiModalModel], Mapping[str, Variant]] = lambda model: {},
) -> tuple[list[Evaluated], MultiModalModel]:
    """Every model of every checkpoint on every set of clips but a sealed one, in that order; and the deployed model.

    Args:
        settings: of the run, with the evaluation slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: best / last -> weights.
        device: where to compute.
        say: told how far it is.
        variants: the deployed model -> further fused logits to compute from its features.

    Raises:
        SettingsError, MbcdError: domains without clips. CheckpointError: weights of another model.
    """
    sets = [clip_set for clip_set in clip_sets(settings, dataset) if not clip_set.sealed]
    if not sets:
        raise MbcdError(
            "The sources have no clips to test, and the target is sealed (dataset.seal_target).",
            "Open it with `mbcd reveal RUN`, or prepare held-out clips of the sources.",
        )
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
                    say.over(batches, "evaluating, batches"),
                    device=device,
                    precision=settings.runtime.precision,
                    variants=variants(model) if model is kept else None,
                )
                figures = figures_of_heads(
                    predictions,
                    label_names=list(dataset.label_names),
                    domain_names=list(dataset.domains),
                    k=settings.evaluation.top_k,
                )
                results.append(Evaluated(checkpoint, name, clip_set, predictions, figures))
    assert kept is not None
    return results, kept
