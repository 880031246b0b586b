"""Soups: the mean of the weights of several runs that began with the same ones, chosen on source validation.

Uniform: all of them. Greedy (Wortsman et al., ICML 2022) and restricted (DiWA, Rame et al., NeurIPS 2022): from the
best run on, each is kept if the mean with it is better than the best mean so far (`>`), or no worse (`>=`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mbcd_cli.errors import RunError
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.runs.names import run_name
from mbcd_cli.settings import Settings
from mbcd_cli.training.validation import HeadRecord

SoupRule = Literal["uniform", "greedy", "restricted"]
_KEEPS = {"greedy": operator.gt, "restricted": operator.ge}


def common_name(settings: Settings) -> str:
    """What the names of a soup's runs have in common: method, modalities and target."""
    return run_name(settings).rpartition("-s")[0]


def check_alike(runs: Mapping[Path, Checkpoint]) -> None:
    """Refuse runs whose mean is no model: of other data or layers, or that began with other weights.

    Raises:
        RunError: they are such; it names two of them and what differs.
    """
    (first, one), *others = runs.items()
    for path, other in others:
        for what, a, b in zip(_COMMON, _common(one), _common(other), strict=True):
            if a != b:
                raise RunError(
                    f"{first} and {path} have other {what}: the mean of their weights is no model.",
                    "Make a soup of runs of one dataset, cache, model and set of sources.",
                )
        if _began(one.settings) != _began(other.settings):
            raise RunError(
                f"{first} and {path} began with other weights ({_told(one.settings)}; {_told(other.settings)}): "
                "between them the loss is high, and so it is at their mean.",
                "Train them with one --set training.init_seed=0 for all seeds.",
            )


_COMMON = ("dataset", "classes", "modalities", "heads", "caches", "sources", "target or seal")


def _common(one: Checkpoint) -> tuple:
    training = one.settings.training
    layers = one.modalities, one.settings.model, one.fingerprints
    target = training.target_domain, one.settings.dataset.seal_target
    return one.dataset, one.label_names, *layers, set(training.source_domains), target


def _began(settings: Settings) -> tuple[int | None, int | None]:
    own = settings.training.init_seed
    return own, settings.training.seed if own is None else None


def _told(settings: Settings) -> str:
    own = settings.training.init_seed
    return f"training.seed {settings.training.seed}" if own is None else f"training.init_seed {own}"


def better_first(validated: Sequence[HeadRecord]) -> list[int]:
    """Their numbers, the most accurate first, of equal ones that of the lower loss."""
    return sorted(range(len(validated)), key=lambda k: (-validated[k].accuracy, validated[k].loss or 0.0, k))


def chosen(
    alone: Sequence[HeadRecord], rule: SoupRule, accuracy_of: Callable[[Sequence[int]], float]
) -> tuple[list[int], list[float]]:
    """Which of several runs a soup is of, the best first, and the accuracy with each further one that was tried.

    Args:
        alone: what each is worth on source validation.
        accuracy_of: numbers of runs -> accuracy (0 to 1) of the mean of their weights, on source validation.
    """
    order = better_first(alone)
    if rule == "uniform":
        return order, []
    kept, best, tried = order[:1], accuracy_of(order[:1]), []
    for k in order[1:]:
        tried.append(accuracy_of([*kept, k]))
        if _KEEPS[rule](tried[-1], best):
            kept, best = [*kept, k], tried[-1]
    return kept, tried
