"""What several commands share: from settings to an opened dataset, and from a checkpoint back to both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mbcd_cli.data.dataset import PREPARED, CachedDataset, as_prepared, open_dataset
from mbcd_cli.data.prepared import check_domains
from mbcd_cli.data.records import SPLITS
from mbcd_cli.errors import CacheError, CheckpointError, SettingsError
from mbcd_cli.ledger import revealed_by
from mbcd_cli.resolved import changed, load_settings, resolve
from mbcd_cli.runs.checkpoint import Checkpoint, load_checkpoint
from mbcd_cli.runs.names import run_of
from mbcd_cli.settings import CacheSettings, Settings
from mbcd_cli.settings.sources import Layer

_FREE = ("dataset.target_split", "cache.random_weights")
"""Open in a finished run, as runtime is, whatever its role: which clips are tested, and what `prepare` tolerates."""


def open_for_training(settings: Settings, opened: CachedDataset | None = None) -> tuple[Settings, CachedDataset]:
    """The prepared dataset, and the settings with domains and modalities resolved against it.

    Args:
        opened: the dataset, where settings that differ in the training only have opened it already.

    Raises:
        SettingsError: unknown domains, no source left.
        CacheError: nothing prepared that matches.
    """
    name = settings.dataset.name
    if name is None:
        raise SettingsError(
            "No dataset is named.", "Use --preset NAME or --dataset NAME; `mbcd list datasets` shows them."
        )
    dataset = opened or open_dataset(settings, name=name, modalities=settings.model.modalities)
    domains = list(settings.dataset.domains or dataset.domains)
    target = settings.training.target_domain
    sources = list(settings.training.source_domains) or [domain for domain in domains if domain != target]
    check_domains(name, dataset.domains, (*sources, target))
    if not sources:
        raise SettingsError(
            f"No source domain is left to train on beside {target}.",
            "Name some with --source-domains; without --target-domain the model is trained and tested on all.",
        )
    for domain in sources:
        # A source needs clips to train on and held-out ones to select the model on.
        for split in SPLITS:
            dataset.select(domains=[domain], splits=[split])
    training = settings.training.model_copy(update={"source_domains": tuple(sources)})
    resolved = settings.model_copy(
        update={
            "training": training,
            "cache": _as_prepared(settings, dataset),
            "modalities": dict(dataset.modalities),
            "model": settings.model.model_copy(update={"modalities": tuple(dataset.modalities)}),
        }
    )
    return resolved, dataset


def _as_prepared(settings: Settings, dataset: CachedDataset) -> CacheSettings:
    """The cache settings as the dataset was prepared: what was taken as it is must be found again from the run's.

    Raises:
        CacheError: modalities that were prepared differently.
    """
    common: dict[str, object] = {}
    prepared = {name: as_prepared(cache) for name, cache in dataset.caches.items()}
    for field in PREPARED:
        values = {name: getattr(recorded, field) for name, recorded in prepared.items()}
        common[field] = next(iter(values.values()))
        if len(set(values.values())) > 1:
            raise CacheError(
                f"The modalities of {dataset.name} were prepared with different cache.{field}: "
                + ", ".join(f"{name} {value}" for name, value in values.items()),
                "Run `mbcd prepare` once more for all modalities together.",
            )
    return CacheSettings.model_validate({**settings.cache.model_dump(), **common})


def check_unchanged(saved: Settings, now: Settings) -> None:
    """Refuse flags that would make the weights mean something else.

    Raises:
        SettingsError: names the settings that differ.
    """
    names = [name for name in changed(saved, now) if name not in _FREE and not name.startswith("runtime.")]
    if "dataset.seal_target" in names:
        raise SettingsError("The target of this run was sealed when it was trained.", "`mbcd reveal RUN` opens it.")
    if names:
        raise SettingsError(
            f"These settings belong to the training and cannot be changed here: {', '.join(names)}.",
            f"Only those of evaluation, landscape, adapt and runtime, {_FREE[0]}, and where things lie can; train "
            "again to change the others.",
        )


def open_for_checkpoint(settings: Settings, label_names: Sequence[str]) -> CachedDataset:
    """The dataset a checkpoint was trained on, from the cache folder the settings name.

    Raises:
        CacheError: not prepared (on this machine).
        CheckpointError: the cache is another dataset's.
    """
    try:
        dataset = open_dataset(settings, name=str(settings.dataset.name), modalities=settings.model.modalities)
    except CacheError as error:
        raise CacheError(error.message, f"{error.remedy} A cache elsewhere is named with --cache-dir.") from error
    if list(dataset.label_names) != list(label_names):
        raise CheckpointError(
            f"The checkpoint's classes are not those of dataset {dataset.name}.",
            "Name the cache it was trained on with --cache-dir.",
        )
    return dataset


def kept_epochs(checkpoint: Path) -> list[tuple[int, Checkpoint]]:
    """The checkpoints that `training.keep_checkpoints` left beside `checkpoint`, by epoch.

    Raises:
        CheckpointError: fewer than three were kept.
    """
    files = sorted(checkpoint.parent.glob("epoch-*.pt"))
    if len(files) < 3:
        raise CheckpointError(
            f"{checkpoint.parent} holds {len(files)} epochs' weights; a trajectory needs at least 3.",
            "Train with --set training.keep_checkpoints=true.",
        )
    return [(kept.epoch, kept) for kept in map(load_checkpoint, files)]


def open_other(settings: Settings, folder: Path) -> CachedDataset:
    """Another prepared dataset with the views of these settings, for out-of-distribution detection.

    Raises:
        CacheError: not prepared, or with other views.
    """
    cache = settings.cache.model_copy(update={"dir": folder.parent})
    other = settings.model_copy(update={"cache": cache})
    return open_dataset(other, name=folder.name, modalities=settings.model.modalities)


def load_checkpoints(
    files: Mapping[str, Path],
    *,
    config: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, object],
) -> tuple[Settings, dict[str, Checkpoint]]:
    """Checkpoints, and the settings they were trained with, but evaluation, landscape, adapt and runtime as asked now.

    The target is sealed where one of them is of a sealed run that was not revealed.

    Args:
        flags: further settings from the command line, dotted name -> value.

    Raises:
        CheckpointError: missing, damaged, hostile or foreign checkpoints.
        SettingsError: flags that would change what the weights mean.
    """
    checkpoints = {label: load_checkpoint(path) for label, path in files.items()}
    for label, path in files.items():
        run = run_of(path)
        if run is not None and load_settings(run / "settings.toml").model != checkpoints[label].settings.model:
            raise CheckpointError(
                f"{path} was trained with other settings than its run folder {run}.", "Put it back where it came from."
            )
    first = next(iter(checkpoints.values()))
    for label, other in checkpoints.items():
        if (other.settings.modalities, other.settings.model) != (first.settings.modalities, first.settings.model):
            raise CheckpointError(
                f"{files[label]} holds another model than {next(iter(files.values()))}.",
                "Compare checkpoints of the same modalities, encoders and heads.",
            )
    saved = first.settings
    settings = resolve(
        base=Layer("the run's settings", saved.model_dump(mode="json", exclude_none=True)),
        config=config,
        environ=os.environ,
        sets=sets,
        flags=flags,
    )
    check_unchanged(saved, settings)
    sealed = any(
        checkpoints[label].settings.dataset.seal_target and not ((run := run_of(path)) and revealed_by(run))
        for label, path in files.items()
    )
    dataset = settings.dataset.model_copy(update={"seal_target": sealed})
    return settings.model_copy(update={"dataset": dataset}), checkpoints


def open_checkpoints(
    files: Mapping[str, Path], *, config: Path | None, sets: Sequence[str], flags: Mapping[str, object]
) -> tuple[Settings, CachedDataset, dict[str, Checkpoint]]:
    """`load_checkpoints`, and the dataset they were trained on.

    Raises:
        CacheError: their dataset is not prepared here; and what `load_checkpoints` raises.
    """
    settings, checkpoints = load_checkpoints(files, config=config, sets=sets, flags=flags)
    label_names = next(iter(checkpoints.values())).label_names
    return settings, open_for_checkpoint(settings, label_names), checkpoints
