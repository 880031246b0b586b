"""Plans of made-up cells, and what a finished run leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from mbcd_cli.files import write_json
from mbcd_cli.sweep.request import Request, plan_cells
from mbcd_cli.sweep.run import CellUnit


def plan_of(preset: str, runs: Path = Path("runs"), sets=(), flags=None, **request):
    """The cells of a request on a shipped preset."""
    return plan_cells(Request(**request), preset=preset, config=None, sets=list(sets), flags=flags or {}, runs_dir=runs)


def units_of(cells, width=0):
    """Each cell a unit, or all of them one population."""
    return [CellUnit(cells, width)] if width else [CellUnit([cell]) for cell in cells]


def finish(cell, *, top1: float, heads: dict[str, float] | None = None, records=(), steps=()) -> None:
    """Write what training and evaluating this cell would have left."""
    folder, training = cell.folder, cell.settings.training
    folder.mkdir(parents=True, exist_ok=True)
    names = cell.settings.model.modalities
    figures = {"fused": top1, **(heads or dict.fromkeys(names, top1 - 0.1))}
    results = {
        "format": 2,
        "settings": {},
        "fingerprints": {},
        "dataset": cell.settings.dataset.name,
        "modalities": list(names),
        "method": cell.settings.method.name,
        "target_domain": training.target_domain,
        "source_domains": list(training.source_domains),
        "seed": training.seed,
        "headline": {"checkpoint": "best", "model": "teacher", "clips": "target", "top1": figures},
        "models": {"best": {"teacher": {"source": {"fused": {"top1": 0.9}}}}},
    }
    write_json(folder / "results.json", results)
    write_json(folder / "done", {"steps": 100, "steps_per_second": 10.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
