"""`cache.views = 0`: training views decoded in every epoch, through the trunk, the same for any number of workers."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mbcd_cli import console
from mbcd_cli.cli import app
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.online import mixed_seed
from mbcd_cli.data.records import TEST_VIEW
from mbcd_cli.encoders import build_encoder
from mbcd_cli.errors import CacheError, MediaError, SettingsError
from mbcd_cli.evaluation.analyses.robustness import disturbed_accuracy, gaussian_shift
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.scoring.deployed import build_models
from mbcd_cli.scoring.predictions import predict
from mbcd_cli.training.assemble import assemble

ONLINE = [*helpers.SMALL, "cache.views=0", "cache.random_weights=true", "modalities.video.cut=layer3"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny", domains=("alpha", "beta", "gamma"))


def tree(root: Path, cache: Path, *sets: str):
    return resolve(
        sets=[*ONLINE, "training.batch_size=4", *sets],
        flags={"dataset.root": root, "dataset.name": "tiny", "cache.dir": cache, "training.target_domain": "gamma"},
    )


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    settings = tree(root, tmp_path_factory.mktemp("cache"))
    return settings, prepare(settings)


def opened(settings, *sets: str):
    """The dataset as `train` opens it, trunks attached."""
    changed = resolve(
        sets=[*ONLINE, "training.batch_size=4", *sets],
        flags={"dataset.name": "tiny", "cache.dir": settings.cache.dir, "training.target_domain": "gamma"},
    )
    resolved, dataset = open_for_training(changed)
    assemble(resolved, dataset, device=CPU, say=console.terminal)
    return dataset, dataset.select(domains=["alpha", "beta"], splits=["train"])


def taken(dataset, clips, **options):
    return list(dataset.batches(clips, batch_size=4, training=True, drop_last=True, **options))


def same(a, b) -> bool:
    return all(
        torch.equal(x.clips, y.clips) and all(torch.equal(x.inputs[n][0], y.inputs[n][0]) for n in x.inputs)
        for x, y in zip(a, b, strict=True)
    )


def expected_inputs(settings, batch, *, seed: int, epoch: int, through_trunk: bool = True):
    """A batch's inputs, decoded here and run through a trunk built here."""
    listing = read_listing(settings)
    inputs = {}
    for name, modality in listing.modalities.items():
        views = [
            load_views(
                listing.clips[int(row)],
                name,
                modality,
                views=[epoch],
                seed=mixed_seed(settings.cache.seed, seed),
                dataset=settings.dataset,
            )[0][0]
            for row in batch.clips
        ]
        part = torch.from_numpy(np.stack(views))
        if name == "video" and through_trunk:
            torch.manual_seed(settings.cache.seed)
            encoder = build_encoder(name, modality)
            for stage in encoder.names[: encoder.names.index("layer3")]:
                part = encoder.stages[stage].eval()(part)
        inputs[name] = part.detach()
    return inputs


def test_only_test_views_are_stored(prepared):
    settings, result = prepared
    dataset, _ = opened(settings)
    assert result.rejected == []
    for cache in dataset.caches.values():
        assert cache.views == 0
        assert not cache.stored(0).any()
        assert cache.stored(TEST_VIEW).sum() == 6
    # Validation reads them as ever.
    tests = dataset.select(domains=["alpha"], splits=["test"])
    (batch,) = dataset.batches(tests, batch_size=8, training=False)
    assert batch.inputs["video"][0].dtype == torch.float16


def test_batches_are_decoded_views_through_the_trunk(prepared):
    settings, _ = prepared
    dataset, clips = opened(settings)
    for epoch in (0, 3):
        batches = taken(dataset, clips, seed=5, epoch=epoch)
        assert len(batches) == 2
        for batch in batches:
            wanted = expected_inputs(settings, batch, seed=5, epoch=epoch)
            assert torch.equal(batch.inputs["audio"][0], wanted["audio"])
            torch.testing.assert_close(batch.inputs["video"][0], wanted["video"], rtol=1e-5, atol=1e-6)
            assert torch.equal(batch.labels, torch.from_numpy(dataset.clips.labels[batch.clips.numpy()]))


def test_fresh_every_epoch_and_the_same_for_any_workers(prepared):
    settings, _ = prepared
    dataset, clips = opened(settings)
    first = taken(dataset, clips, seed=1, epoch=0)
    parallel, _ = opened(settings, "cache.workers=2")
    assert same(first, taken(parallel, clips, seed=1, epoch=0))
    assert same(first[1:], taken(dataset, clips, seed=1, epoch=0, start=1))
    by_clip = [
        {
            int(c): row
            for batch in taken(dataset, clips, seed=seed, epoch=epoch)
            for c, row in zip(batch.clips, batch.inputs["video"][0], strict=True)
        }
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    for clip in by_clip[0]:
        assert not torch.equal(by_clip[0][clip], by_clip[1][clip])
        assert not torch.equal(by_clip[0][clip], by_clip[2][clip])


def test_two_views_of_a_clip_from_one_decoding(prepared):
    settings, _ = prepared
    dataset, clips = opened(settings)
    parallel, _ = opened(settings, "cache.workers=2")
    one, two = taken(dataset, clips, seed=5, epoch=3), taken(dataset, clips, seed=5, epoch=3, views=2)
    assert same(two, taken(parallel, clips, seed=5, epoch=3, views=2))
    for single, both in zip(one, two, strict=True):
        assert torch.equal(both.clips, single.clips.repeat_interleave(2))
        for name in both.inputs:
            first, second = both.inputs[name][0][0::2], both.inputs[name][0][1::2]
            assert torch.equal(first, single.inputs[name][0]) or name == "video"
            torch.testing.assert_close(first, single.inputs[name][0], rtol=1e-5, atol=1e-6)
            assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- trunk_batch_norm = batch: the trunk is part of the model, as in the reference

LIVE = "cache.trunk_batch_norm=batch"


@pytest.fixture(scope="module")
def live(root, tmp_path_factory):
    """(settings, a run trained on a cache of decoded test views)."""
    cache = tmp_path_factory.mktemp("live")
    settings = tree(root, cache / "cache", LIVE)
    prepare(settings)
    result = call("train", cache / "cache", "--run", cache / "run", "--epochs", 2, "--batch-size", 4, LIVE)
    assert result.exit_code == 0, result.stderr
    return settings, cache / "run"


def call(command: str, cache: Path, *words: object):
    sets = [part for one in (*ONLINE, *(w for w in words if w == LIVE)) for part in ("--set", one)]
    options = ["--dataset", "tiny", "--target-domain", "gamma", "--cache-dir", cache, *sets]
    return CliRunner().invoke(app, [command, *map(str, (*options, *(w for w in words if w != LIVE))), "--json"])


def independent_fused(settings, state, clips) -> torch.Tensor:
    """Fused logits [N, C] of decoded test views: whole encoders in eval mode, weights by their names in `state`."""
    listing = read_listing(settings)
    features = []
    for name, modality in listing.modalities.items():
        encoder = build_encoder(name, modality).eval()
        where = {
            s: "trunks" if name == "video" and s in ("input", "layer1", "layer2") else "tails" for s in encoder.names
        }
        for stage, part in where.items():
            prefix = f"{part}.{name}.{stage}."
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            encoder.stages[stage].load_state_dict(mine)
        views = [
            load_views(listing.clips[i], name, modality, views=[TEST_VIEW], seed=0, dataset=settings.dataset)[0][0]
            for i in clips
        ]
        half = [torch.from_numpy(view).half().float() if view.dtype != np.uint8 else view for view in views]
        features.append(encoder((torch.from_numpy(np.stack(half)),)))
    pooled = torch.cat([torch.nn.functional.layer_norm(f, f.shape[1:]) for f in features], dim=1)
    hidden = torch.relu(pooled @ state["fused_head.0.weight"].T + state["fused_head.0.bias"])
    return hidden @ state["fused_head.3.weight"].T + state["fused_head.3.bias"]


def test_a_live_trunk_trains_with_the_model(live):
    settings, run = live
    dataset, clips = opened(settings, LIVE)
    assert dataset.caches["video"].shapes()[0][1] == np.uint8
    (batch, *_) = taken(dataset, clips, seed=5, epoch=0)
    wanted = expected_inputs(settings, batch, seed=5, epoch=0, through_trunk=False)
    assert torch.equal(batch.inputs["video"][0], wanted["video"])

    saved = load_checkpoint(run / "checkpoints/last.pt")
    first = dataset.trunk_weights["video"]
    student, teacher = ({k: v for k, v in s.items() if "trunks.video" in k} for s in (saved.student, saved.teacher))
    assert {k.removeprefix("trunks.video.") for k in student} == set(first)
    for key, value in student.items():
        begun = first[key.removeprefix("trunks.video.")]
        if key.endswith(("running_mean", "running_var")):
            assert not torch.equal(value, begun)
            assert not torch.equal(teacher[key], value)
        elif value.is_floating_point():
            assert torch.equal(value, begun)
            assert torch.equal(teacher[key], begun)


def test_a_live_trunk_is_evaluated_with_its_own_statistics(live, root, tmp_path):
    settings, run = live
    result = CliRunner().invoke(app, ["evaluate", "--run", str(run), "--set", "evaluation.analyses=[]", "--json"])
    assert result.exit_code == 0, result.stderr
    saved = load_checkpoint(run / "checkpoints/best.pt")
    state = {**saved.student, **{k: v for k, v in saved.teacher.items() if not k.startswith("heads.")}}
    dataset, _ = opened(settings, LIVE)
    tests = dataset.select(domains=["gamma"], splits=["test"])
    expected = independent_fused(settings, state, tests)
    model = build_models(saved.settings, dataset, saved, device=CPU)["teacher"]
    found = predict(model, dataset.batches(tests, batch_size=2, training=False), device=CPU)
    torch.testing.assert_close(found.fused, expected.detach(), rtol=1e-5, atol=1e-5)
    accuracy = (expected.argmax(1) == found.labels).double().mean()
    assert json.loads(result.stdout)["headline"]["top1"]["fused"] == pytest.approx(float(accuracy))

    batches = dataset.batches(tests, batch_size=2, training=False)
    (undisturbed,) = disturbed_accuracy(model, batches, [gaussian_shift("video", 0.0)], device=CPU)
    assert undisturbed.fused == pytest.approx(float(accuracy))

    # New clips need the checkpoint alone, and get the same predictions; the trunk has no weights file.
    words = ["evaluate", "--run", run, "--data-root", root, "--output", tmp_path / "new", "--json"]
    words += ["--set", "cache.random_weights=false"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.stderr
    with (tmp_path / "new/predict.csv").open() as file:
        rows = {row["clip"]: row["class"] for row in csv.DictReader(file)}
    for index, logits in zip(tests, expected, strict=True):
        assert rows[dataset.clips.ids[index]] == dataset.label_names[int(logits.argmax())]


def test_landscape_and_dry_run_of_a_live_trunk(live, tmp_path):
    settings, run = live
    sets = ["landscape.analyses=['surface','curvature']", "landscape.points=3", "landscape.eigenvalues=1"]
    words = ["landscape", "--checkpoint", run / "checkpoints/best.pt", "--output", tmp_path, "--json"]
    result = CliRunner().invoke(app, list(map(str, words + [w for s in sets for w in ("--set", s)])))
    assert result.exit_code == 0, result.stderr
    result = call("train", settings.cache.dir, "--batch-size", 4, "--dry-run", LIVE)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    whole = opened(settings, LIVE)[0]
    assert plan["parameters"]["trunks"]["video"] == sum(
        v.numel() for k, v in whole.trunk_weights["video"].items() if k.endswith(("weight", "bias"))
    )


@pytest.mark.parametrize("rule", ["tent", "aeo"])
def test_a_live_trunk_stays_as_it_is_while_the_tails_adapt(live, tmp_path, rule):
    words = ["adapt", live[1], "--rule", rule, "--output", tmp_path]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.stderr
    moved = json.loads((tmp_path / rule / "adaptation.json").read_text())["moved"]
    assert any(name.startswith("tails.video.") for name in moved)
    assert not any(name.startswith("trunks.") for name in moved)


@pytest.mark.parametrize("trunk", ["live", "prepared"])
def test_landscape_on_training_clips_that_have_no_test_view(trunk, request, tmp_path):
    """EPIC-Kitchens' preset stores test views of test clips only: calibration then takes training views."""
    settings = request.getfixturevalue(trunk)
    settings, *run = settings if isinstance(settings, tuple) else (settings,)
    run = run[0] if trunk == "live" else tmp_path / "run"
    if trunk == "prepared":
        result = call("train", settings.cache.dir, "--run", run, "--epochs", 1, "--batch-size", 4)
        assert result.exit_code == 0, result.stderr
    sets = ["landscape.batch_norm=recalibrated", "landscape.analyses=['curve']", "landscape.points=3"]
    sets += ["landscape.data=train", "landscape.max_clips=4"]
    found = []
    for name in ("one", "two"):
        words = ["landscape", "--checkpoint", run / "checkpoints/last.pt", "--output", tmp_path / name, "--json"]
        result = CliRunner().invoke(app, list(map(str, words + [w for s in sets for w in ("--set", s)])))
        assert result.exit_code == 0, result.stderr
        (figures,) = json.loads(result.stdout)["checkpoints"].values()
        found.append(figures["loss"])
    assert found[0] == found[1]


def test_live_and_frozen_trunks_are_different_caches(prepared, live, tmp_path):
    for settings, asked, has in ((live[0], "running", "batch"), (prepared[0], "batch", "running")):
        with pytest.raises(CacheError, match=f"trunk_batch_norm: cache has {has}, settings say {asked}"):
            opened(settings, f"cache.trunk_batch_norm={asked}")
    with pytest.raises(SettingsError, match="trunk_batch_norm = batch needs views = 0"):
        resolve(sets=["cache.views=2", LIVE])


@pytest.mark.parametrize("trunk", ["live", "prepared"])
def test_a_method_of_two_views_trains_on_fresh_ones(trunk, request, tmp_path):
    settings = request.getfixturevalue(trunk)[0]
    words = ["--method", "nel", "--set", "method.hidden=8", "--batch-size", 4, *([LIVE] if trunk == "live" else [])]
    for run in ("one", "two"):
        result = call("train", settings.cache.dir, "--run", tmp_path / run, "--epochs", 1, *words)
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()
    record = json.loads((tmp_path / "one/metrics.jsonl").read_text())
    assert record["train"]["agreement"] > 0
    assert record["validation"]["student"]["fused"]["loss"] > 0
    result = call("train", settings.cache.dir, "--dry-run", *words)
    assert result.exit_code == 0, result.stderr


def test_train_and_evaluate(prepared, tmp_path):
    settings, _ = prepared
    sets = [part for one in ONLINE for part in ("--set", one)]
    options = ["--dataset", "tiny", "--target-domain", "gamma", "--cache-dir", settings.cache.dir, *sets]
    options += ["--epochs", 2, "--batch-size", 4, "--json"]
    for run in ("one", "two"):
        result = CliRunner().invoke(app, list(map(str, ["train", *options, "--run", tmp_path / run])))
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()
    result = CliRunner().invoke(app, ["evaluate", "--run", str(tmp_path / "one"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)["headline"]["top1"]) == {"fused", "video", "audio"}


def test_bad_files_come_to_light_in_prepare_and_later_ones_in_training(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha", "beta", "gamma"))
    (root / "video" / "alpha_0_0.mp4").write_bytes(b"no video")
    settings = tree(root, tmp_path / "cache", "dataset.max_bad=1")
    assert [r.clip for r in prepare(settings).rejected] == ["alpha_0_0"]
    dataset, clips = opened(settings)
    assert "alpha_0_0" not in {dataset.clips.ids[i] for i in clips}
    (root / "audio" / "beta_1_1.wav").unlink()
    with pytest.raises(MediaError, match=r"beta_1_1\.wav"):
        list(dataset.batches(clips, batch_size=1, training=True))


def test_what_only_a_later_view_meets_is_mended_with_a_warning(tmp_path, capsys):
    """Even where `prepare` was told to reject: a clip that it took cannot be left out in the middle of an epoch."""
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha", "beta", "gamma"))
    settings = tree(root, tmp_path / "cache", "dataset.missing_frames=reject")
    prepare(settings)
    dataset, _ = opened(settings, "dataset.missing_frames=reject")
    helpers.write_wav(root / "audio" / "beta_1_1.wav", helpers.tone(0.1))
    sources = dataset.online._sources
    shorter = [replace(media, stop=0.5) for media in sources["audio"].media]
    sources["audio"] = replace(sources["audio"], media=shorter)
    clips = dataset.select(domains=["alpha", "beta"], splits=["train"])
    for _ in range(2):
        assert len(list(dataset.batches(clips, batch_size=1, training=True))) == len(clips)
    assert capsys.readouterr().err.count("mended in a training view") == 1


def test_a_dataset_that_moved_is_found_by_its_root(tmp_path):
    moved = helpers.write_dataset(tmp_path / "before", domains=("alpha", "beta", "gamma"))
    settings = tree(moved, tmp_path / "cache")
    prepare(settings)
    after = moved.rename(tmp_path / "after")
    with_root = tree(after, tmp_path / "cache")
    resolved, dataset = open_for_training(with_root)
    assemble(resolved, dataset, device=CPU, say=console.terminal)
    clips = dataset.select(domains=["alpha"], splits=["train"])
    assert len(list(dataset.batches(clips, batch_size=2, training=True))) == 2
    (dataset.caches["video"].folder / "trunk.pt").write_bytes(b"torn")
    with pytest.raises(CacheError, match=r"trunk\.pt is damaged: it carries no checksum"):
        assemble(resolved, dataset, device=CPU, say=console.terminal)
