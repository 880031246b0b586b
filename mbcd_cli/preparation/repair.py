"""`mbcd repair`: what is damaged or missing of a cache, computed anew from the media, and nothing else."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mbcd_cli import checksums
from mbcd_cli.checksums import PREPARED_WITH
from mbcd_cli.data.cache import shard_path
from mbcd_cli.data.corruptions import Corruption
from mbcd_cli.data.modality_cache import ModalityCache
from mbcd_cli.errors import CacheError, MbcdError
from mbcd_cli.files import open_hdf5, remove_partial, rename
from mbcd_cli.integrity import examine
from mbcd_cli.preparation.cache_plan import corrupted_plans, plan_cache, read_listing
from mbcd_cli.preparation.crew import REPAIR, Crew
from mbcd_cli.preparation.prepare import close_cache, fill, writer_of
from mbcd_cli.preparation.trunk import build_trunk, save_weights
from mbcd_cli.resolved import load_settings, resolve, validate
from mbcd_cli.runtime import pick_device
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import Layer

_ASIDE = ".repair"


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was done to one cache: names of the files computed anew, and the root checksum that it has now."""

    folder: Path
    files: list[str]
    root_checksum: str


def repair(path: Path, *, flags: Mapping[str, object] | None = None, say: Say = SILENT) -> list[Repaired]:
    """Make every cache under `path` whole again; whole ones are left alone.

    Args:
        flags: settings that may differ from those it was prepared with: where the media lie, device, workers.

    Raises:
        CacheError: no cache is there, its settings are gone, or the media are not those it was prepared from; what it
            held is then left as it is.
    """
    for answer in path.rglob(f"{checksums.ANSWER}*.json"):
        if not checksums.is_whole(answer):
            answer.unlink()  # `prepare` looks for itself then
    folders = sorted({file.parent for file in path.rglob("*") if _is_of_cache(file)} - {path / _ASIDE})
    if not folders:
        raise CacheError(f"There is no cache in {path}.", "Name a cache folder, a dataset's, or the one of all caches.")
    return [_repair(folder, flags or {}, say) for folder in folders]


def _is_of_cache(file: Path) -> bool:
    named = file.name in ("index.h5", PREPARED_WITH) or (file.name.startswith("shard-") and file.suffix == ".h5")
    return named and file.parent.name != _ASIDE


def _repair(folder: Path, flags: Mapping[str, object], say: Say) -> Repaired:
    faults = {file.name for file in _faults(folder)}
    if not faults:
        return Repaired(folder, [], ModalityCache(folder).root_checksum)
    say(f"{folder}: {', '.join(sorted(faults))} damaged or missing")
    try:
        settings = resolve(base=_prepared_with(folder, faults), flags=flags)
        return _compute_anew(folder, faults, settings, say)
    except MbcdError as error:
        raise type(error)(f"{folder} cannot be repaired: {error.message}", error.remedy) from error


def _faults(folder: Path) -> list[Path]:
    """Of a cache's own files: folders in it are caches of corrupted views."""
    return [file for file in examine(folder).faults if file.parent == folder]


def _prepared_with(folder: Path, faults: Collection[str]) -> Layer:
    """The settings that a cache was prepared with, from the file beside its index or from the index.

    Raises:
        CacheError: neither is whole.
    """
    if PREPARED_WITH not in faults:
        tree = load_settings(folder / PREPARED_WITH)
    elif "index.h5" not in faults:
        with open_hdf5(folder / "index.h5") as index:
            tree = validate(tomllib.loads(index["settings"].asstr()[()]))
    else:
        raise CacheError(
            "the settings that it was prepared with are damaged, too.",
            "Run the same `mbcd prepare` again: it uses what is whole.",
        )
    return Layer("the cache's settings", tree.model_dump(mode="json", exclude_none=True))


def _compute_anew(folder: Path, faults: set[str], settings: Settings, say: Say) -> Repaired:
    spoilt = (folder.parent / PREPARED_WITH).exists()
    corruption = Corruption.of_folder(folder.name) if spoilt else None
    if spoilt and corruption is None:
        raise CacheError("its corruption is by formulas of another version.", "Delete that folder: nothing reads it.")
    clean = folder if corruption is None else folder.parent
    cache = settings.cache.model_copy(update={"dir": clean.parent.parent})
    settings = settings.model_copy(update={"cache": cache})
    device = pick_device(settings.runtime)
    listing = read_listing(settings)
    name = clean.name.rsplit("-", 1)[0]
    modality = listing.modalities.get(name)
    frozen = None if modality is None else build_trunk(settings, name, modality)
    plan = frozen and plan_cache(settings, listing, name, modality, weights=frozen.source)
    if plan is None or plan.folder.name != clean.name:
        raise CacheError(
            f"{settings.dataset.root or listing.name} is not what it was prepared from: clips, files or their sizes "
            "differ.",
            "Bring the media back as they were (--root says where they are), or prepare anew.",
        )
    if corruption is not None:
        (plan,) = corrupted_plans(plan, settings, listing.clips, modality, [(corruption.name, corruption.severity)])
        frozen = replace(frozen, weights={})
    with Crew(folder, REPAIR) as alone, _emptied(folder / _ASIDE) as aside:
        alone.lead()
        remove_partial(folder)
        writer = writer_of(settings, listing, name, modality, frozen, plan, folder=aside)
        shards = [n for n in range(len(plan.shards)) if _lacks(folder, shard_path(folder, n).name, faults)]
        fill(writer, settings, plan, frozen.trunk.to(device), shards, device=device, label=name, say=say)
        weights = [file for file in frozen.weights if _lacks(folder, file, faults)]
        for file in weights:
            save_weights(aside / file, frozen.weights[file])
        index_is_wrong = _put_back(folder, aside, [*(shard_path(aside, n).name for n in shards), *weights])
        if index_is_wrong or faults & {"index.h5", PREPARED_WITH}:
            whole = writer_of(settings, listing, name, modality, frozen, plan, folder=folder)
            close_cache(whole, settings, listing.rejected)
    left = _faults(folder)
    if left:
        raise CacheError(f"{left[0]} is still damaged.", "Another process may have written there; try again.")
    return Repaired(folder, sorted(faults), ModalityCache(folder).root_checksum)


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder that is not there before and after."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lacks(folder: Path, name: str, faults: set[str]) -> bool:
    return name in faults or not (folder / name).exists()


def _put_back(folder: Path, aside: Path, names: Sequence[str]) -> bool:
    """Move what was computed anew to its place, if it is what the index says; whether the index is what is wrong.

    Raises:
        CacheError: the media, or the programs that read them, give other bytes than they gave.
    """
    told, torch_version = {}, ""
    with suppress(MbcdError):
        cache = ModalityCache(folder)
        told, torch_version = cache.files, cache.provenance.get("torch_version", "")
    stale = False
    for name in names:
        now = checksums.checksum(aside / name)
        if told.get(name, now) != now:
            # A whole file of the same bytes is there: the index, put back from some copy, speaks of another.
            with suppress(OSError, ValueError):
                if checksums.verified(folder / name) == now:
                    stale = True
                    continue
            raise CacheError(
                f"{name} comes out with other bytes than it had: the media have changed, or the programs that read "
                f"them (torch was {torch_version}, and is {torch.__version__}).",
                "Bring back the media, and the versions, that it was prepared with; or prepare anew elsewhere.",
            )
    rename({aside / name: folder / name for name in names})
    return stale
