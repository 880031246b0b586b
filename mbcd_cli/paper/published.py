"""The paper's published figures, and the domains of its datasets."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

from mbcd_cli.settings import Settings

PAPER_DATASETS = ("epic-kitchens", "hac")


def paper() -> dict[str, list[dict[str, Any]]]:
    """The paper's figures: table -> rows (`paper.toml`)."""
    text = resources.files("mbcd_cli.paper").joinpath("paper.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def published_domains(dataset: str) -> tuple[str, ...]:
    """The domains of a dataset in the order of the paper's tables, () where it has none of it."""
    return tuple(domain for domain in paper()["multi_source"][0].get(dataset, {}) if domain != "average")


def paper_domains(settings: Settings) -> tuple[str, ...]:
    """`published_domains` of the settings' dataset, by its name or by its reader's."""
    name = settings.dataset.name if settings.dataset.name in PAPER_DATASETS else settings.dataset.reader.name
    return published_domains(name)
