"""Which cells of a sweep one process trains together, as a population."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import method_class
from mbcd_cli.runs.names import settings_key
from mbcd_cli.settings import Settings, Slice
from mbcd_cli.sweep.plan import Cell

SHARE = 256
"""Cells of one process at most: it holds the lock of each."""


def width_of(text: str) -> int | None:
    """`--pack`: trainings that a process has under way at a time, 0 for processes of one each; None: auto.

    Raises:
        SettingsError: neither auto nor off nor a number.
    """
    if text in ("auto", "off"):
        return None if text == "auto" else 0
    if text.isdecimal() and int(text):
        return int(text) if int(text) > 1 else 0
    raise SettingsError(
        f"--pack {text}: neither auto, off nor a number.", "Write --pack auto, --pack 32 or --pack off."
    )


def units(
    cells: Sequence[Cell], *, width: int | None, jobs: int, prepared: Mapping[str, Settings] = MappingProxyType({})
) -> dict[str, Sequence[Cell]]:
    """Cell's key -> the cells that one process trains, this one among them.

    Cells are alike when their settings differ in the seed, the target, the sources (as many) and numbers only (of the
    method, the optimizer, the average; dropout rates; zero apart); `jobs` processes share them.

    Args:
        width: of a population; 0: there are none; None: where models are small.
        prepared: cell's key -> settings that name its modalities; its own may leave that to the prepared dataset.
    """
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        stackable = width != 0 and method_class(cell.settings.method.name).stackable
        together = stackable and (width is not None or small(prepared.get(cell.key, cell.settings)))
        alike.setdefault(kind(cell.settings) if together else cell.key, []).append(cell)
    parts = [group[part::jobs] for group in alike.values() for part in range(min(jobs, len(group)))]
    shares = [part[start : start + SHARE] for part in parts for start in range(0, len(part), SHARE)]
    return {cell.key: share for share in shares for cell in share}


def small(settings: Settings) -> bool:
    """Whether every tail reads vectors: convolutions fill the machine anyway."""
    read = [settings.modalities.get(name) for name in settings.model.modalities or settings.modalities]
    return bool(read) and all(one is not None and (one.cut == "adapter" or one.encoder == "array-mlp") for one in read)


def kind(settings: Settings) -> str:
    """What the members of one population share: all but seed, target, sources (as many), and numbers."""
    training = settings.training
    same = training.model_copy(update={"seed": 0, "target_domain": None, "source_domains": ()})
    alike = {"training": same, "model": settings.model.model_copy(update={"dropout": _told(settings.model.dropout)})}
    alike |= {name: _without_numbers(getattr(settings, name)) for name in ("method", "optimizer", "average")}
    return f"{len(training.source_domains)}-{settings_key(settings.model_copy(update=alike))}"


def _without_numbers(group: Slice) -> Slice:
    told = {
        name: _without_numbers(value) if isinstance(value, Slice) else _told(value)
        for name, value in group
        if isinstance(value, (Slice, float))
    }
    return group.model_copy(update=told)


def _told(number: float) -> float:
    """Whether there is one: what is zero is often left out of a step."""
    return float(bool(number))
