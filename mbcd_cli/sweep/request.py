"""What a sweep is asked for on the command line, and the cells that this means."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import method_class
from mbcd_cli.paper.grids import TABLES
from mbcd_cli.paper.published import paper_domains
from mbcd_cli.resolved import layers_of, named_dataset, settled, stated
from mbcd_cli.runs.names import run_name
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings
from mbcd_cli.settings.ranges import searched
from mbcd_cli.sweep.plan import Cell, parse_grid, parse_modality_set, plan, splits
from mbcd_cli.sweep.search import FORMS, Search, check_search


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for, as texts; None is what the table, the preset or a default says.

    Attributes:
        table: number of one of the paper's tables.
        targets: all, or names.
        methods, modality_sets: names, separated by commas.
        protocol: multi-source, single-source or in-domain.
        seeds: how many (3 means 0, 1, 2), or the seeds themselves (0,4,7; one alone: 7,).
        grid: axes, `key=v1,v2`.
        search: random configurations that are tried beside the default one; None: no search.
        search_protocol: one of `search.FORMS`.
        leave_one_source_out: train every run once more without each of its sources, for the rules of selection.
    """

    table: int | None = None
    targets: str | None = None
    methods: str | None = None
    modality_sets: str | None = None
    protocol: str | None = None
    seeds: str = "3"
    grid: Sequence[str] = ()
    search: int | None = None
    search_protocol: str = FORMS[0]
    leave_one_source_out: bool = False


def plan_cells(
    request: Request,
    *,
    preset: str | None,
    config: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, object],
    runs_dir: Path,
    say: Say = SILENT,
) -> list[Cell]:
    """The cells that `request` means; of a search, those that it is for (`search_of` tells their trials).

    Raises:
        SettingsError: unknown names, or a request that contradicts itself.
    """
    if request.table is not None and request.table not in TABLES:
        raise SettingsError(
            f"--table {request.table}: there is no such table.", f"Use one of {', '.join(map(str, TABLES))}."
        )
    seeds = parse_seeds(request.seeds)
    check_search(request.search, request.search_protocol, seeds)
    table = TABLES[request.table] if request.table is not None else None
    grid = parse_grid(request.grid)

    said = layers_of(preset=preset, config=config, environ=os.environ)
    unsaid = request.search is not None and stated([*said, *layers_of(sets=sets)], "dataset.seal_target") is None
    sealed = ["dataset.seal_target=true"] if unsaid else []

    def build(method: str, values: Mapping[str, str], cell: Mapping[str, object]) -> Settings:
        # The grid's values come last: they are what the cells differ in.
        assigned = [*sealed, *sets, *(f"{key}={value}" for key, value in values.items())]
        layers = [*said, *layers_of(method=method, sets=assigned, flags={**flags, **cell})]
        return named(settled(layers, lowest=preset is not None), preset)

    for flag, text in (
        ("--methods", request.methods),
        ("--targets", request.targets),
        ("--modality-sets", request.modality_sets),
    ):
        if text is not None and not _names(text):
            raise SettingsError(f"{flag} {text!r} names nothing.", "Write names separated by commas, or leave it out.")
    methods = _names(request.methods) or (table.methods if table else ("erm", "mbcd"))
    for method in methods:
        method_class(method)
    first = {key: values[0] for key, values in grid.items()}
    base = build(methods[0], first, {})
    domains = _domains(base)
    available = tuple(base.modalities) or _prepared_modalities(base)
    protocol = request.protocol or (table.protocol if table else "multi-source")
    targets = _targets(request.targets, base, domains, whole=table is not None or protocol == "in-domain")
    for text in grid.get("model.modalities", ()):
        parse_modality_set(text.replace(",", "+"), available, flag="--grid model.modalities=")
    return plan(
        build,
        methods=methods,
        modality_sets=_modality_sets(request, table.modality_sets if table else None, base, available, say),
        pairs=splits(protocol, domains, targets),
        seeds=seeds if request.search is None else seeds[:1],
        grid=grid,
        runs=runs_dir,
        name=run_name,
    )


def search_of(request: Request, cells: Sequence[Cell], *, sets: Sequence[str], say: Say = SILENT) -> Search | None:
    """The search that is asked for, of the cells of `plan_cells`; None where there is none.

    What `--set` or the environment say of a setting stays; `say` is told of it.
    """
    if request.search is None:
        return None
    layers = layers_of(environ=os.environ, sets=sets)
    paths = dict.fromkeys(path for cell in cells for path, _, _ in searched(cell.settings))
    fixed = [path for path in paths if stated(layers, path) is not None]
    if fixed:
        say(f"Set, and so not searched: {', '.join(fixed)}.")
    return Search(
        bases=cells,
        count=request.search,
        seeds=parse_seeds(request.seeds),
        benchmark=request.search_protocol != FORMS[0],
        fixed=frozenset(fixed),
    )


def named(settings: Settings, preset: str | None) -> Settings:
    """The settings with a dataset's name, the preset's where they have none."""
    settings = named_dataset(settings, preset)
    if settings.dataset.name is None:
        raise SettingsError("No dataset is named.", "Use --preset NAME or --dataset NAME.")
    return settings


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def parse_seeds(text: str) -> tuple[int, ...]:
    """`--seeds`: 3 -> 0, 1, 2; `0,4,7` -> these; `7,` -> this one.

    Raises:
        SettingsError: neither.
    """
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.removesuffix(",").split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or ("," not in text and numbers[0] < 1):
        remedy = "Write how many (3), or the seeds themselves (0,4,7; one alone: 7,)."
        raise SettingsError(f"--seeds {text}: no seeds.", remedy)
    return numbers if "," in text else tuple(range(numbers[0]))


def _domains(settings: Settings) -> tuple[str, ...]:
    """Named by the settings, else by the paper, else by the cache."""
    return (
        settings.dataset.domains
        or paper_domains(settings)
        or open_dataset(settings, name=str(settings.dataset.name), modalities=settings.model.modalities).domains
    )


def _prepared_modalities(settings: Settings) -> tuple[str, ...]:
    return tuple(open_dataset(settings, name=str(settings.dataset.name)).modalities)


def _targets(text: str | None, settings: Settings, domains: Sequence[str], *, whole: bool) -> tuple[str, ...]:
    if text is not None and text != "all":
        return _names(text)
    chosen = settings.training.target_domain
    return (chosen,) if chosen and text is None and not whole else tuple(domains)


def _modality_sets(
    request: Request, of_table: Sequence[tuple[str, ...]] | None, settings: Settings, available: Sequence[str], say: Say
) -> list[tuple[str, ...]]:
    if request.modality_sets is not None:
        sets = [parse_modality_set(text, available) for text in _names(request.modality_sets)]
        return list(dict.fromkeys(sets))
    own = tuple(settings.model.modalities) or tuple(available)
    if of_table is None:
        return [own]
    fitting = [names for names in of_table if set(names) <= set(available)]
    if not fitting:
        say(f"The table's modalities are not all here: using {'+'.join(own)} instead.")
    return fitting or [own]


def title_of(request: Request, cells: Sequence[Cell]) -> str:
    """The page's title: the dataset and the table, or what is varied."""
    names = list(dict.fromkeys(str(cell.settings.dataset.name) for cell in cells))
    methods = ", ".join(dict.fromkeys(cell.method for cell in cells))
    what = f"table {request.table}: {TABLES[request.table].title}" if request.table else f"sweep of {methods}"
    axes = ", ".join(text.split("=")[0] for text in request.grid)
    chassis = ", published chassis" if cells[0].published else ""
    form = "" if request.search is None else f", {request.search_protocol} search of {request.search} and the default"
    return f"{', '.join(names)}, {what}{chassis}{form}" + (f" over {axes}" if axes else "")


def output_of(request: Request, cells: Sequence[Cell]) -> Path:
    """The default folder of the collected tables: `sweeps/<dataset>[-table-N][-published][-search][-axis...]`."""
    parts = [str(cells[0].settings.dataset.name)]
    parts += [f"table-{request.table}"] if request.table else []
    parts += [request.protocol] if request.protocol else []
    parts += ["published"] if cells[0].published else []
    parts += [] if request.search is None else [f"{request.search_protocol}-search-{request.search}"]
    parts += [text.split("=")[0].strip().rsplit(".", 1)[-1] for text in request.grid]
    return Path("sweeps") / "-".join(parts)
