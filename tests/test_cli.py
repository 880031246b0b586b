"""The commands as a user or a script runs them: results, exit codes, messages; nothing is lost or executed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from commands import run

from mbcd_cli import files

AV_DIGITS = Path(__file__).resolve().parents[2] / "shared" / "data" / "av-digits"
SETS = [part for assignment in [*helpers.SMALL, "training.batch_size=4"] for part in ("--set", assignment)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a prepared three-domain dataset and one finished training."""
    home = tmp_path_factory.mktemp("home")
    helpers.write_dataset(home / "tiny", domains=("alpha", "beta", "gamma"))
    run("prepare", "manifest", "--root", home / "tiny", "--cache-dir", home / "cache", *SETS, "--json")
    train(home, "one", "--json")
    return home


def train(home: Path, name: str, *more: object, code: int = 0):
    return run(
        *("train", "--dataset", "tiny", "--target-domain", "gamma", "--cache-dir", home / "cache"),
        *("--run", home / name, "--epochs", 2, *SETS, *more),
        code=code,
    )


def test_four_commands_with_json(home):
    summary = json.loads((home / "one" / "done").read_text())
    assert summary["epochs"] == 2
    evaluated = run("evaluate", "--run", home / "one", "--json").data
    assert set(evaluated["headline"]["top1"]) == {"fused", "video", "audio"}
    assert evaluated["source_domains"] == ["alpha", "beta"]
    surfaces = run(
        *("landscape", "--checkpoint", home / "one/checkpoints/best.pt", "--json"),
        *("--set", "landscape.points=3", "--set", "landscape.directions=2", "--set", "landscape.radii=[0.0, 0.1]"),
    ).data
    for path in [*evaluated["files"].values(), *surfaces["files"].values()]:
        assert Path(path).exists()
    assert (home / "one" / "results.json").is_file()


def test_everything_is_deterministic_for_a_seed(home):
    train(home, "again", "--json")
    assert (home / "again/metrics.jsonl").read_bytes() == (home / "one/metrics.jsonl").read_bytes()
    a, b = (torch.load(home / r / "checkpoints/last.pt", weights_only=True) for r in ("one", "again"))
    assert all(torch.equal(a["student"][key], b["student"][key]) for key in a["student"])
    train(home, "other", "--json", "--seed", 1)
    assert (home / "other/metrics.jsonl").read_bytes() != (home / "one/metrics.jsonl").read_bytes()


def test_plain_output_has_no_colour_codes_and_says_what_is_next(home):
    result = train(home, "plain")
    assert "\x1b[" not in result.stdout + result.stderr
    assert "Next: mbcd evaluate --run" in result.stderr
    shown = run("evaluate", "--run", home / "plain")
    assert "\x1b[" not in shown.stdout + shown.stderr
    assert "target (gamma)" in shown.stdout


def test_four_modalities_with_arrays_and_computed_flow(home, tmp_path):
    sets = [*SETS, "--set", "modalities.flow.frames=4", "--set", "modalities.flow.width=2"]
    sets += ["--set", "modalities.flow.short_side=24", "--set", "modalities.flow.crop=20"]
    sets += ["--set", "modalities.pose.width=2"]
    common = ["--cache-dir", tmp_path / "cache", *sets, "--json"]
    done = run("prepare", "manifest", "--root", home / "tiny", "--compute-flow", *common).data
    assert list(done["modalities"]) == ["video", "audio", "flow", "pose"]
    options = ("--dataset", "tiny", "--target-domain", "alpha", "--max-steps", 2, "--run", tmp_path / "run")
    summary = run("train", *options, "--set", "dataset.compute_flow=true", *common).data
    assert list(summary["best"]["target_unimodal"]) == ["video", "audio", "flow", "pose"]


def test_show_settings_is_toml_that_can_be_used_again(home, tmp_path):
    shown = run("train", "--target-domain", "D2", "--show-settings").stdout
    assert 'name = "epic-kitchens"' in shown
    config = tmp_path / "s.toml"
    config.write_text(shown)
    assert run("train", "--config", config, "--show-settings").stdout == shown


def test_dry_run_writes_nothing(home):
    plan = train(home, "dry", "--dry-run", "--json").data
    assert plan["parameters"]["trained"] > 0
    assert plan["shapes"]["video"] == [[3, 4, 20, 20]]
    assert list(plan["layout_seconds"]) == ["off", "on"]
    assert plan["layout_seconds"]["off"] == plan["step_seconds"]
    shown = train(home, "dry", "--dry-run").stdout
    assert "runtime.channels_last: off, which auto takes" in shown
    assert "channels_last" not in train(home, "dry", "--dry-run", "--set", "runtime.channels_last=on").stdout
    assert not (home / "dry").exists()


def test_limits_make_a_quick_run(home):
    summary = train(home, "quick", "--limit-clips", 4, "--max-steps", 1, "--json").data
    assert summary["steps"] == 1


def test_resume_and_overwrite_rules(home):
    before = (home / "one/checkpoints/best.pt").read_bytes()
    assert "--resume" in train(home, "one", code=1).stderr
    assert "contradict" in train(home, "one", "--resume", "--overwrite", code=2).stderr
    assert "optimizer.lr" in train(home, "one", "--resume", "--lr", 0.5, code=1).stderr
    assert "from its beginning" in train(home, "one", "--resume", "--epochs", 6, code=1).stderr
    assert (home / "one/checkpoints/best.pt").read_bytes() == before
    train(home, "one", "--resume", "--json")  # finished: nothing to do
    assert (home / "one/checkpoints/best.pt").read_bytes() == before
    (home / "mine").mkdir()
    (home / "mine/thesis.txt").write_text("precious")
    assert "no run folder" in train(home, "mine", "--overwrite", code=1).stderr
    assert (home / "mine/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "nowhere"], "There is no preset 'nowhere'"),
        (["train", "--dataset", "nothing", "--target-domain", "x"], "There is no cache of dataset 'nothing'"),
        (["train", "--target-domain", "D2"], "epic-kitchens"),
        (["train", "--dataset", "tiny", "--target-domain", "delta"], "no domain 'delta'"),
        (["train", "--dataset", "tiny", "--target-domain", "alpha", "--source-domains", "alpha,beta"], "also a source"),
        (["train", "--dataset", "tiny", "--target-domain", "alpha", "--modalities", "smell"], "'smell'"),
        (["train", "--dataset", "tiny", "--target-domain", "alpha", "--method", "magic"], "no method 'magic'"),
        (["train", "--dataset", "tiny", "--device", "abacus"], "abacus"),
        (["evaluate", "--run", "nowhere"], "is not a run folder"),
        (["evaluate", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["landscape", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["prepare", "parquet", "--root", "."], "no reader 'parquet'"),
        (["prepare", "manifest", "--root", "nowhere"], "nowhere"),
        (["list", "flavours"], "flavours"),
    ],
)
def test_mistakes_are_one_message_and_exit_1(home, arguments, words):
    more = ["--cache-dir", home / "cache"] if arguments[0] != "prepare" else []
    result = run(*arguments, *more, code=1)
    assert words in result.stderr
    assert result.stderr.count("error:") == 1
    as_json = run(*arguments, *more, "--json", code=1)
    assert words in as_json.data["error"] + as_json.data["remedy"]


def test_wrong_usage_is_exit_2():
    run("train", "--no-such-flag", code=2)
    run("landscape", code=2)


def test_hostile_and_damaged_checkpoints_execute_nothing(home, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    hostile = tmp_path / "hostile.pt"
    torch.save({"format": "mbcd-checkpoint", "version": 1, "settings": Evil()}, hostile)
    raw = tmp_path / "raw.pt"
    raw.write_bytes(pickle.dumps(Evil()))
    whole = (home / "one/checkpoints/best.pt").read_bytes()
    torn = tmp_path / "torn.pt"
    torn.write_bytes(whole[: len(whole) // 2])
    empty = tmp_path / "empty.pt"
    empty.write_bytes(b"")
    for path in (hostile, raw, torn, empty):
        for command in ("evaluate", "landscape"):
            assert path.name in run(command, "--checkpoint", path, "--cache-dir", home / "cache", code=1).stderr
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_other_settings_is_refused(home):
    text = (home / "one/settings.toml").read_text()
    (home / "one/settings.toml").write_text(text.replace("hidden = 8", "hidden = 9"))
    try:
        assert "other settings" in run("evaluate", "--run", home / "one", code=1).stderr
    finally:
        (home / "one/settings.toml").write_text(text)
    changed = run("evaluate", "--run", home / "one", "--set", "model.hidden=9", code=1)
    assert "belong to the training" in changed.stderr


def test_run_folder_copied_elsewhere_evaluates_the_same(home, tmp_path):
    import shutil

    first = run("evaluate", "--run", home / "one", "--json").data
    shutil.copytree(home / "one", tmp_path / "moved")
    free = ("--set", "training.checkpoint_minutes=5")  # weights do not depend on it
    second = run("evaluate", "--run", tmp_path / "moved", *free, "--json").data
    assert first["models"] == second["models"]


def test_checkpoint_without_its_cache(home, tmp_path):
    result = run("evaluate", "--run", home / "one", "--cache-dir", tmp_path / "none", code=1)
    assert "There is no cache of dataset 'tiny'" in result.stderr
    assert "--cache-dir" in result.stderr


def test_bad_clips_are_reported_with_exit_3_unless_allowed(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    (root / "video" / "alpha_0_0.mp4").write_bytes(b"")
    (root / "audio" / "beta_1_1.wav").write_text("no sound")
    options = ("prepare", "manifest", "--root", root, "--cache-dir", tmp_path / "cache", *SETS)
    result = run(*options, "--json", code=3)
    assert {entry["clip"] for entry in result.data["rejected"]} == {"alpha_0_0", "beta_1_1"}
    assert all(entry["cause"] and entry["remedy"] for entry in result.data["rejected"])
    assert result.data["modalities"]["video"]["clips"] == 11
    assert run(*options, "--max-bad", 2, "--json").data["exit_code"] == 0
    assert "2 of 12 clips rejected" in run(*options, code=3).stderr


def test_where_all_clips_are_rejected_json_lists_them(tmp_path):
    root = helpers.write_dataset(tmp_path / "bad")
    for path in (root / "video").iterdir():
        path.write_bytes(b"not a video")
    words = ["prepare", "manifest", "--root", root, "--cache-dir", tmp_path / "cache", *SETS, "--modalities", "video"]
    data = run(*words, "--json", code=1).data
    assert data["error"] == "All 12 clips of bad were rejected."
    assert len(data["rejected"]) == data["clips"] == 12
    assert all(one["clip"] and one["cause"] and one["remedy"] for one in data["rejected"])


def test_entry_point_in_a_process_of_its_own(home):
    command = [sys.executable, "-m", "mbcd_cli", "list", "methods", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert {"erm", "ema", "mbcd"} <= {row["method"] for row in json.loads(shown.stdout)}


@pytest.mark.skipif(not AV_DIGITS.is_dir(), reason="the shared av-digits dataset is not beside the project")
class TestAvDigits:
    def test_bad_media(self, tmp_path):
        options = ("prepare", "manifest", "--root", AV_DIGITS, "--manifest", "broken/manifest_bad_media.csv")
        result = run(*options, "--cache-dir", tmp_path, "--workers", 0, "--json", code=3)
        assert result.data["clips"] == 22
        assert len({entry["clip"] for entry in result.data["rejected"]}) == 10
        causes = {Path(entry["file"]).name: entry["cause"] for entry in result.data["rejected"]}
        assert "NaN" in causes["nan.wav"]
        assert "16 frames" in causes["cut_after_index.mp4"]

    def test_broken_manifest(self, tmp_path):
        options = ("prepare", "manifest", "--root", AV_DIGITS, "--manifest", "broken/manifest_broken.csv")
        result = run(*options, "--cache-dir", tmp_path / "cache", "--workers", 0, code=1)
        assert "5 bad lines" in result.stderr
        for line in (6, 8, 16, 17, 24):
            assert f"line {line}:" in result.stderr
        assert not (tmp_path / "cache").exists()


def test_usage_is_exit_code_2():
    assert "Name what to evaluate" in run("evaluate", code=2).stderr
    run("train", "--resume", "--overwrite", code=2)


def test_settings_as_json_and_tables_as_csv(home):
    assert run("train", "--preset", "none", "--show-settings", "--json").data["training"]["seed"] == 0
    run("evaluate", "--run", home / "one", "--csv", home / "tables")
    (table,) = (home / "tables").glob("top-1-accuracy*")
    assert table.read_text().startswith("model,tested on,clips,fused,")
    assert "macro F1" in table.read_text()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "/full"), "/full: No space left on device"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
    ],
)
def test_faults_of_the_machine_are_no_surprise(monkeypatch, error, told):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("mbcd_cli.cli.list.choices", failing)
    stderr = run("list", "presets", code=1).stderr
    assert told in stderr
    assert "Unexpected" not in stderr


@pytest.mark.parametrize("writes", ["torch", "hdf5"])
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_no_error_of_the_library_that_it_comes_in(monkeypatch, tmp_path, writes, which):
    def writing(*_, **__):
        if writes == "torch":
            with files.written_file(tmp_path / "file") as file:
                torch.save(torch.zeros(9999), file)
        else:
            with files.written_hdf5(tmp_path / "file") as file:
                file["x"] = np.arange(9)
                monkeypatch.setattr(files._Remembering, "write", interrupted)

    def interrupted(file, data):
        monkeypatch.setattr(files._Remembering, "write", write)
        signal.raise_signal(which)
        return write(file, data)

    write = files._Remembering.write
    if writes == "torch":
        monkeypatch.setattr(files._Remembering, "write", interrupted)
    monkeypatch.setattr("mbcd_cli.cli.list.choices", writing)
    assert run("list", "presets", code=130).stderr == "Interrupted.\n"
    assert not list(tmp_path.iterdir())


def test_results_of_another_checkpoint_lie_beside_it(home):
    before = (home / "one" / "results.json").read_bytes()
    files = run("evaluate", "--checkpoint", home / "one/checkpoints/last.pt", "--json").data["files"]
    assert Path(files["results"]).parent == (home / "one/checkpoints/last-evaluation").resolve()
    assert (home / "one" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["prepare", "manifest", "--root", "nowhere"], "nowhere: the dataset's root does not exist"),
        (["train", "--dataset", "tini"], "Did you mean tiny?"),
        (["train", "--dataset", "tiny", "--target-domain", "gama"], "Did you mean gamma?"),
    ],
)
def test_wrong_names_are_told_before_torch_is_imported(home, line, told):
    code = (
        "import sys\nfrom mbcd_cli.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as ended:\n    assert ended.code == 1\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, *line], cwd=home, capture_output=True, text=True, check=True)
    assert told in result.stderr


def test_examples_of_the_help_can_be_copied():
    shown = run("evaluate", "--help").stdout
    assert "   mbcd evaluate --runs 'runs/av-digits/*' --output comparison\n" in shown
    assert "<bool>" not in shown
