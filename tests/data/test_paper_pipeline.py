"""The paper's three encoders at full size, from every layout to an evaluated run (pytest -m stress)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest
import test_epic_kitchens as epic
import test_hac as hac
import torch

from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.readers import read_dataset
from mbcd_cli.data.records import TEST_VIEW
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.pretrained import PUBLIC, load_pretrained
from mbcd_cli.resolved import load_settings, validate
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.settings import DatasetSettings

pytestmark = pytest.mark.stress
PRESETS = Path(__file__).resolve().parents[2] / "presets"
SMALL = [
    "modalities.video.short_side=64",
    "modalities.video.crop=64",
    "modalities.flow.short_side=80",
    "modalities.flow.crop=64",
    "modalities.flow.test_crop=80",
    "modalities.video.weights_sha256=",
    "modalities.flow.weights_sha256=",
    "cache.views=1",
    "cache.views=1",
    "cache.workers=0",
]


def run(*words: object) -> tuple[int, str, dict]:
    """`mbcd ... --json` in a process of its own: (exit code, stderr, the JSON object)."""
    settings = [word for assignment in SMALL for word in ("--set", assignment)]
    command, *rest = map(str, words)  # what a test says stands last, and wins
    command = [sys.executable, "-c", "from mbcd_cli.cli import main; main()", command, *settings, *rest, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, json.loads(done.stdout or "{}")


def public_name(encoder: str, key: str) -> str:
    """Our parameter name -> the one in the published file, written down from those files' listings."""
    if encoder == "audio-resnet18":
        return "audnet." + key.removeprefix("stem.")
    if encoder == "slowonly-r50":
        return "backbone." + key.removeprefix("stem.")
    if found := re.match(r"lateral(\d)\.(.*)", key):
        before = "conv1" if found[1] == "1" else f"layer{int(found[1]) - 1}"
        return f"backbone.slow_path.{before}_lateral.{found[2]}"
    stage, path, rest = key.split(".", 2)
    return f"backbone.{path}_path." + (rest if stage == "stem" else f"{stage}.{rest}")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights under the published files' names and in their formats."""
    folder = tmp_path_factory.mktemp("weights")
    tree = validate(tomllib.loads((PRESETS / "epic-kitchens.toml").read_text()))
    for seed, (name, modality) in enumerate(tree.modalities.items()):
        torch.manual_seed(seed)
        public = PUBLIC[modality.encoder]
        own = build_encoder(name, modality).stages.state_dict()
        state = {public_name(modality.encoder, key): value for key, value in own.items()}
        torch.save({public.holds: state}, folder / public.file)
    return folder


LAYOUTS = {
    "frame folders": ("epic-kitchens", epic.frame_folders, epic.write_tables, "D2"),
    "clip files": ("epic-kitchens", epic.clip_files, epic.write_tables, "D2"),
    "whole videos": ("epic-kitchens", epic.whole_videos, epic.write_tables, "D2"),
    "hac": ("hac", hac.write_media, hac.write_splits, "cartoon"),
}


def train_and_evaluate(folder: Path, dataset: str, target: str, *more: str) -> dict:
    """Two steps and all figures."""
    common = ("--preset", dataset, "--cache-dir", folder / "cache", "--max-steps", 2, "--batch-size", 2, "--epochs", 1)
    code, errors, _ = run("train", *common, "--target-domain", target, "--run", folder / "run", *more)
    assert code == 0, errors
    code, errors, results = run("evaluate", "--run", folder / "run", "--cache-dir", folder / "cache", *more)
    assert code == 0, errors
    assert results
    return results


@pytest.mark.parametrize("trunk", ["running", "batch"])
@pytest.mark.parametrize("layout", ["clip files", "hac"])
def test_online(tmp_path, weights, layout, trunk):
    dataset, media, tables, target = LAYOUTS[layout]
    root = media(tmp_path / "data")
    tables(root / ("HAC_Splits" if dataset == "hac" else "splits"))
    more = ("--set", "cache.views=0", "--set", f"cache.trunk_batch_norm={trunk}")
    words = ("--root", root, "--weights-dir", weights, "--cache-dir", tmp_path / "cache")
    code, errors, done = run("prepare", dataset, *words, *more)
    assert code == 0, errors
    train_and_evaluate(tmp_path, dataset, target, *more)
    # Every batch norm of the published trunks has moved, and no weight has.
    state = load_checkpoint(tmp_path / "run/checkpoints/last.pt").student
    for name, modality in load_settings(tmp_path / "run/settings.toml").modalities.items():
        mine = {k.removeprefix(f"trunks.{name}."): v for k, v in state.items() if k.startswith(f"trunks.{name}.")}
        assert bool(mine) == (trunk == "batch")
        begun = torch.load(Path(done["modalities"][name]["folder"]) / "trunk.pt")
        for key, value in mine.items():
            if value.is_floating_point():
                assert torch.equal(value, begun[key]) != key.endswith(("running_mean", "running_var")), key
        assert modality.cut == "layer4"


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_prepare_train_evaluate(tmp_path, weights, layout):
    dataset, media, tables, target = LAYOUTS[layout]
    root = media(tmp_path / "data")
    tables(root / ("HAC_Splits" if dataset == "hac" else "splits"))
    cache = ("--cache-dir", tmp_path / "cache")
    flow = ["--compute-flow"] if layout == "whole videos" else []
    code, errors, done = run("prepare", dataset, "--root", root, "--weights-dir", weights, *cache, *flow)
    assert code == 0, errors
    assert {name: entry["clips"] for name, entry in done["modalities"].items()} == {
        "video": 12,
        "audio": 12,
        "flow": 12,
    }

    train_and_evaluate(tmp_path, dataset, target)

    if layout != "frame folders":
        return
    # The cache holds the published trunk's output for the reader's test view; the tail starts from its weights.
    tree = validate(tomllib.loads((PRESETS / "epic-kitchens.toml").read_text()))
    settings = DatasetSettings(reader="epic-kitchens", root=root)
    changes = {
        "video": {"short_side": 64, "crop": 64},
        "flow": {"short_side": 80, "crop": 64, "test_crop": 80},
        "audio": {},
    }
    for name, modality in tree.modalities.items():
        small = modality.model_copy(update=changes[name])
        encoder = build_encoder(name, small)
        load_pretrained(encoder, small.encoder, weights / PUBLIC[small.encoder].file)
        trunk, tail = encoder.cut("layer4")
        (folder,) = (tmp_path / "cache" / "epic-kitchens").glob(f"{name}-*")
        stored = torch.load(folder / "tail.pt", weights_only=True)
        assert all(torch.equal(value, stored[key]) for key, value in tail.state_dict().items())
        clips = read_dataset(settings, {name: small}).clips
        with h5py.File(folder / "shard-00000.h5") as file:
            rows = file["test"]
            assert rows["view"][0] == TEST_VIEW
            cached = [rows[part][0].astype(np.float32) for part in sorted(rows) if part.startswith("part")]
            clip = clips[int(rows["clip"][0])]
        (view,) = load_views(clip, name, small, views=[TEST_VIEW], seed=0, dataset=settings)
        parts = trunk(tuple(torch.from_numpy(part)[None] for part in view))
        for ours, theirs in zip(parts, cached, strict=True):
            assert np.allclose(ours[0].numpy(), theirs, rtol=2e-3, atol=1e-4)
