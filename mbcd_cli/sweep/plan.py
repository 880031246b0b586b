"""What a sweep consists of: cells, each one training with its evaluation, named by the hash of its settings.

A plan is made without looking at data: domains and modalities are given. The paper's tables are `TABLES`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

from mbcd_cli.data.records import MODALITY_ORDER, modality_order
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import code_digest, short_name
from mbcd_cli.naming import did_you_mean
from mbcd_cli.resolved import PUBLISHED
from mbcd_cli.runs.names import run_name, settings_key
from mbcd_cli.settings import Settings, role_of
from mbcd_cli.settings.sources import parse_value

PROTOCOLS = ("multi-source", "single-source", "in-domain")
# Settings that have a flag of their own, and the flag.
_FLAGS = {
    "method.name": "--methods",
    "training.seed": "--seeds",
    "training.target_domain": "--targets",
    "training.source_domains": "--protocol",
    "cache.dir": "--cache-dir",
}
# Axes that tables are split by already, so that a row's name need not tell them.
_GROUPED = ("dataset.name", "dataset.root", "model.modalities")

Build = Callable[[str, Mapping[str, str], Mapping[str, Any]], Settings]
"""(method, grid values as text, flags by dotted path) -> the resolved settings of one cell."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep.

    Attributes:
        settings: with target, sources, modalities and seed spelt out.
        key: hash of all settings that weights depend on; equal cells of two sweeps share it, and so one run folder.
        folder: the run folder.
        method: the method's name.
        values: (setting, value) of every grid axis.
        trial: its number among the configurations that a search tries, None for others.
    """

    settings: Settings
    key: str
    folder: Path
    method: str
    values: tuple[tuple[str, str], ...] = ()
    trial: int | None = None

    def label(self, leave_out: Iterable[str] = ()) -> str:
        """The method and the grid's values, as a row of a table is called: `mbcd, beta=0.99`."""
        parts = [f"{k.rsplit('.', 1)[-1]}={v}" for k, v in self.values if k not in (*_GROUPED, *leave_out)]
        return ", ".join([self.method + (PUBLISHED if self.published else ""), *parts])

    @property
    def published(self) -> bool:
        """Whether it is on its method's published chassis, unless the chassis is an axis of the grid, which tells."""
        return self.settings.training.chassis == "published" and "training.chassis" not in dict(self.values)

    @property
    def name(self) -> str:
        """What is trained and tested, for lists."""
        training = self.settings.training
        target = training.target_domain
        where = "+".join(training.source_domains) + (f" -> {target}" if target else " in-domain")
        grouped = [v for k, v in self.values if k in _GROUPED and k != "model.modalities"]
        modalities = "+".join(self.settings.model.modalities)
        which = f"seed {training.seed}" if self.trial is None else f"trial {self.trial}"
        return ", ".join([*grouped, self.label(), modalities, where, which])


def cell_key(settings: Settings) -> str:
    """`settings_key`, and what the method's own file says where it comes from one: an edited method trains anew."""
    key, code = settings_key(settings), code_digest(settings.method.name)
    return hashlib.sha256(f"{key} {code}".encode()).hexdigest()[:12] if code else key


def with_settings(cell: Cell, settings: Settings) -> Cell:
    """The cell of other settings of the same dataset, with a folder beside it."""
    key = cell_key(settings)
    return replace(cell, settings=settings, key=key, folder=cell.folder.with_name(f"{run_name(settings)}-{key}"))


def without_each_source(cell: Cell) -> list[Cell]:
    """The same training without each of its sources, which is the unseen domain then; none where it has one source."""
    training = cell.settings.training
    if training.target_domain is None or len(training.source_domains) < 2:
        return []
    domains = [
        {"source_domains": tuple(d for d in training.source_domains if d != out), "target_domain": out}
        for out in training.source_domains
    ]
    return [
        with_settings(cell, cell.settings.model_copy(update={"training": training.model_copy(update=one)}))
        for one in domains
    ]


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`key=v1,v2` per axis; a value that holds commas is written in a TOML list: `key=["a,b", "c"]`.

    Raises:
        SettingsError: not of that form, an axis twice, or an axis that has its own flag.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, _, values = (part.strip() for part in text.partition("="))
        if not key or not values or "." not in key:
            raise SettingsError(f"--grid {text}: not a grid axis.", "Write --grid part.field=value1,value2.")
        if key in _FLAGS:
            raise SettingsError(f"--grid {text}: {key} has its own flag.", f"Use {_FLAGS[key]}.")
        if role_of(key) in ("machine", "report"):
            raise SettingsError(
                f"--grid {text}: no weight depends on {key}, all its values are one run.",
                f"Use --set {key}=VALUE, or vary a setting of training.",
            )
        if key in grid:
            raise SettingsError(f"--grid {key} is given twice.", "Name all its values in one --grid.")
        listed = parse_value(values) if values.startswith("[") else None
        items = map(_text, listed) if isinstance(listed, list) else (part.strip() for part in values.split(","))
        grid[key] = tuple(dict.fromkeys(item for item in items if item))
        if not grid[key]:
            raise SettingsError(f"--grid {text}: no value.", "Write --grid part.field=value1,value2.")
    return grid


def _text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def splits(protocol: str, domains: Sequence[str], targets: Sequence[str]) -> list[tuple[tuple[str, ...], str | None]]:
    """(sources, target) of every training of a protocol whose tested domain is one of `targets`.

    Multi-source: all others -> target. Single-source: every ordered pair. In-domain: a domain's training split ->
    its own test split (target None).

    Raises:
        SettingsError: an unknown protocol or target, or too few domains.
    """
    if protocol not in PROTOCOLS:
        raise SettingsError(f"There is no protocol {protocol!r}.", f"Use one of {', '.join(PROTOCOLS)}.")
    unknown = [target for target in targets if target not in domains]
    if unknown:
        raise SettingsError(
            f"--targets: there is no domain {', '.join(map(repr, unknown))}.",
            f"{did_you_mean(unknown[0], domains)}The domains are {', '.join(domains)}.",
        )
    if protocol == "in-domain":
        return [((domain,), None) for domain in domains if domain in targets]
    if len(domains) < 2:
        raise SettingsError("Generalization needs at least two domains.", "Use --protocol in-domain.")
    if protocol == "single-source":
        return [((source,), target) for source, target in permutations(domains, 2) if target in targets]
    return [(tuple(d for d in domains if d != target), target) for target in domains if target in targets]


def parse_modality_set(text: str, available: Sequence[str], *, flag: str = "--modality-sets ") -> tuple[str, ...]:
    """`va` or `video+audio` -> (video, audio), in fusion order.

    Raises:
        SettingsError: a modality that the dataset does not have.
    """
    names = [part.strip() for part in text.split("+")]
    letters = {name[0]: name for name in MODALITY_ORDER}
    if len(names) == 1 and names[0] not in available and set(names[0]) <= set(letters):
        names = [letters[letter] for letter in names[0]]
    unknown = [name for name in names if name not in available]
    if unknown or len(set(names)) != len(names):
        raise SettingsError(
            f"{flag}{text}: not a set of this dataset's modalities.",
            f"They are {', '.join(available)}; join them with +, or write letters such as va,af.",
        )
    ordered = [name for name in available if name in names]
    return tuple(modality_order(ordered))


def plan(
    build: Build,
    *,
    methods: Sequence[str],
    modality_sets: Sequence[Sequence[str]],
    pairs: Sequence[tuple[Sequence[str], str | None]],
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[str]],
    runs: Path,
    name: Callable[[Settings], str],
) -> list[Cell]:
    """Every cell, in the order of a table; cells of equal settings appear once.

    Args:
        build: resolves the settings of one cell.
        modality_sets: () where the grid has an axis model.modalities.
        pairs: (sources, target), from `splits`.
        seeds: of the trainings.
        grid: axis -> values.
        runs: folder of all runs; a cell's folder is `<runs>/<dataset>/<name>-<key>`.
        name: readable beginning of a run folder's name.

    Raises:
        SettingsError: from `build`.
    """
    cells: dict[str, Cell] = {}
    times = Counter(map(short_name, methods))  # classes of two files may have one name, and are not one row
    called = {method: short_name(method) if times[short_name(method)] == 1 else method for method in methods}
    axes = list(grid)
    chosen: Sequence[Sequence[str] | None] = [None] if "model.modalities" in grid else list(modality_sets)
    for modalities, values in product(chosen, product(*(grid[axis] for axis in axes))):
        for (sources, target), method, seed in product(pairs, methods, seeds):
            flags: dict[str, Any] = {
                "training.source_domains": tuple(sources),
                "training.target_domain": target or "",  # a preset may name one; None would leave it
                "training.seed": seed,
            }
            if modalities is not None:
                flags["model.modalities"] = tuple(modalities)
            settings = build(method, dict(zip(axes, values, strict=True)), flags)
            if target is None and settings.training.target_domain is not None:
                in_domain = settings.training.model_copy(update={"target_domain": None})
                settings = settings.model_copy(update={"training": in_domain})
            key = cell_key(settings)
            folder = runs / str(settings.dataset.name) / f"{name(settings)}-{key}"
            cells.setdefault(key, Cell(settings, key, folder, called[method], tuple(zip(axes, values, strict=True))))
    return list(cells.values())
