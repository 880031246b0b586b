"""What other packages add to a registry by entry points: mbcd.methods, mbcd.encoders, mbcd.readers."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from mbcd_cli.errors import SettingsError


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
