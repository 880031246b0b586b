"""The paper's published figures, and the domains of its datasets."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from mbcd_cli.settings import Settings

PAPER_DATASETS = ("epic-kitchens", "hac")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One method in one of a paper's tables.

    Attributes:
        modalities: that it is trained on.
        figures: dataset -> target (or `source to target`, or `average`) -> top-1 in percent.
        source: which paper tells it; the MBCD paper is `paper`.
    """

    method: str
    modalities: list[str]
    figures: Mapping[str, Mapping[str, float]]
    source: str


def paper() -> dict[str, list[PublishedRow]]:
    """The papers' figures: table -> rows (`paper.toml`)."""
    text = resources.files("mbcd_cli.paper").joinpath("paper.toml").read_text(encoding="utf-8")
    return {table: [_row(**entry) for entry in entries] for table, entries in tomllib.loads(text).items()}


def _row(*, method: str, modalities: list[str], source: str = "paper", **figures: Mapping[str, float]) -> PublishedRow:
    return PublishedRow(method, modalities, figures, source)


def published_domains(dataset: str) -> tuple[str, ...]:
    """The domains of a dataset in the order of the paper's tables, () where it has none of it."""
    return tuple(domain for domain in paper()["multi_source"][0].figures.get(dataset, {}) if domain != "average")


def paper_domains(settings: Settings) -> tuple[str, ...]:
    """`published_domains` of the settings' dataset, by its name or by its reader's."""
    name = settings.dataset.name if settings.dataset.name in PAPER_DATASETS else settings.dataset.reader.name
    return published_domains(name)
