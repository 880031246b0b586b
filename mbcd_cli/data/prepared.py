"""Which datasets are prepared, told from their folders: wrong names are known before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mbcd_cli.errors import FOREIGN, CacheError, SettingsError
from mbcd_cli.files import open_hdf5
from mbcd_cli.naming import did_you_mean


def prepared_datasets(cache: Path) -> list[str]:
    """Names of the datasets that have a complete cache under `cache`."""
    return sorted({path.parent.parent.name for path in cache.glob("*/*/index.h5")})


def check_dataset(cache: Path, name: str) -> None:
    """Refuse a dataset of which nothing is prepared.

    Raises:
        CacheError: there is no such dataset under `cache`.
    """
    prepared = prepared_datasets(cache)
    if name not in prepared:
        have = f"Prepared so far: {', '.join(prepared)}." if prepared else "Nothing is prepared there yet."
        raise CacheError(
            f"There is no cache of dataset {name!r} in {cache}.",
            f"{did_you_mean(name, prepared)}{have} Run `mbcd prepare` first, or name the folder with --cache-dir.",
        )


def check_domains(name: str, domains: Sequence[str], wanted: Iterable[str | None]) -> None:
    """Refuse domains that a dataset does not have; None is none.

    Raises:
        SettingsError: it does not have one.
    """
    unknown = [domain for domain in wanted if domain is not None and domain not in domains]
    if unknown:
        raise SettingsError(
            f"Dataset {name} has no domain {', '.join(map(repr, unknown))}.",
            f"{did_you_mean(unknown[0], domains)}Its domains are {', '.join(domains)}.",
        )


def stored_domains(cache: Path, name: str) -> tuple[str, ...]:
    """The domains of a prepared dataset by its first index; none where they cannot be told."""
    for index in sorted((cache / name).glob("*/index.h5")):
        try:
            with open_hdf5(index) as file:
                return tuple(file["domains"].asstr()[()])
        except (OSError, RuntimeError, *FOREIGN):  # who opens the whole cache says what is wrong
            continue
    return ()
