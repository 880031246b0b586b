"""Which cells of a sweep one process trains together, as a population."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import method_class
from mbcd_cli.settings import Settings
from mbcd_cli.sweep.plan import Cell, settings_key

WIDTH = 32
"""Trainings under way at a time in one process, unless told otherwise."""


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


def take(waiting: deque[Cell], *, width: int | None, among: int) -> Sequence[Cell]:
    """Take out of `waiting` what the next process trains: its first cell, and its share of those like it.

    Cells are alike when their settings differ in the seed, the target and the sources (as many) only.

    Args:
        width: of a population; 0: there are none; None: where models are small.
        among: processes that share the cells, this one among them.
    """
    first = waiting.popleft()
    if width == 0 or not (method_class(first.settings.method.name).stackable and (width or small(first.settings))):
        return [first]
    alike = [cell for cell in waiting if kind(cell.settings) == kind(first.settings)]
    taken = [first, *alike[: -(-(len(alike) + 1) // among) - 1]]
    for cell in taken[1:]:
        waiting.remove(cell)
    return taken


def small(settings: Settings) -> bool:
    """Whether every tail reads vectors: convolutions fill the machine anyway."""
    read = [settings.modalities.get(name) for name in settings.model.modalities or settings.modalities]
    return bool(read) and all(one is not None and (one.cut == "adapter" or one.encoder == "array-mlp") for one in read)


def kind(settings: Settings) -> str:
    """What the members of one population share."""
    training = settings.training
    same = training.model_copy(update={"seed": 0, "target_domain": None, "source_domains": ()})
    return f"{len(training.source_domains)}-{settings_key(settings.model_copy(update={'training': same}))}"
