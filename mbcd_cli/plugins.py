"""What other packages add to a registry by entry points: mbcd.methods, mbcd.encoders, mbcd.readers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from mbcd_cli.errors import SettingsError

AnyEntry = TypeVar("AnyEntry")


def plugins(group: str) -> dict[str, EntryPoint]:
    """Name -> entry point of everything that installed packages add to `group`; nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_plugin(entry: EntryPoint) -> object:
    """What the entry point names.

    Raises:
        SettingsError: importing it fails; the message is that of the failure (a package that is missing names itself).
    """
    try:
        return entry.load()
    except Exception as error:  # whatever somebody's module raises while it is imported
        source = f" of package {entry.dist.name}" if entry.dist is not None else ""
        raise SettingsError(
            f"{entry.group} {entry.name!r}{source} cannot be imported ({entry.value}): {type(error).__name__}: {error}",
            "Install what it needs, or mend it.",
        ) from error


def entry_of(name: str, group: str, ours: Mapping[str, AnyEntry], kind: type[AnyEntry]) -> AnyEntry | None:
    """The entry called `name`: one of `ours`, else an installed package's, else None.

    Raises:
        SettingsError: the package's cannot be imported, or is no `kind`.
    """
    installed = {} if name in ours else plugins(group)
    if name not in installed:
        return ours.get(name)
    entry = load_plugin(installed[name])
    if not isinstance(entry, kind):
        raise SettingsError(
            f"{group} {name!r} ({installed[name].value}) is {type(entry).__name__}, not {kind.__name__}.",
            f"Let the entry point name a {kind.__name__}; docs/extending.md shows one.",
        )
    return entry


def summaries_of(group: str, ours: Mapping[str, AnyEntry], kind: type[AnyEntry]) -> list[tuple[str, AnyEntry | str]]:
    """(name, entry) of `ours` and of installed packages; what is wrong instead of an entry that cannot be had."""
    summaries: list[tuple[str, AnyEntry | str]] = list(ours.items())
    for name in plugins(group):
        if name not in ours:
            try:
                entry = entry_of(name, group, ours, kind)
                summaries.append((name, entry if entry is not None else "error: it is gone"))
            except SettingsError as error:
                summaries.append((name, f"error: {error.message}"))
    return summaries
