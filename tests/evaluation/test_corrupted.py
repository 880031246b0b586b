"""Caches of corrupted test views: what the trunk makes of corrupted media, prepared once, read by every evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from commands import run
from evaluation_cases import make_checkpoint

from mbcd_cli.data import corruptions as corruption_formulas
from mbcd_cli.data.corruptions import SEVERITIES, Corruption
from mbcd_cli.data.corruptions.values import VALUES
from mbcd_cli.data.corruptions.waveform import BABBLE, POOL
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.modality_cache import ModalityCache
from mbcd_cli.data.records import TEST_VIEW
from mbcd_cli.encoders import build_encoder
from mbcd_cli.errors import CacheError, SettingsError
from mbcd_cli.evaluation.analyses.corruptions import corruptions
from mbcd_cli.evaluation.evaluate import evaluate
from mbcd_cli.evaluation.evaluator import evaluate_models
from mbcd_cli.evaluation.report.results import Results
from mbcd_cli.evaluation.report.sections import corruption_table
from mbcd_cli.integrity import examine
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.preparation.repair import repair
from mbcd_cli.resolved import resolve

SETS = [
    *(*helpers.SMALL, "modalities.video.cut=layer3", "cache.random_weights=true", "cache.dtype=float32"),
    "modalities.pose.kind=array",
    "runtime.device=cpu",  # as the tests' own trunks
]
"""Video has a trunk, sound and pose are cached as they are decoded."""
KINDS = ("fog", "gaussian-noise", BABBLE, "clipping", "noise")
LEVELS = (1, 5)


def settings_for(root: Path, cache: Path, *sets: str):
    return resolve(sets=[*SETS, *sets], flags={"dataset.root": root, "cache.dir": cache})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny", train=1)


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    settings = settings_for(root, tmp_path_factory.mktemp("cache"))
    return settings, prepare(settings, corruptions=KINDS, severities=LEVELS)


def test_what_is_cached_is_what_the_trunk_makes_of_the_corrupted_views(prepared):
    settings, result = prepared
    dataset, listing = open_dataset(settings, name="tiny"), read_listing(settings)
    clips = np.flatnonzero(listing.clips.splits == 1)
    pool = tuple(clip.media["audio"] for clip in listing.clips)
    assert len(pool) <= POOL
    assert [done.corrupted for done in result.modalities.values()] == [4, 4, 2]
    for name, cache in dataset.caches.items():
        modality = dataset.modalities[name]
        torch.manual_seed(settings.cache.seed)
        trunk, _ = build_encoder(name, modality).cut(modality.cut)
        folders = sorted(path.parent.name for path in cache.folder.glob("*/index.h5"))
        assert folders == sorted(
            Corruption(kind, level).folder for kind in KINDS if kind in modality.corruptions for level in LEVELS
        )
        (clean,) = cache.read(clips, np.full(len(clips), TEST_VIEW))
        for folder in folders:
            corruption = Corruption.of_folder(folder)
            corrupted = cache.corrupted(corruption)
            assert np.array_equal(np.flatnonzero(corrupted.stored(TEST_VIEW)), clips), "the clips that are tested only"
            assert corrupted.views == 0
            (stored,) = corrupted.read(clips, np.full(len(clips), TEST_VIEW))
            spoilt = Corruption(corruption.name, corruption.severity, pool if corruption.name == BABBLE else ())
            told = {"views": [TEST_VIEW], "seed": settings.cache.seed, "dataset": settings.dataset}
            for row, clip in zip(stored, clips, strict=True):
                ((view,),) = load_views(listing.clips[clip], name, modality, **told, corruption=spoilt)
                with torch.no_grad():
                    (expected,) = (
                        trunk((torch.from_numpy(view)[None],)) if trunk.names else (torch.from_numpy(view)[None],)
                    )
                assert torch.equal(row, expected[0])
            assert not torch.equal(stored, clean)


def test_what_there_is_is_not_made_again(root, prepared):
    settings, result = prepared
    folder = Path(result.modalities["video"].folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.h5")}
    assert before
    again = prepare(settings, corruptions=("fog",), severities=SEVERITIES)
    assert again.modalities["video"].corrupted == 5
    assert again.modalities["audio"].corrupted == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / Corruption("fog", 2).folder / "index.h5").exists()
    for made in (2, 3, 4):
        shutil.rmtree(folder / Corruption("fog", made).folder)
    # Another seed of the views is another clean cache, so others of corrupted views.
    with pytest.raises(SettingsError, match="There is no corruption 'frog'"):
        prepare(settings, corruptions=("frog",))


def test_a_killed_preparation_goes_on(root, prepared, tmp_path):
    """As SIGKILL leaves a folder (tests/data/test_cache.py sends one): shards, one half written, and no index."""
    settings, result = prepared
    settings = settings.model_copy(update={"cache": settings.cache.model_copy(update={"dir": tmp_path})})
    shutil.copytree(prepared[0].cache.dir / "tiny", tmp_path / "tiny")
    folder = tmp_path / "tiny" / Path(result.modalities["video"].folder).name / Corruption("fog", 5).folder
    whole = {path.name: path.read_bytes() for path in folder.glob("shard-*.h5")}
    assert len(whole) > 1
    (folder / "index.h5").unlink()
    (folder / "prepare.toml").unlink()
    (folder / "shard-00001.h5").rename(folder / ".shard-00001.h5.host.1.partial")
    left = (folder / "shard-00000.h5").stat().st_mtime_ns
    prepare(settings, corruptions=KINDS, severities=LEVELS)
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*.h5")} == whole
    assert (folder / "shard-00000.h5").stat().st_mtime_ns == left
    assert not list(folder.glob("*.partial"))
    assert not examine(tmp_path).faults


def test_damage_is_found_and_repaired(prepared, tmp_path):
    settings, result = prepared
    copy = tmp_path / "tiny"
    shutil.copytree(settings.cache.dir / "tiny", copy)
    folder = copy / Path(result.modalities["audio"].folder).name
    shard = folder / Corruption(BABBLE, 5).folder / "shard-00000.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert list(examine(copy).damaged) == [shard]
    repaired = {done.folder: done.files for done in repair(copy)}
    assert {where: files for where, files in repaired.items() if files} == {shard.parent: ["shard-00000.h5"]}
    assert shard.read_bytes() == whole
    assert not examine(copy).faults
    # A folder under another's name is not taken for what it is called.
    (folder / Corruption("clipping", 1).folder).rename(folder / Corruption("clipping", 2).folder)
    with pytest.raises(CacheError, match="not what its name says"):
        ModalityCache(folder).corrupted(Corruption("clipping", 2))


def test_views_by_other_formulas_are_not_read(prepared, tmp_path, monkeypatch):
    settings, result = prepared
    copy = tmp_path / "tiny"
    shutil.copytree(settings.cache.dir / "tiny", copy)
    settings = settings.model_copy(update={"cache": settings.cache.model_copy(update={"dir": tmp_path})})
    folder = copy / Path(result.modalities["pose"].folder).name
    before = (folder / Corruption("noise", 5).folder / "shard-00000.h5").read_bytes()
    monkeypatch.setattr(corruption_formulas, "FORMULAS", corruption_formulas.FORMULAS + 1)
    monkeypatch.setitem(VALUES, "noise", lambda values, severity, rng: values + severity)
    dataset = open_dataset(settings, name="tiny")
    assert corruptions("pose", dataset, None) == []
    assert prepare(settings, corruptions=("noise",), severities=(5,)).modalities["pose"].corrupted == 1
    assert (folder / Corruption("noise", 5).folder / "shard-00000.h5").read_bytes() != before
    assert [told.level for told in corruptions("pose", dataset, None)] == [5]
    (folder / "noise-1-v1" / "shard-00000.h5").unlink()
    with pytest.raises(CacheError, match=r"noise-1-v1 cannot be repaired: .* another version") as caught:
        repair(copy)
    assert "Delete" in caught.value.remedy


def test_evaluate_measures_what_is_prepared_without_the_media(root, tmp_path):
    media = shutil.copytree(root, tmp_path / "tiny")
    more = ["training.target_domain=beta", "evaluation.report=false", "evaluation.export=[]"]
    settings = settings_for(media, tmp_path / "cache", *more, 'evaluation.analyses=["corruptions"]')
    prepare(settings)
    dataset = open_dataset(settings, name="tiny")
    settings = settings.model_copy(update={"modalities": dict(dataset.modalities)})
    checkpoints = {"best": make_checkpoint(settings, dataset)}

    def evaluated() -> Results:
        told = {"device": torch.device("cpu"), "run": None, "output": tmp_path / "out"}
        return evaluate(settings, dataset, checkpoints, **told).results

    results = evaluated()
    (warning,) = results.warnings
    assert results.corruptions.lacking == ["video", "audio", "pose"]
    assert not results.corruptions.records
    assert corruption_table(results) is None
    # The command that it names makes them; what is there is not made again.
    words = warning.split("`")[1].split()
    assert (words[0], words[-2:]) == ("mbcd", ["--corruptions", "all"])
    asked = [*words[1:-1], "fog, snow, clipping,value-drop", "--severities", "1,5"]
    assert run(*asked, "--check", "--json").data["bytes_to_write"] > 0
    told = run(*asked, "--json").data["modalities"]
    assert [done["corrupted"] for done in told.values()] == [4, 2, 2]
    assert all(done["shards_reused"] == done["shards"] for done in told.values())
    assert run(*asked, "--check", "--json").data["bytes_to_write"] == 0
    shutil.rmtree(media)
    results = evaluated()
    assert not results.warnings
    records = results.corruptions.records
    kinds = [("video", "snow"), ("video", "fog"), ("audio", "clipping"), ("pose", "value-drop")]
    assert [(r.modality, r.kind, r.level) for r in records] == [(*kind, level) for kind in kinds for level in (1, 5)]
    assert results.corruptions.means["video"].kinds == 2
    means = [row for row in corruption_table(results).rows if "mean of" in row[0]]
    assert [row[0] for row in means] == ["video: mean of 2", "audio: mean of 1", "pose: mean of 1"]
    # As predicting what the corrupted cache holds.
    clips = dataset.select(domains=("beta",), splits=("test",))
    dataset.caches["video"] = dataset.caches["video"].corrupted(Corruption("fog", 5))
    spoilt = evaluate_models(settings, dataset, checkpoints, device=torch.device("cpu"))[0]
    fused = {(on_set.model, on_set.clip_set.name): on_set.figures["fused"].top1 for on_set in spoilt}
    (fog,) = [r for r in records if (r.kind, r.level) == ("fog", 5)]
    assert fog.clips == len(clips)
    assert fog.fused == fused[results.headline.model, "target"]
    assert examine(tmp_path / "cache").faults == []


def test_severities_are_from_1_to_5(root):
    for wrong in ("0,1", "6", "", "one"):
        assert (
            "whole numbers from 1 to 5"
            in run("prepare", "manifest", "--root", root, "--severities", wrong, code=2).stderr
        )
