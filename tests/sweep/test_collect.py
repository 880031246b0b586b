"""Collected tables: figures worked out by hand, in every form."""

from __future__ import annotations

import numpy as np
import pytest
from sweep_cases import finish, plan_of

from mbcd_cli.cli.sweep import show_sweep
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.files import read_json, write_json
from mbcd_cli.launch.unit import beside
from mbcd_cli.sweep.collect import axis_tables, links, load, panel_tables, training_means
from mbcd_cli.sweep.run import SweepOutcome
from mbcd_cli.sweep.sweep import left_out_of, report_failures, write_tables

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
        grid=(f"average.beta={','.join(BETAS)}",),
    )
    for cell in cells:
        finish(cell, top1=top1(cell), records=[epoch(1, 0.3), epoch(2, 0.4)], steps=[step(10, 1.2), step(30, 1.6)])
    return cells


def top1(cell) -> float:
    training = cell.settings.training
    place = ("human", "animal", "cartoon").index(training.target_domain)
    beta = BETAS.index(dict(cell.values)["average.beta"])
    return 0.5 + 0.1 * (cell.settings.method.name == "mbcd") + 0.02 * place + 0.03 * beta + 0.01 * training.seed


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
    lacking = [(c, r) for c, r in pairs if (r.method, r.target) != ("ema, beta=0.9", "human")]
    ema = axis_tables(lacking)[0].rows[0]
    assert [cell.value is None for cell in ema[1:]] == [True, False, False], "an average over other targets than mbcd's"


def test_collect_writes_every_form_and_the_papers_figures(grid, tmp_path):
    found = write_tables(grid, output=tmp_path / "out", title="HAC <beta>")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"comparison.html", "comparison.md", "comparison.json"} <= names
    for table in found.tables:
        assert {f"{table.name}.csv", f"{table.name}.tex"} <= names
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "| mbcd, beta=0.999 |" in markdown
    assert "| MBCD (paper) | 63.76 | 65.64 | 49.05 | 59.48 |" in markdown
    assert "| adaptive dropout (paper) |" in markdown
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "HAC &lt;beta&gt;" in page
    assert page.count("data:image/png") >= 3
    assert "mbcd, beta=0.9 - ema, beta=0.9" in page
    assert "what can be claimed" in page
    (grid[0].folder / "report.html").write_text("x")
    write_tables(grid, output=tmp_path / "out", title="t")
    link = f"../runs/hac/{grid[0].folder.name}/report.html"
    assert f'href="{link}"' in (tmp_path / "out" / "comparison.html").read_text()
    assert (tmp_path / "out" / link).is_file()


def test_drop_rates_are_weighted_by_steps(grid):
    found = training_means(grid[0].folder, ["r", "p"])
    assert found["audio"]["r"] == pytest.approx((10 * 1.2 + 30 * 1.6) / 40)
    assert found["audio"]["p"] == pytest.approx((10 * 0.2 + 30 * 0.6) / 40)
    assert found["flow"]["r"] == 1.0


def test_what_is_missing_is_said(grid, tmp_path):
    (grid[0].folder / "results.json").unlink()
    (grid[1].folder / "results.json").unlink()
    write_json(beside(grid[1].folder, "failed"), {"error": "disk full\nmore", "remedy": ""})
    found = write_tables(grid, output=tmp_path / "out", title="t")
    assert f"{grid[1].name} failed: disk full" in found.warnings
    assert any("1 of 36 runs are not finished" in note for note in found.warnings)


def test_a_run_that_cannot_be_read_is_left_out_and_named(grid, tmp_path):
    path, other = grid[0].folder / "results.json", grid[1].folder / "results.json"
    path.write_text("{broken")
    write_json(other, {**read_json(other), "dataset": "another"})
    pairs, notes = load(grid)
    assert len(pairs) == len(grid) - 2
    assert f"{grid[0].name} is left out" in notes[0]
    assert f"Delete {path} and run the sweep again" in notes[0]
    assert "tells of another run (another, ema" in notes[1]
    beside(grid[2].folder, "lock").touch()  # a lock that nobody holds any more
    write_tables(grid, output=tmp_path / "out", title="t")
    assert "is left out" in (tmp_path / "out" / "comparison.html").read_text()


def test_runs_on_different_caches_of_one_dataset_are_a_warning(grid):
    for cell, key in zip(grid, ["one"] + ["two"] * 99, strict=False):
        path = cell.folder / "results.json"
        write_json(path, {**read_json(path), "provenance": {"audio cache": key}})
    _, (note,) = load(grid)
    assert "2 different caches of audio (one, two)" in note


def test_dominance_over_sets_of_modalities_is_one_table(tmp_path):
    sets = '["m1,m2", "m1,m2,m3,m4"]'
    cells = plan_of("synthetic-4", runs=tmp_path, targets="all", methods="mbcd", grid=(f"model.modalities={sets}",))
    for cell in cells:
        names = cell.settings.model.modalities
        figures = {name: {"r": len(names) - i, "p": 0.1 * i, "s": 1.0} for i, name in enumerate(names)}
        finish(cell, top1=0.5, steps=[{"steps": 1, "modalities": figures}])
    pairs, _ = load(cells)
    assert axis_tables(pairs)[0].columns[1:] == ["m1+m2", "m1+m2+m3+m4"]
    (table,) = panel_tables(pairs)
    assert list(table.columns) == ["modalities", "method", "m1", "m2", "m3", "m4"]
    rows = [[*row[:2], *(cell.value for cell in row[2:])] for row in table.rows]
    assert rows == [
        ["m1+m2", "mbcd: r_k", 2, 1, None, None],
        ["m1+m2", "mbcd: drop rate (%)", 0, 10, None, None],
        ["m1+m2+m3+m4", "mbcd: r_k", 4, 3, 2, 1],
        ["m1+m2+m3+m4", "mbcd: drop rate (%)", 0, 10, 20, pytest.approx(30)],
    ]


def test_runs_without_reports_are_linked_by_their_folders_and_failures_told(grid, tmp_path):
    (grid[1].folder / "results.json").unlink()
    write_json(beside(grid[1].folder, "failed"), {"error": "disk <full>", "remedy": ""})
    page = links(grid, tmp_path / "out")
    assert f'href="../runs/hac/{grid[0].folder.name}/"' in page
    assert "(failed: disk &lt;full&gt;)" in page
    assert f"{len(grid) - 1} of {len(grid)} done" in page


def test_the_terminal_shows_rows_once(tmp_path, capsys):
    cells = plan_of("hac", runs=tmp_path / "runs", table=1, seeds="1")
    for cell in cells:
        finish(cell, top1=0.5)
    show_sweep(write_tables(cells, output=tmp_path / "out", title="t"))
    shown = capsys.readouterr().out
    assert "hac, multi-source: top-1 accuracy (%) by modalities" in shown
    assert "hac, audio+flow, multi-source: top-1" not in shown
    assert (tmp_path / "out" / "hac-audio-flow-multi-source.csv").is_file()


def test_nothing_finished_is_an_error(tmp_path):
    cells = plan_of("hac", runs=tmp_path, seeds="1")
    with pytest.raises(RunError, match="No run of this sweep is finished"):
        write_tables(cells, output=tmp_path / "out", title="t")


def test_failures_end_the_command():
    assert report_failures(SweepOutcome()) is None
    error = report_failures(SweepOutcome({"runs/x": "disk full\nmore"}))
    assert "1 run failed:\n  runs/x: disk full" in error.message
    assert "--retry-failed" in error.remedy


def test_leave_one_source_out_chooses_the_epoch_that_is_best_on_each_source_when_it_is_unseen(tmp_path):
    cells = plan_of("synthetic-4", runs=tmp_path / "runs", targets="all", methods="erm", seeds="1")
    left_out = left_out_of(cells)
    others = list({cell.key: cell for each in left_out.values() for cell in each}.values())
    domains = {(one.settings.training.source_domains, one.settings.training.target_domain) for one in others}
    assert domains == {((a,), b) for a in ("north", "east", "south") for b in ("north", "east", "south") if a != b}
    assert {len(each) for each in left_out.values()} == {2}
    told = {"student": {"fused": {"accuracy": 0.5, "loss": 1.0}}}

    def records(*accuracies: float) -> list[dict]:
        return [
            {"epoch": epoch, "validation": told, "target": {"student": {"fused": {"accuracy": value}}}, "best_epoch": 1}
            for epoch, value in enumerate(accuracies, 1)
        ]

    for cell in cells:
        finish(cell, top1=0.5, records=records(0.1, 0.3, 0.2))
    for cell in others:
        finish(cell, top1=0.5, records=records(0.1, 0.2, 0.9))
    done = write_tables(cells, output=tmp_path / "out", title="t", left_out=left_out)
    lines = [line.split(",") for line in (tmp_path / "out/selection.csv").read_text().splitlines()]
    by_rule = [line[-4:] for line in lines if "leave one source out" in line]
    assert by_rule == [["leave one source out", "3", "20.0", "10.0"]] * 3
    assert set(done.runs) == {cell.folder for cell in (*cells, *others)}
    (others[0].folder / "results.json").unlink()
    fewer = write_tables(cells, output=tmp_path / "out", title="t", left_out=left_out)
    assert any("Leave one source out: 1 of 6 runs are not finished" in note for note in fewer.warnings)
    assert (tmp_path / "out/selection.csv").read_text().count("leave one source out") == 2
    with pytest.raises(SettingsError, match="two sources and a target"):
        left_out_of(plan_of("synthetic-4", runs=tmp_path, targets="all", methods="erm", protocol="single-source"))
