"""Until `mbcd reveal` nothing that is written depends on a sealed target's labels; each look stands in the ledger."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from commands import run
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.data.dataset import CachedDataset
from mbcd_cli.errors import FileError
from mbcd_cli.evaluation import reveal as revealing
from mbcd_cli.files import read_json, read_records
from mbcd_cli.ledger import LookedAt, looks, told, write_look
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.runs.folder import epoch_records
from mbcd_cli.sweep.pack import run_pack
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.request import Request, plan_cells
from mbcd_cli.sweep.run import CellUnit

SETS = ("training.epochs=2", "training.limit_clips=64", "model.hidden=4", "dataset.seal_target=true")
TARGET = "south"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    run(
        *("prepare", "synthetic", "--preset", "synthetic-4", "--root", folder / "media"),
        *("--cache-dir", folder / "cache", "--set", "cache.views=1"),
    )
    return folder / "cache"


def cells_of(cache: Path, runs: Path, *sets: str) -> list[Cell]:
    request = Request(targets=TARGET, methods="erm,ema", seeds="2")
    layers = {"preset": "synthetic-4", "config": None, "flags": {"cache.dir": cache}}
    return plan_cells(request, **layers, sets=[*SETS, "cache.views=1", *sets], runs_dir=runs)


def words(cache: Path, *more: object) -> list[object]:
    sets = [word for one in (*SETS, "cache.views=1") for word in ("--set", one)]
    return ["--preset", "synthetic-4", "--cache-dir", cache, *sets, *more]


def written(folder: Path) -> dict[str, str]:
    """Digests of all files that do not tell the time."""
    timed = ("timing.jsonl", "done", "results.json")
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in timed and path.suffix != ".lock" and "events" not in path.parts:
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "results.json":
            results = {key: value for key, value in read_json(path).items() if key != "files"}
            found[path.relative_to(folder).as_posix()] = json.dumps(results, sort_keys=True)
    return found


def everything(cache: Path, out: Path) -> dict[str, str]:
    """What all commands that know a target write before a reveal."""
    run("train", *words(cache, "--target-domain", TARGET, "--run", out / "run"))
    run("evaluate", "--run", out / "run", "--analyses", "missing,trust", "--export", "csv")
    few = ("points=3", "analyses=['surface']")
    sets = [word for one in few for word in ("--set", f"landscape.{one}")]
    run("landscape", "--checkpoint", out / "run/checkpoints/best.pt", "--output", out / "landscape", *sets)
    cells = cells_of(cache, out / "runs")
    for cell in cells:
        CellUnit([cell]).write(cell)
    assert run_pack([cell.folder for cell in cells[:2]], threads=1, width=None) == 0
    assert run_pack([cell.folder for cell in cells[2:]], threads=1, width=None) == 0
    grid = ("--targets", TARGET, "--methods", "erm,ema", "--seeds", "2", "--collect")
    run("sweep", *words(cache, *grid, "--runs-dir", out / "runs", "--output", out / "sweep"))
    run("evaluate", "--runs", f"{out}/runs/*/*", "--output", out / "comparison")
    return written(out)


def test_every_byte_before_a_reveal_is_the_same_whatever_the_labels_are(cache, tmp_path, monkeypatch):
    opened = CachedDataset.__init__
    expected: dict[str, str] = {}
    for how in ("as they are", "permuted", "poisoned", "deleted"):

        def with_others(dataset, *what, how=how, **more):
            opened(dataset, *what, **more)
            labels, target = dataset.clips.labels, dataset.clips.domains == dataset.domains.index(TARGET)
            others = {"permuted": labels[target][::-1], "poisoned": 10**6, "deleted": -1}
            labels[target] = others.get(how, labels[target])

        monkeypatch.setattr(CachedDataset, "__init__", with_others)
        (out := tmp_path / "out").mkdir()
        found = everything(cache, out)
        expected = expected or found
        assert found == expected, how
        out.rename(tmp_path / how)
    assert "sealed.jsonl" in {Path(name).name for name in expected}
    assert not any("target" in json.loads(line) for line in (tmp_path / "permuted/run/metrics.jsonl").open())


@pytest.fixture
def packed(cache, tmp_path) -> list[Cell]:
    """Four sealed runs, trained and evaluated."""
    cells = cells_of(cache, tmp_path / "runs")
    for cell in cells:
        CellUnit([cell]).write(cell)
    for share in (cells[:2], cells[2:]):
        assert run_pack([cell.folder for cell in share], threads=1, width=None) == 0
    return cells


def test_what_is_revealed_is_what_an_open_run_records(cache, packed, tmp_path):
    (opened, *_) = cells_of(cache, tmp_path / "open", "dataset.seal_target=false")
    CellUnit([opened]).write(opened)
    others = cells_of(cache, tmp_path / "open", "dataset.seal_target=false")[1]
    CellUnit([others]).write(others)
    assert run_pack([opened.folder, others.folder], threads=1, width=None) == 0
    sealed = packed[0].folder
    assert "target" not in epoch_records(sealed)[0]
    table = run("sweep", *words(cache, *SWEEP, "--runs-dir", tmp_path / "runs", "--output", tmp_path / "sweep"))
    assert "The targets are sealed" in table.stdout
    done = run("reveal", tmp_path / "sweep", "--json").data
    assert len(done["runs"]) == 4
    assert "looked at once, after 4 runs" in json.dumps(done["ledgers"])
    theirs = [record["target"]["student"]["fused"]["accuracy"] for record in epoch_records(opened.folder)]
    ours = [record["target"]["student"]["fused"]["accuracy"] for record in epoch_records(sealed)]
    assert ours == theirs
    for name, value in load_checkpoint(opened.folder / "checkpoints/best.pt").student.items():
        assert value.equal(load_checkpoint(sealed / "checkpoints/best.pt").student[name])
    results = [read_json(folder / "results.json") for folder in (opened.folder, sealed)]
    assert results[0]["headline"] == results[1]["headline"]
    assert results[0]["oracle"] == results[1]["oracle"]
    page = run("sweep", *words(cache, *SWEEP, "--runs-dir", tmp_path / "runs", "--output", tmp_path / "sweep"))
    assert "The targets are sealed" not in page.stdout
    assert "looked at once, after 4 runs" in (tmp_path / "sweep/comparison.html").read_text()


SWEEP = ("--targets", TARGET, "--methods", "erm,ema", "--seeds", "2", "--collect")


def test_an_interrupted_reveal_is_gone_on_with_and_is_one_look(packed, tmp_path, monkeypatch):
    folder = packed[0].folder.parent
    evaluate = revealing.evaluate
    monkeypatch.setattr(revealing, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    CliRunner().invoke(app, ["reveal", str(folder)])
    assert len(looks(folder)) == 1
    monkeypatch.setattr(revealing, "evaluate", evaluate)
    assert len(run("reveal", folder, "--json").data["runs"]) == 4
    assert len(looks(folder)) == 1
    assert "All 4 that were are open" in run("reveal", folder, code=1).stderr


def test_of_two_reveals_at_once_one_is_a_look(packed, monkeypatch):
    """The other one has read the ledger when the first has not yet written there."""
    folder, looked_at = packed[0].folder.parent, revealing._looked_at

    def late(*what):
        monkeypatch.setattr(revealing, "_looked_at", looked_at)
        run("reveal", folder)
        return looked_at(*what)

    monkeypatch.setattr(revealing, "_looked_at", late)
    refused = run("reveal", folder, code=1).stderr
    assert "Another process has revealed 4 of these 4 runs meanwhile" in refused
    assert len(looks(folder)) == 1


def test_what_a_sealed_run_refuses(cache, packed, tmp_path):
    sealed = packed[0].folder
    refused = run("evaluate", "--run", sealed, "--set", "dataset.seal_target=false", code=1)
    assert "mbcd reveal" in refused.stderr
    best = sealed / "checkpoints/best.pt"
    words_ = ("landscape", "--checkpoint", best, "--output", tmp_path / "l", "--set", "landscape.data=target")
    assert "sealed" in run(*words_, code=1).stderr
    (sealed / "done").unlink()
    assert "not trained to its end" in run("reveal", sealed, code=1).stderr
    assert "There is no run" in run("reveal", tmp_path / "none", code=1).stderr
    assert looks(sealed.parent) == []


def test_damage_is_one_message_and_what_is_lost_is_told_again(packed, tmp_path):
    sealed = packed[0].folder
    said = sealed / "sealed.jsonl"
    whole = said.read_bytes()
    for others in (
        b'{"epoch": 1, "student": {"fused": [0], "unimodal": {}}}\n',
        b"[]\n{}\n",
        b'{"epoch": 1, "student": 5}\n',
    ):
        said.write_bytes(others)
        assert "sealed.jsonl" in run("reveal", sealed, code=1).stderr
    said.write_bytes(whole)
    run("reveal", sealed)
    told_then = (sealed / "revealed.json").read_bytes()
    for others in (told_then[:-20], b"{}", told_then.replace(b'"look"', b'"took"')):
        (sealed / "revealed.json").write_bytes(others)
        for words_ in (("reveal", sealed), ("evaluate", "--run", sealed)):
            assert "revealed.json cannot be read" in run(*words_, code=1).stderr
    (sealed / "revealed.json").unlink()
    run("reveal", sealed)
    assert (sealed / "revealed.json").read_bytes() == told_then
    (sealed / "results.json").write_text("{}")
    run("reveal", sealed)
    assert len(looks(sealed.parent)) == 1
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/comparison.json").write_text("{}")
    assert "comparison.json cannot be read" in run("reveal", tmp_path / "sweep", code=1).stderr


def ledger(folder: Path, count: int) -> Path:
    for number in range(count):
        at = LookedAt(f"run-{number}", "street", "key", {"m": "root"}, {"best": "sum"})
        look = write_look(folder, f"what {number}", [at], trained=10 * (number + 1))
        (folder / f"run-{number}").mkdir()
        revealing.write_json(folder / f"run-{number}/revealed.json", {"look": look.digest, "epochs": []})
    return folder / "ledger.jsonl"


def test_a_power_cut_leaves_a_look_and_its_ledger(tmp_path, monkeypatch):
    """What a run keeps of it would be of a look that is not there."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()))
    write_look(tmp_path, "first", [], trained=1)
    assert synced == [tmp_path / "ledger.jsonl", tmp_path]


def test_a_ledger_that_was_tampered_with_is_told(tmp_path):
    path = ledger(tmp_path, 3)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert told(looks(tmp_path)) == "looked at 3 times, after 10, 20 and 30 runs"
    for others, why in {
        whole.replace(b"what 1", b"what 9"): "line 2 was changed",
        whole.replace(b'"trained": 20', b'"trained": 19'): "line 2 was changed",
        lines[0] + lines[2]: "line 2 does not follow",
        lines[1] + lines[0] + lines[2]: "line 1 does not follow",
        lines[0] + lines[1]: "the look that revealed run-2 is not in it",
        b"": "the look that revealed run-0 is not in it",
        whole + b"{}\n": "line 4 is no look",
        whole[:-5]: "the look that revealed run-2",
    }.items():
        path.write_bytes(others)
        with pytest.raises(FileError, match=why):
            looks(tmp_path)
        assert "not the ledger that was written" in run("verify", tmp_path, code=1).stderr
        with pytest.raises(FileError):
            write_look(tmp_path, "more", [], trained=0)
    path.unlink()
    with pytest.raises(FileError, match="the look that revealed run-0"):
        looks(tmp_path)
    path.write_bytes(whole + b'{"look": 4, "wh')  # a kill in the midst of a line
    assert len(looks(tmp_path)) == 3
    assert write_look(tmp_path, "after a kill", [], trained=40).look == 4
    assert len(looks(tmp_path)) == len(read_records(path)) == 4
