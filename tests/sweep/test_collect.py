"""Collected tables: figures worked out by hand, in every form."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sweep_cases import finish, plan_of

from mbcd_cli.commands.sweep import collect, report_failures
from mbcd_cli.errors import RunError
from mbcd_cli.sweep.collect import axis_tables, balance, load
from mbcd_cli.sweep.state import beside

BETAS = ("0.9", "0.99", "0.999")


@pytest.fixture
def grid(tmp_path):
    cells = plan_of(
        "hac",
        runs=tmp_path / "runs",
        methods="ema,mbcd",
        targets="all",
        seeds="2",
        modality_sets="af",
        grid=(f"objective.teacher.beta={','.join(BETAS)}",),
    )
    for cell in cells:
        finish(cell, top1=top1(cell), records=[epoch(1, 0.3), epoch(2, 0.4)], steps=[step(10, 1.2), step(30, 1.6)])
    return cells


def top1(cell) -> float:
    training = cell.settings.training
    place = ("human", "animal", "cartoon").index(training.target_domain)
    beta = BETAS.index(dict(cell.values)["objective.teacher.beta"])
    return 0.5 + 0.1 * (training.method == "mbcd") + 0.02 * place + 0.03 * beta + 0.01 * training.seed


def epoch(number, accuracy):
    return {"epoch": number, "validation": {"teacher": {"fused": {"accuracy": accuracy}}}}


def step(count, r):
    figures = {"r": r, "p": r - 1, "s": 1.0}
    return {"steps": count, "modalities": {"audio": figures, "flow": {**figures, "r": 1.0}}}


def test_an_axis_of_the_grid_becomes_columns(grid):
    pairs, notes = load(grid)
    assert (len(pairs), notes) == (36, [])
    (table,) = axis_tables(pairs)
    assert list(table.columns) == ["method", *BETAS]
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == ["ema", "mbcd"]
    for method, cells in rows.items():
        for beta, cell in enumerate(cells):
            by_seed = [100 * (0.5 + 0.1 * (method == "mbcd") + 0.02 + 0.03 * beta + 0.01 * s) for s in (0, 1)]
            assert cell.value == pytest.approx(np.mean(by_seed))
            assert cell.std == pytest.approx(np.std(by_seed, ddof=1))
    assert [cell.best for cell in rows["mbcd"]] == [True] * 3


def test_collect_writes_every_form_and_the_papers_figures(grid, tmp_path):
    found = collect(grid, output=tmp_path / "out", title="HAC <beta>")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"comparison.html", "comparison.md", "comparison.json"} <= names
    for table in found["tables"]:
        assert {f"{table['name']}.csv", f"{table['name']}.tex"} <= names
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "| mbcd, beta=0.999 |" in markdown
    assert "| MBCD (paper) | 63.76 | 65.64 | 49.05 | 59.48 |" in markdown
    assert "| adaptive dropout (paper) |" in markdown
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "HAC &lt;beta&gt;" in page
    assert page.count("data:image/png") >= 3
    assert "mbcd, beta=0.9 - ema, beta=0.9" in page
    assert "0.031" in page, "two-sided sign flips over 3 targets x 2 seeds: 2 / 2^6"
    (grid[0].folder / "report.html").write_text("x")
    collect(grid, output=tmp_path / "out", title="t")
    link = f"../runs/hac/{grid[0].folder.name}/report.html"
    assert f'href="{link}"' in (tmp_path / "out" / "comparison.html").read_text()
    assert (tmp_path / "out" / link).is_file()


def test_drop_rates_are_weighted_by_steps(grid):
    found = balance(grid[0].folder)
    assert found["audio"]["r"] == pytest.approx((10 * 1.2 + 30 * 1.6) / 40)
    assert found["audio"]["p"] == pytest.approx((10 * 0.2 + 30 * 0.6) / 40)
    assert found["flow"]["r"] == 1.0


def test_what_is_missing_is_said(grid, tmp_path):
    (grid[0].folder / "results.json").unlink()
    (grid[1].folder / "results.json").unlink()
    beside(grid[1].folder, "failed").write_text(json.dumps({"error": "disk full\nmore", "remedy": ""}))
    found = collect(grid, output=tmp_path / "out", title="t")
    assert f"{grid[1].name} failed: disk full" in found["warnings"]
    assert any("1 of 36 runs are not finished" in note for note in found["warnings"])


def test_nothing_finished_is_an_error(tmp_path):
    cells = plan_of("hac", runs=tmp_path, seeds="1")
    with pytest.raises(RunError, match="No run of this sweep is finished"):
        collect(cells, output=tmp_path / "out", title="t")


def test_failures_end_the_command():
    assert report_failures({"failed": {}}) is None
    error = report_failures({"failed": {"runs/x": "disk full\nmore"}})
    assert "1 run failed:\n  runs/x: disk full" in error.message
    assert "--retry-failed" in error.remedy
