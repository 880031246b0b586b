from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from evaluation_cases import make_checkpoint, make_dataset, make_settings

from mbcd_cli.evaluation.evaluate import evaluate
from mbcd_cli.evaluation.report.html import gallery, table_html, write_comparison
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.files import read_json
from mbcd_cli.plotting import figure, save
from mbcd_cli.scoring.history import Oracle

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
EVERYTHING = ("missing", "shift", "corruptions", "trust", "insight")


class Checker(HTMLParser):
    """Collects what a document refers to, and whether its elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag == "img":
            self.sources.append(values["src"])
            assert values["alt"]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole run with every analysis; a class name tries to break out of the page."""
    output = tmp_path_factory.mktemp("run")
    (output / "landscape").mkdir()
    settings = make_settings()
    evaluation = settings.evaluation.model_copy(
        update={"analyses": EVERYTHING, "shift": (0.0, 1.0), "export": ("csv", "hdf5"), "report": True}
    )
    settings = settings.model_copy(update={"evaluation": evaluation})
    dataset = make_dataset(settings)
    dataset.label_names = ("cut", "<script>alert(1)</script>", "open & close", 'say "hi"')
    dataset.fingerprints = {"video": "abc123", "audio": "def456"}
    ood = make_dataset(settings, seed=9)
    ood.name = "elsewhere"
    history = [{"epoch": e, "target": {"teacher": {"fused": {"accuracy": e / 10}}}} for e in (1, 2, 3)]
    checkpoints = {"best": replace(make_checkpoint(settings, dataset), history=history)}
    done = evaluate(settings, dataset, checkpoints, device=torch.device("cpu"), run=output, output=output, ood=ood)
    return done.results, output


def test_every_analysis_is_there(report):
    figures, output = report
    assert {"missing", "shift", "corruptions", "trust", "hardest", "ood", "oracle", "provenance"} <= set(
        read_json(output / "results.json")
    )
    assert figures.oracle == Oracle("teacher", 3, 0.3)
    fused = figures.models["best"]["teacher"]["target"]["fused"].top1
    missing = figures.missing["target"]
    assert missing.top1["video+audio"] == fused
    for record in figures.shift.records:
        if record.level == 0:
            assert record.fused == pytest.approx(fused)
    assert sum(missing.shapley.values()) == pytest.approx(fused - missing.top1["none"])
    assert figures.trust.sets["target"]["fused"].accuracy == pytest.approx(fused)
    hardest = [row["label_probability"] for row in figures.hardest.rows]
    assert hardest == sorted(hardest)
    names = {p.name for p in output.rglob("*") if p.is_file()}
    assert {"predictions-target.csv", "embeddings-source.h5", "tsne.csv", "tsne-fused.png", "report.html"} <= names
    assert not [name for name in names if name.startswith(".")], "nothing half-written is left"


def test_report_is_sound_and_needs_nothing_else(report):
    figures, output = report
    text = (output / "report.html").read_text(encoding="utf-8")
    page = check(text)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "script" not in page.tags
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", text)
    words = " ".join(page.text)
    assert f"{100 * figures.headline.top1['fused']:.1f} %" in words
    assert "abc123" in words
    assert figures.provenance["best weights, sha256"] in words
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    for title in ("Accuracy", "Missing modalities", "Trust", "Embeddings", "Hardest clips", "Settings", "Provenance"):
        assert title in page.text


def test_evaluating_again_leaves_nothing_of_before(report, tmp_path):
    _, output = report
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "plots" / "losses.png").write_bytes((output / "plots" / "shift.png").read_bytes())
    settings = make_settings()
    dataset = make_dataset(settings)
    checkpoints = {"best": make_checkpoint(settings, dataset)}
    evaluate(settings, dataset, checkpoints, device=torch.device("cpu"), run=None, output=tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert names == {
        *("results.json", "outcomes.h5", "losses.png", "classes-source.png", "classes-target.png"),
        *("confusion-source.png", "confusion-target.png"),
    }


def test_comparison_page_and_table_escape_what_they_show(tmp_path):
    table = Table("x", "A <b> table", ["a", "b"], [["<i>", Score(1.0, 0.5, best=True)]], "5 < 6")
    path = write_comparison(tmp_path / "c.html", [table], title="runs & more", warnings=["<u>"])
    page = check(path.read_text(encoding="utf-8"))
    assert not {"b", "i", "u"} & page.tags
    assert "<strong>1.00 ± 0.50</strong>" in table_html(table)


def test_columns_of_text_stand_to_the_left():
    rows = [("best", "target (street)", "75.0", "+1.2 ± 0.3"), ("last", "source (a, b)", "-", "-0.5 ± 0.1")]
    page = table_html(Table("t", "a title", ("model", "tested on", "fused", "more"), rows))
    assert re.findall(r'<t[hd][^>]*"text-align: left">([^<]*)', page) == ["tested on", rows[0][1], rows[1][1]]


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_report_in_a_real_browser(report, tmp_path):
    """The page loads, shows its pictures, and is no wider than a phone."""
    _, output = report
    probe = tmp_path / "probe.html"
    # The probe is the report without its policy, plus a script that measures it after loading.
    text = (output / "report.html").read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    script = """<script>addEventListener("load", () => {
      const images = [...document.images];
      document.body.dataset.shown = images.filter(i => i.complete && i.naturalWidth > 50).length;
      document.body.dataset.images = images.length;
      document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
      document.body.dataset.tables = document.querySelectorAll("table").length;
    })</script></body>"""
    probe.write_text(text.replace("</body>", script), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=500,900", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = dict(re.findall(r'data-(\w+)="(-?\d+)"', done.stdout))
    assert int(found["images"]) == int(found["shown"]) > 8
    assert int(found["overflow"]) <= 0
    assert int(found["tables"]) > 8


def test_no_picture_stands_beside_an_empty_place(tmp_path):
    files = [(name, figure_png(tmp_path / f"{name}.png")) for name in ("one", "two", "three")]
    assert gallery(files[:2]).count("class=wide") == 0
    assert gallery(files).count("class=wide") == 1


def figure_png(path: Path) -> Path:
    fig, _ = figure(size=(3, 3))
    return save(fig, path)
