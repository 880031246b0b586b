"""The paper's tables as grids of runs."""

from __future__ import annotations

from dataclasses import dataclass

from mbcd_cli.data.records import MODALITY_ORDER
from mbcd_cli.paper.published import PAPER_DATASETS


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table of the paper: what it varies, and on which datasets the paper shows it."""

    title: str
    protocol: str
    methods: tuple[str, ...]
    modality_sets: tuple[tuple[str, ...], ...]
    datasets: tuple[str, ...] = PAPER_DATASETS


_V, _A, _F = MODALITY_ORDER
_RIVALS = ("rna-net", "simmmdg", "moosa", "cmrf")  # RNA-Net is not in the in-domain table


TABLES: dict[int, PaperTable] = {
    1: PaperTable(
        "multi-source domain generalization",
        "multi-source",
        ("erm", *_RIVALS, "mbcd"),
        ((_V, _A), (_V, _F), (_A, _F), (_V, _A, _F)),
    ),
    2: PaperTable("single-source domain generalization", "single-source", ("erm", *_RIVALS, "mbcd"), ((_V, _A, _F),)),
    3: PaperTable(
        "in-domain accuracy", "in-domain", ("erm", *_RIVALS[1:], "mbcd"), ((_V, _A, _F),), ("epic-kitchens",)
    ),
    4: PaperTable(
        "ablation of the three parts",
        "multi-source",
        ("erm", "ema", "ema+amd", "ema+gcc", "ema+dl", "mbcd"),
        ((_A, _F),),
        ("epic-kitchens",),
    ),
    5: PaperTable(
        "modality dropout",
        "multi-source",
        ("mbcd-no-dropout", "mbcd-fixed-dropout", "mbcd"),
        ((_A, _F),),
        ("hac",),
    ),
}
"""The paper's tables, with all of its methods, and ERM in table 3, where the paper has none."""
