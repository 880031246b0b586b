"""Which clips are tested together: the sources' held-out split, and the unseen target.

Letters: N clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import CacheError, MbcdError, SettingsError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings import Settings

SOURCE, TARGET = "source", "target"
"""The two sets of clips: the source domains' test split (in-domain), and the unseen target domain."""


@dataclass(frozen=True, slots=True)
class ClipSet:
    """Clips that are tested together: `name` is source or target, `clips` [N] indices into the clip table.

    The labels of a `sealed` one are not to be read.
    """

    name: str
    clips: np.ndarray
    domains: tuple[str, ...]
    sealed: bool = False


def source_domains(settings: Settings, dataset: Dataset) -> tuple[str, ...]:
    """The domains seen in training: those set, or all but the target."""
    training = settings.training
    return training.source_domains or tuple(d for d in dataset.domains if d != training.target_domain)


def clip_sets(settings: Settings, dataset: Dataset) -> list[ClipSet]:
    """What to evaluate on: the sources' test split, and the target's rows (`dataset.target_split`), perhaps sealed.

    Raises:
        SettingsError: a domain that the dataset does not have.
        MbcdError: no clip at all.
    """
    sources, target = source_domains(settings, dataset), settings.training.target_domain
    missing = [d for d in (*sources, *((target,) if target else ())) if d not in dataset.domains]
    if missing:
        raise SettingsError(
            f"There is no domain {', '.join(map(repr, missing))} in the prepared dataset.",
            f"{did_you_mean(missing[0], dataset.domains)}It has: {', '.join(dataset.domains)}.",
        )
    sets = [_clip_set(SOURCE, dataset, sources, ("test",))]
    if target is not None:
        splits = ("test",) if settings.dataset.target_split == "test" else ("train", "test")
        sets.append(replace(_clip_set(TARGET, dataset, (target,), splits), sealed=settings.dataset.seal_target))
        if not len(sets[-1].clips):
            raise SettingsError(
                f"The target domain {target!r} has no usable clips of the {' or '.join(splits)} split: "
                "nothing would be tested on it.",
                "Choose another --target-domain, or test all of its clips: --set dataset.target_split=all, given to "
                "`mbcd prepare` and here.",
            )
        if not dataset.has_test_views(sets[-1].clips):
            raise CacheError(
                f"The cache of {dataset.name} has no test views of the training clips of the target {target!r}.",
                "Prepare it with --set dataset.target_split=all, or test the others: --set dataset.target_split=test.",
            )
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
