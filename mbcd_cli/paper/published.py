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


def paper_domains(settings: Settings) -> tuple[str, ...]:
    """The domains of a dataset of the paper in the tables' order, () for other datasets."""
    name = settings.dataset.name if settings.dataset.name in PAPER_DATASETS else settings.dataset.reader.name
    figures = paper()["multi_source"][0].get(name, {})
    return tuple(domain for domain in figures if domain != "average")
