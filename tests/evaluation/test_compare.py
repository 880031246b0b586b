from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch

from mbcd_cli import checksums, console
from mbcd_cli.cli.evaluate import show_comparison
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.evaluation.report import comparison, evaluated, score_tables
from mbcd_cli.evaluation.report import tables as t
from mbcd_cli.evaluation.report.comparison import compare_runs
from mbcd_cli.files import write_json
from mbcd_cli.json_values import json_values
from mbcd_cli.paper.published import PAPER_DATASETS, paper
from mbcd_cli.paper.rows import is_published
from mbcd_cli.scoring.deployed import evaluated_checkpoints

METHODS = {"erm": 50.0, "mbcd": 60.0}


def write_run(root, *, dataset, modalities, method, target, sources, seed, top1, source=80.0, model="teacher"):
    folder = root / f"{dataset}-{method}-{target}-{'-'.join(sources)}-{seed}"
    folder.mkdir(parents=True)
    heads = {"fused": top1 / 100, **dict.fromkeys(modalities, (top1 - 5) / 100)}
    results = {
        "format": 2,
        "settings": {"optimizer.lr": "0.0001", "training.seed": str(seed)},
        "fingerprints": {"audio": "feedc0ffee12"},
        "dataset": dataset,
        "modalities": list(modalities),
        "method": method,
        "target_domain": target,
        "source_domains": list(sources),
        "seed": seed,
        "headline": {"checkpoint": "best", "model": model, "clips": "target", "top1": heads},
        "provenance": {"mbcd": "0.1.0", "best weights, sha256": "a1b2c3d4e5f6a7b8", "audio cache": "feedc0ffee12"}
        | {"audio pretraining": "VGGSound", "flow pretraining": "Kinetics-400"},
        "models": {"best": {model: {"source": {"fused": {"top1": source / 100}}}}},
    }
    write_json(folder / "results.json", results)
    return folder


def grid(root, dataset="epic-kitchens", domains=("D1", "D2", "D3"), modalities=("audio", "flow"), seeds=(0, 1, 2)):
    figures = {}
    for method, target, seed in product(METHODS, domains, seeds):
        top1 = METHODS[method] + 3 * domains.index(target) + seed
        figures[method, target, seed] = top1
        write_run(
            root,
            dataset=dataset,
            modalities=modalities,
            method=method,
            target=target,
            sources=[d for d in domains if d != target],
            seed=seed,
            top1=top1,
        )
    return figures


def rows_of(table):
    """First cell -> figures."""
    return {row[0]: [cell for cell in row[1:] if isinstance(cell, t.Score)] for row in table.rows}


def test_means_spreads_and_averages_by_hand(tmp_path):
    figures = grid(tmp_path)
    done, waiting = evaluated.find_runs([str(tmp_path / "**")])
    assert (len(done), waiting) == (18, [])
    runs, warnings = evaluated.distinct([evaluated.load_run(f) for f in done])
    assert warnings == []
    main, by_head, claims = comparison.compare(runs)
    assert list(main.columns) == ["method", "D1", "D2", "D3", "average", "pretraining"]
    assert [row[0] for row in main.rows[:2]] == ["erm", "mbcd"]
    assert [row[-1] for row in main.rows[:3]] == ["audio VGGSound; flow Kinetics-400"] * 2 + [""]
    for method, cells in rows_of(main).items():
        if method not in METHODS:
            continue
        for target, cell in zip(("D1", "D2", "D3"), cells, strict=False):
            values = [figures[method, target, seed] for seed in range(3)]
            assert cell.value == pytest.approx(np.mean(values))
            assert cell.std == pytest.approx(np.std(values, ddof=1))
        per_seed = [np.mean([figures[method, d, seed] for d in ("D1", "D2", "D3")]) for seed in range(3)]
        assert cells[-1].value == pytest.approx(np.mean(per_seed))
        assert cells[-1].std == pytest.approx(np.std(per_seed, ddof=1))
        assert all(cell.best == (method == "mbcd") for cell in cells)
    heads = rows_of(by_head)["mbcd"]
    assert [cell.value for cell in heads] == pytest.approx([64.0, 59.0, 59.0, 80.0])
    assert claims.rows[0][0] == "mbcd - erm"
    assert claims.rows[0][-1] == "cannot be told: no seed of both"
    assert "outcomes.h5 is missing" in claims.note


def test_the_papers_figures_stand_beside_matching_settings_only(tmp_path):
    grid(tmp_path / "a")
    grid(tmp_path / "b", dataset="av-digits", domains=("studio", "tilted", "street"), modalities=("video", "audio"))
    grid(tmp_path / "c", dataset="hac", domains=("human", "animal", "cartoon"), modalities=("audio", "flow", "video"))
    found = {}
    for folder in "abc":
        done, _ = evaluated.find_runs([str(tmp_path / folder / "**")])
        found[folder] = rows_of(score_tables.main_tables([evaluated.load_run(f) for f in done])[0])
    assert [x.value for x in found["a"]["MBCD (paper)"]] == [59.25, 68.05, 61.95, 63.08]
    assert found["a"]["ablation: EMA+GCC (paper)"][-1].value == 62.28
    assert not any("paper" in name for name in found["b"])
    # Columns in the paper's order; modalities match whatever their order.
    assert [x.value for x in found["c"]["CMRF (paper)"]] == [78.25, 78.07, 55.61, 70.64]
    assert not any(cell.best for name, cells in found["a"].items() if "paper" in name for cell in cells)


def test_zero_shot_rows_stand_below_and_are_never_the_best(tmp_path):
    grid(tmp_path)
    for target in ("D1", "D2", "D3", "D4"):
        common = {"dataset": "epic-kitchens", "method": "zero-shot x", "target": target, "sources": ["a", "b"]}
        for modalities in (("audio",), ("video",)):
            write_run(tmp_path / modalities[0], **common, modalities=modalities, seed=0, top1=99, model="zero-shot")
    done, _ = evaluated.find_runs([str(tmp_path / "**")])
    runs = [evaluated.load_run(folder) for folder in done]
    main, alone = score_tables.main_tables(runs)
    assert list(main.columns[1:-1]) == ["D1", "D2", "D3", "average"]  # not D4, of which no method is told
    assert [row[0] for row in main.rows][:3] == ["erm", "mbcd", "zero-shot x"]
    assert [cell.value for cell in rows_of(main)["zero-shot x"]] == [99.0] * 4
    assert not any(cell.best for cell in rows_of(main)["zero-shot x"])
    assert all(cell.best for cell in rows_of(main)["mbcd"])
    assert main.note == (
        "Mean and standard deviation over 3 seeds. Zero-shot rows: nothing was trained on the sources."
    )
    assert (alone.name, len(alone.columns)) == ("epic-kitchens-video-multi-source", 7)
    assert [row[-1] for row in (main.rows[2], alone.rows[0])] == ["VGGSound", "unknown"]
    assert not any("zero-shot" in str(row) for table in comparison.compare(runs)[2:] for row in table.rows)


def test_zero_shot_rows_beside_runs_of_fewer_sources_and_of_another_split(tmp_path):
    common = {"dataset": "d", "seed": 0, "top1": 50}
    trained = write_run(tmp_path / "t", **common, modalities=("audio", "flow"), method="erm", target="b", sources="ac")
    row = {**common, "modalities": ("audio",), "method": "zero-shot x", "model": "zero-shot", "target": "b"}
    whole, part = (write_run(tmp_path / "z", **row, sources=sources) for sources in ("acd", "ac"))

    def names(*folders, **splits):
        runs = [evaluated.load_run(folder) for folder in folders]
        runs = [replace(r, settings={"dataset.target_split": splits.get(r.method, "test")}) for r in runs]
        return {run.path: run.method for run in evaluated.told_apart(runs)[0]}

    assert names(trained, whole) == {trained: "erm", whole: "zero-shot x"}
    assert set(names(whole, part).values()) == {"zero-shot x", "zero-shot x (without d)"}
    apart = ["erm (target_split all)", "zero-shot x (target_split test)"]
    assert [*names(trained, whole, erm="all").values()] == apart


def test_the_papers_layout_joins_datasets_and_modalities(tmp_path):
    one = grid(tmp_path / "a")
    two = grid(tmp_path / "b", dataset="hac", domains=("animal", "human", "cartoon"), modalities=("audio", "flow"))
    all_three = grid(tmp_path / "c", modalities=("video", "audio", "flow"), seeds=(0,))
    done, _ = evaluated.find_runs([str(tmp_path / "**")])
    (table,) = score_tables.joint_tables([evaluated.load_run(f) for f in done])
    names = ["D1", "D2", "D3", "average"]
    hac = ["human", "animal", "cartoon", "average"]
    assert list(table.columns) == [
        *("modalities", "method"),
        *(f"epic-kitchens: {n}" for n in names),
        *(f"hac: {n}" for n in hac),
    ]
    ours = ("erm", "mbcd")
    papers = [f"{name} (paper)" for name in ("ERM", "RNA-Net", "SimMMDG", "MOOSA", "CMRF", "MBCD")]
    others = [f"{name} (MER-DG's paper)" for name in ("ERM", "SimMMDG", "CMRF")]
    assert [row[:2] for row in table.rows] == [
        *(["audio+flow", m] for m in (*ours, *papers)),
        *(["video+audio+flow", m] for m in (*ours, *papers, *others)),
    ]
    assert [is_published(row[1]) for row in table.rows] == [row[1] not in ours for row in table.rows]
    ours, whole = table.rows[1][2:], table.rows[9][2:]
    for cell, target in zip(ours[:3], names, strict=False):
        assert cell.value == pytest.approx(np.mean([one["mbcd", target, s] for s in range(3)]))
    for cell, target in zip(ours[4:7], hac, strict=False):
        assert cell.value == pytest.approx(np.mean([two["mbcd", target, s] for s in range(3)]))
    assert whole[3].value == pytest.approx(np.mean([all_three["mbcd", d, 0] for d in names[:3]]))
    assert [cell.value for cell in whole[4:]] == [None] * 4
    assert all(cell.best for cell in ours)
    assert [cell.value for cell in table.rows[15][2:]] == [63.63, 73.18, 65.92, 67.58, 81.28, 78.11, 55.48, 71.62]
    assert table.note == "Mean and standard deviation over 1 to 3 seeds."
    # One dataset with one set of modalities needs no joint table.
    assert score_tables.joint_tables([evaluated.load_run(f) for f in done if "hac" in str(f)]) == []


def test_the_papers_averages_are_those_of_its_figures():
    """Transcription check: each average in paper.toml is the mean of its targets (the paper rounds to 0.01)."""
    for row in paper()["multi_source"]:
        for dataset in PAPER_DATASETS if row.source == "paper" else ():  # other papers' averages alone are told
            figures = dict(row.figures[dataset])
            average = figures.pop("average")
            assert len(figures) == 3
            assert np.mean(list(figures.values())) == pytest.approx(average, abs=0.012), row


def test_single_source_and_in_domain_runs_have_their_own_tables(tmp_path):
    vaf = ("video", "audio", "flow")
    common = {"dataset": "hac", "modalities": vaf, "method": "mbcd", "seed": 0}
    write_run(tmp_path, **common, target="animal", sources=["human"], top1=50)
    write_run(tmp_path, **common, target="human", sources=["animal"], top1=60)
    write_run(tmp_path, **common, target=None, sources=["human", "animal", "cartoon"], top1=90)
    done, _ = evaluated.find_runs([str(tmp_path / "*")])
    tables = {
        table.name.rsplit("video-audio-flow-")[1]: table
        for table in score_tables.main_tables([evaluated.load_run(f) for f in done])
    }
    assert set(tables) == {"single-source", "in-domain"}
    single = tables["single-source"]
    assert list(single.columns[1:-1]) == ["animal to human", "human to animal", "average"]
    assert rows_of(single)["mbcd"][-1].value == pytest.approx(55)
    assert rows_of(single)["mbcd"][-1].std is None
    assert "MBCD (paper)" not in rows_of(single), "the paper's average is over six pairs"
    for source, target in permutations(("human", "animal", "cartoon"), 2):
        write_run(tmp_path / "six", **common, target=target, sources=[source], top1=50)
    done, _ = evaluated.find_runs([str(tmp_path / "six" / "*")])
    (six,) = score_tables.main_tables([evaluated.load_run(f) for f in done])
    assert [cell.value for cell in rows_of(six)["MBCD (paper)"]] == [None] * 6 + [64.48]


def test_the_papers_average_stands_beside_ours_over_the_same_targets_only(tmp_path):
    grid(tmp_path)
    done, _ = evaluated.find_runs([str(tmp_path / "**")])
    rows = rows_of(score_tables.main_tables([run for run in map(evaluated.load_run, done) if run.target != "D3"])[0])
    assert [cell.value for cell in rows["MBCD (paper)"]] == [59.25, 68.05, None]
    assert not any("ablation" in name for name in rows)


def test_more_than_two_datasets_are_not_put_side_by_side(tmp_path):
    for dataset in "xyz":
        grid(tmp_path / dataset, dataset=dataset, seeds=(0,))
    grid(tmp_path / "again", dataset="z", modalities=("video",), seeds=(0,))
    done, _ = evaluated.find_runs([str(tmp_path / "**")])
    runs = [evaluated.load_run(f) for f in done]
    (table,) = score_tables.joint_tables(runs)
    assert table.name == "z-all-multi-source"
    shown = score_tables.unrepeated([table, *score_tables.main_tables(runs)])
    assert [one.name for one in shown] == [table.name, "x-audio-flow-multi-source", "y-audio-flow-multi-source"]
    assert list(table.columns) == ["modalities", "method", "D1", "D2", "D3", "average"]


def test_a_missing_target_leaves_the_average_empty_and_repeats_are_left_out(tmp_path):
    base = {"dataset": "x", "modalities": ("video",), "method": "erm"}
    write_run(tmp_path, **base, target="a", sources=["b", "c"], seed=0, top1=40)
    write_run(tmp_path, **base, target="b", sources=["a", "c"], seed=0, top1=50)
    write_run(tmp_path, **{**base, "method": "mbcd"}, target="a", sources=["b", "c"], seed=0, top1=45)
    write_run(tmp_path / "again", **base, target="a", sources=["c", "b"], seed=0, top1=99)
    done, _ = evaluated.find_runs([str(tmp_path / "**")])
    runs, warnings = evaluated.distinct([evaluated.load_run(f) for f in done])
    assert len(runs) == 3
    assert "repeats" in warnings[0]
    # A sealed run is another run: it does not take an open one out of the tables.
    sealed = write_run(tmp_path / "0", **base, target="a", sources=["b", "c"], seed=0, top1=40)
    told = json.loads((sealed / "results.json").read_text())["headline"] | {"clips": "source"}
    change(sealed, headline=told)
    assert len(evaluated.distinct([evaluated.load_run(sealed), *runs])[0]) == 4
    rows = rows_of(score_tables.main_tables(runs)[0])
    assert rows["mbcd"][1].value is None
    assert rows["mbcd"][2].value is None
    assert rows["erm"][2].value is not None


def test_what_cannot_be_read_is_one_clear_error(tmp_path):
    with pytest.raises(RunError, match="no run"):
        evaluated.find_runs([str(tmp_path / "*")])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "settings.toml").write_text("")
    assert evaluated.find_runs([str(tmp_path / "*")]) == ([], [tmp_path / "a"])
    assert evaluated.find_runs([str(tmp_path)]) == ([], [tmp_path / "a"]), "a folder of runs"
    results = tmp_path / "a" / "results.json"
    for content in ("{", "[]", {"format": 1}, {"format": 99}):
        results.write_text(content) if isinstance(content, str) else write_json(results, content)
        with pytest.raises(RunError, match=re.escape("results.json")):
            evaluated.load_run(tmp_path / "a")


TABLE = t.Table(
    "x-y",
    "A 100 % table",
    ["method", "D_1", "avg"],
    [
        ["erm & co", t.Score(50.0, 1.25), t.Score(None)],
        ["a|b", t.Score(60.0, 0.5, best=True), t.Score(61.234, best=True)],
    ],
    "A note.",
)


def test_golden_tables():
    assert t.markdown(TABLE) == (
        "### A 100 % table\n\n"
        "| method | D_1 | avg |\n"
        "| --- | ---: | ---: |\n"
        "| erm & co | 50.00 ± 1.25 | - |\n"
        "| a\\|b | **60.00 ± 0.50** | **61.23** |\n"
        "\nA note.\n"
    )
    assert list(csv.reader(io.StringIO(t.comma_separated(TABLE)))) == [
        ["method", "D_1", "D_1 std", "avg"],
        ["erm & co", "50.0000", "1.2500", ""],
        ["a|b", "60.0000", "0.5000", "61.2340"],
    ]
    assert t.latex(TABLE) == (
        "% Needs \\usepackage{booktabs}.\n"
        "\\begin{table}[t]\n\\centering\n\\caption{A 100 \\% table. A note.}\n\\label{tab:x-y}\n"
        "\\begin{tabular}{lcc}\n\\toprule\nmethod & D\\_1 & avg \\\\\n\\midrule\n"
        "erm \\& co & 50.00\\,{\\scriptsize$\\pm$1.25} & -- \\\\\n"
        "a|b & \\textbf{60.00}\\,{\\scriptsize$\\pm$0.50} & \\textbf{61.23} \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def test_blocks_name_themselves_once_and_p_values_survive_latex():
    rows = [["va", "erm", "+1.50", "<0.001"], ["va", "mbcd", "-2", "0.5"], ["af", "erm", "-", "0.5"]]
    table = t.Table("x", "t", ["modalities", "method", "d", "p"], rows, blocks=True)
    assert [row[0] for row in table.shown()] == ["va", "", "af"]
    assert "| va | erm | +1.50 | <0.001 |\n|  | mbcd |" in t.markdown(table)
    assert t.comma_separated(table).splitlines()[2].startswith("va,mbcd")
    latex = t.latex(table)
    assert "\\begin{tabular}{llcc}" in latex
    assert "va & erm & $+1.50$ & $<$0.001 \\\\\n & mbcd & $-2$ & 0.5 \\\\\n\\midrule\naf & erm & - &" in latex


def test_a_table_too_wide_for_the_terminal_is_turned():
    table = t.Table("x", "t", ["method", *(f"modality{i}" for i in range(6))], [["mbcd", *[t.Score(1.0, 0.5)] * 6]])
    turned = table.fitting(80)
    assert (list(turned.columns), len(turned.rows)) == (["method", "mbcd"], 6)
    assert turned.rows[0] == ["modality0", t.Score(1.0, 0.5)]
    assert turned.width() <= 80 < table.width()
    assert table.fitting(200) is table
    assert table.fitting(10) is table, "neither way fits"


def test_comparison_command_writes_every_form(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 160)
    grid(tmp_path / "runs", seeds=(0, 1))
    (tmp_path / "runs" / "not-yet").mkdir()
    (tmp_path / "runs" / "not-yet" / "settings.toml").write_text("")
    found = compare_runs([str(tmp_path / "runs" / "**")], output=tmp_path / "out")
    assert len(found.runs) == 12
    assert "not evaluated" in found.warnings[0]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    stem = "epic-kitchens-audio-flow-multi-source"
    assert {"comparison.md", "comparison.html", "comparison.json", f"{stem}.csv", f"{stem}.tex"} <= names
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["tables"] == json_values(found.tables)
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    cells = page.replace(' style="text-align: left"', "")
    assert cells.count("a1b2c3d4e5f6</td><td>feedc0ffee12</td><td>0.1.0") == 12
    with (tmp_path / "out" / f"{stem}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["D2"]) == pytest.approx(63.5)
    assert rows[2]["method"] == "ERM (paper)"
    show_comparison(found)
    captured = capsys.readouterr()
    assert "63.50 ± 0.71" in captured.out
    assert "68.05" in captured.out
    assert "not evaluated" in captured.err
    with pytest.raises(RunError, match="not evaluated"):
        compare_runs([str(tmp_path / "runs" / "not-yet")], output=tmp_path / "out2")


def change(folder, **values):
    results = json.loads((folder / "results.json").read_text()) | values
    results.pop("checksum")
    write_json(folder / "results.json", results)


def test_runs_with_other_settings_are_no_seeds_of_one_another(tmp_path):
    about = {"dataset": "pets", "modalities": ("audio",), "method": "erm", "target": "c", "sources": ["a", "b"]}
    folders = [write_run(tmp_path / str(n), **about, seed=n % 2, top1=50 + n) for n in range(3)]
    change(folders[1], settings={"optimizer.lr": "0.1", "training.seed": "1"})
    change(folders[2], fingerprints={"audio": "other"})
    named, kinds = evaluated.told_apart([evaluated.load_run(f) for f in folders])
    runs, warnings = evaluated.distinct(named)
    assert not warnings
    names = {run.path: run.method for run in runs}
    assert names[folders[1]] == "erm (lr 0.1, audio cache feedc0ffee12)"
    assert len(set(names.values())) == 3
    assert len(kinds) == 1
    assert "3 runs of erm are of 3 kinds that are not averaged (lr, audio cache)" in kinds[0]


def names_of(folders):
    return [run.method for run in evaluated.told_apart([evaluated.load_run(f) for f in folders])[0]]


def test_runs_without_a_source_of_the_others_are_rows_of_their_own(tmp_path):
    """Leaving one source out of four domains gives multi-source runs on targets that others have too."""
    about = {"dataset": "pets", "modalities": ("audio",), "method": "erm", "seed": 0, "top1": 50}
    folders = [
        write_run(tmp_path / str(n), **about, target=target, sources=sources)
        for n, (target, sources) in enumerate([("c", "abd"), ("d", "abc"), ("c", "ab"), ("a", "d")])
    ]
    assert names_of(folders) == ["erm", "erm", "erm (without d)", "erm"]


def test_runs_tested_on_other_clips_or_by_another_checkpoint_are_rows_of_their_own(tmp_path):
    about = {"dataset": "pets", "modalities": ("audio",), "target": "c", "sources": ["a", "b"], "top1": 50}
    folders = [
        write_run(tmp_path / str(n), **about, method=method, seed=n) for n, method in enumerate(["erm", "erm", "mbcd"])
    ]
    assert names_of(folders) == ["erm", "erm", "mbcd"]
    told = json.loads((folders[1] / "results.json").read_text())
    change(folders[1], headline={**told["headline"], "checkpoint": "last"}, models={"last": told["models"]["best"]})
    assert names_of(folders) == ["erm (checkpoint best)", "erm (checkpoint last)", "mbcd"]
    change(folders[2], settings={"dataset.target_split": "all"})
    assert names_of(folders[::2]) == ["erm (target_split unset)", "mbcd (target_split all)"]


def test_settings_of_one_last_name_keep_the_rest(tmp_path):
    about = {"dataset": "pets", "modalities": ("audio",), "method": "erm", "target": "c", "sources": ["a", "b"]}
    folders = [write_run(tmp_path / str(n), **about, seed=n, top1=50) for n in range(2)]
    settings = {"a.noise": "1", "b.noise": "2", "optimizer.lr": "0.0001", "dataset.seal_target": "true"}
    change(folders[1], settings=settings)
    assert names_of(folders)[1] == "erm (a.noise 1, b.noise 2)"


def test_checkpoints_that_are_evaluated_are_those_asked_for_and_there():
    assert evaluated_checkpoints(("best", "last"), {"last": 1}) == {"last": 1}
    with pytest.raises(SettingsError, match=r"evaluation.checkpoints = best, and the run has last"):
        evaluated_checkpoints(("best",), {"last": 1})


def test_results_of_other_weights_than_the_deployed_ones_are_refused(tmp_path):
    about = {"dataset": "pets", "modalities": ("audio",), "method": "erm", "target": "c", "sources": ["a"], "seed": 0}
    folder = write_run(tmp_path, **about, top1=50)
    (folder / "settings.toml").write_text("")
    files = {name: folder / "checkpoints" / f"{name}.pt" for name in ("best", "last")}
    for name, path in files.items():
        path.parent.mkdir(exist_ok=True)
        torch.save({"name": name}, path)
        checksums.stamp(path)
    change(folder, checkpoints={"best": checksums.checksum(files["best"])})
    assert evaluated.load_run(folder).heads["fused"] == 50
    change(folder, checkpoints={"best": checksums.checksum(files["last"])})
    with pytest.raises(RunError, match="other weights than the run's best ones"):
        evaluated.load_run(folder)
    # Evaluated by evaluation.checkpoints = last, as some methods' chassis has it.
    told = json.loads((folder / "results.json").read_text())
    last = {"headline": {**told["headline"], "checkpoint": "last"}, "models": {"last": told["models"]["best"]}}
    change(folder, checkpoints={"last": checksums.checksum(files["last"])}, **last)
    assert evaluated.load_run(folder).settings["checkpoint"] == "last"
    (inside := folder / "checkpoints" / "epoch-001-evaluation").mkdir()
    (folder / "results.json").rename(inside / "results.json")
    assert evaluated.find_runs([str(tmp_path / "**")])[0] == []
