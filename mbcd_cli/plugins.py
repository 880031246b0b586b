"""What other packages add to a registry by entry points: mbcd.methods, mbcd.encoders, mbcd.readers."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from mbcd_cli.errors import SettingsError

AnyEntry = TypeVar("AnyEntry")
GROUPS = ("mbcd.methods", "mbcd.encoders", "mbcd.readers")
FILE_MODULE = "mbcd_method_"
"""What the name of the module begins with that a method's own file is imported as."""


def line_of_theirs(error: BaseException) -> str:
    """FILE:LINE, the innermost of a plug-in's or a method's own file that an error came through; empty where none."""
    packages = {entry.module.partition(".")[0] for group in GROUPS for entry in entry_points(group=group)}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(FILE_MODULE) or module.partition(".")[0] in packages:
            return f"{frame.f_code.co_filename}:{line}"
    return ""


def _why_not_imported(error: BaseException) -> tuple[str, str]:
    """What came of importing somebody's code, and the remedy."""
    if isinstance(error, SystemExit):
        return "it ends the program", "Put what it does as a script below `if __name__ == '__main__':`."
    line = "" if isinstance(error, SyntaxError) else line_of_theirs(error)  # which says its own
    return f"{type(error).__name__}: {error}{f' ({line})' if line else ''}", "Install what it needs, or mend it."


def importing(what: str, load: Callable[[], AnyEntry]) -> AnyEntry:
    """What `load` gives, which imports somebody's code.

    Raises:
        SettingsError: importing fails; the message is that of the failure (a package that is missing names itself).
    """
    try:
        return load()
    except (Exception, SystemExit) as error:  # whatever somebody's module raises while it is imported
        why, remedy = _why_not_imported(error)
        raise SettingsError(f"{what} cannot be imported: {why}", remedy) from error


def plugins(group: str) -> dict[str, EntryPoint]:
    """Name -> entry point of everything that installed packages add to `group`; nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_plugin(entry: EntryPoint) -> object:
    """What the entry point names.

    Raises:
        SettingsError: importing it fails.
    """
    source = f" of package {entry.dist.name}" if entry.dist is not None else ""
    return importing(f"{entry.group} {entry.name!r}{source} ({entry.value})", entry.load)


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
