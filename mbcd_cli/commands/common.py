"""What several commands share: from settings to an opened dataset, and from a checkpoint back to both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbcd_cli.data.dataset import CachedDataset, open_dataset
from mbcd_cli.errors import CacheError, CheckpointError, SettingsError
from mbcd_cli.layers import Layer, to_toml
from mbcd_cli.settings import METHODS, Settings

# Slices that a finished run leaves open; everything else is what the weights were trained with.
_FREE = ("evaluation", "landscape", "runtime")


def open_for_training(settings: Settings) -> tuple[Settings, CachedDataset]:
    """The prepared dataset, and the settings with domains and modalities resolved against it.

    Raises:
        SettingsError: unknown domains, no source left.
        CacheError: nothing prepared that matches.
    """
    name = settings.dataset.name
    if name is None:
        raise SettingsError(
            "No dataset is named.", "Use --preset NAME or --dataset NAME; `mbcd list datasets` shows them."
        )
    dataset = open_dataset(settings, name=name, modalities=settings.model.modalities)
    domains = list(settings.dataset.domains or dataset.domains)
    target = settings.training.target_domain
    sources = list(settings.training.source_domains) or [domain for domain in domains if domain != target]
    unknown = [
        domain for domain in (*sources, *([target] if target else [])) if domain not in dataset.domains
    ]
    if unknown:
        raise SettingsError(
            f"Dataset {name} has no domain {', '.join(map(repr, unknown))}.",
            f"Its domains are {', '.join(dataset.domains)}.",
        )
    if not sources:
        raise SettingsError("No source domain is left to train on.", "Name them with --source-domains.")
    training = settings.training.model_copy(update={"source_domains": tuple(sources)})
    resolved = settings.model_copy(
        update={
            "training": training,
            "modalities": dict(dataset.modalities),
            "model": settings.model.model_copy(update={"modalities": tuple(dataset.modalities)}),
        }
    )
    return resolved, dataset


def run_name(settings: Settings) -> str:
    """`<method>-<modalities>-<target>-s<seed>`: mbcd-va-street-s0."""
    names = settings.model.modalities
    short = (
        "".join(name[0] for name in names) if set(names) <= {"video", "audio", "flow"} else "+".join(names)
    )
    target = settings.training.target_domain or "in-domain"
    return f"{method_label(settings)}-{short}-{target}-s{settings.training.seed}"


def method_label(settings: Settings) -> str:
    """The method's name, marked `-custom` when its switches were changed one by one."""
    method = settings.training.method
    if method not in METHODS:
        return method
    have = settings.objective.model_dump()
    same = have["unimodal"] == METHODS[method]["unimodal"] and all(
        have[part][key] == value
        for part, switches in METHODS[method].items()
        if isinstance(switches, dict)
        for key, value in switches.items()
    )
    return method if same else f"{method}-custom"


def saved_layer(settings: Settings) -> Layer:
    """A run's settings as the lowest layer under `evaluate`'s and `landscape`'s own flags."""
    return Layer("the run's settings", settings.model_dump(mode="json", exclude_none=True))


def check_unchanged(saved: Settings, now: Settings) -> None:
    """Refuse flags that would make the weights mean something else.

    Raises:
        SettingsError: names the parts that differ.
    """
    parts = [
        part
        for part in Settings.model_fields
        if part not in (*_FREE, "cache", "dataset") and getattr(saved, part) != getattr(now, part)
    ]
    if parts:
        raise SettingsError(
            f"These settings belong to the training and cannot be changed here: {', '.join(parts)}.",
            f"Only {', '.join(_FREE)}, cache.dir and dataset.target_split can; train again to change the others.",
        )


def open_for_checkpoint(
    settings: Settings, fingerprints: dict[str, str], label_names: Sequence[str]
) -> CachedDataset:
    """The dataset a checkpoint was trained on, from the cache folder the settings name.

    Raises:
        CacheError: not prepared (on this machine).
        CheckpointError: the cache is another dataset's.
    """
    try:
        dataset = open_dataset(
            settings, name=str(settings.dataset.name), modalities=settings.model.modalities
        )
    except CacheError as error:
        raise CacheError(
            error.message, f"{error.remedy} A cache elsewhere is named with --cache-dir."
        ) from error
    if list(dataset.label_names) != list(label_names):
        raise CheckpointError(
            f"The checkpoint's classes are not those of dataset {dataset.name}.",
            "Name the cache it was trained on with --cache-dir.",
        )
    return dataset


def settings_toml(settings: Settings) -> str:
    """For `--show-settings`."""
    return to_toml(settings)


def existing_file(path: Path, what: str) -> Path:
    """`path`, if it is a file.

    Raises:
        CheckpointError: it is not.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no {what} at {path}.", "Check the path; a run keeps them in RUN/checkpoints/."
        )
    return path


def json_safe(value: Any) -> Any:
    """`value` with everything JSON cannot hold (NaN, infinities) as None."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
