"""The papers' rows for a table of ours: same dataset, modalities and targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations

from mbcd_cli.paper.published import paper, published_domains
from mbcd_cli.resolved import PUBLISHED


def published_rows(
    setting: str, dataset: str, modalities: Sequence[str], columns: Sequence[str], *, ablations: bool = False
) -> list[tuple[str, list[float | None]]]:
    """(method and source, figures of the columns and their average, in percent); none where the targets are others.

    A paper's averages are over all domains (or ordered pairs): they are left out where `columns` are fewer or others.

    Args:
        setting: multi-source, single-source or in-domain.
        ablations: the paper's ablations too, where it shows them in this setting.
    """
    multi = setting == "multi-source"
    if multi and not set(columns) <= _targets(dataset):
        return []
    rows = list(_rows(setting.replace("-", "_"), dataset, modalities, columns))
    if multi and ablations:
        rows += [(f"ablation: {label}", cells) for label, cells in _rows("ablation", dataset, modalities, columns)]
        rows += _rows("dropout", dataset, modalities, columns)
    return rows


def _rows(
    table: str, dataset: str, modalities: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, list[float | None]]]:
    domains = published_domains(dataset)
    pairs = {f"{source} to {target}" for source, target in permutations(domains, 2)}
    whole = set(columns) == (pairs if table == "single_source" else set(domains))
    for row in paper()[table]:
        figures = row.figures.get(dataset, {})
        if figures and set(row.modalities) == set(modalities):
            cells = [figures.get(column) for column in columns]
            cells.append(figures.get("average") if whole else None)
            if any(cell is not None for cell in cells):
                yield f"{row.method} ({row.source})", cells


def _targets(dataset: str) -> set[str]:
    """Targets of which some paper tells figures."""
    return {column for row in paper()["multi_source"] for column in row.figures.get(dataset, {})} - {"average"}


def is_published(label: str) -> bool:
    """Whether a row of this label is a paper's."""
    return label.endswith("paper)")


def place_of_set(modalities: Sequence[str]) -> int:
    """Where the paper's table has this set of modalities; after its last one for others."""
    sets = [set(row.modalities) for row in paper()["multi_source"]]
    return sets.index(set(modalities)) if set(modalities) in sets else len(sets)


def order_methods(methods: Iterable[str]) -> list[str]:
    """As in the paper's tables: ERM first, then its average, the others by name, MBCD last, whatever their chassis."""
    first, last = {"erm": 0, "ema": 1}, {"mbcd": 1}

    def place(method: str) -> tuple[int, int, str]:
        plain = method.removesuffix(PUBLISHED)
        return last.get(plain, 0), first.get(plain, 2), method

    return sorted(set(methods), key=place)
