"""Training from the cache equals training without one."""

from __future__ import annotations

from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.records import Batch
from mbcd_cli.encoders import build_encoder
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.training.assemble import assemble


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny", domains=("alpha", "beta", "gamma"))


def test_a_run_without_a_preset_finds_its_dataset_again(root, tmp_path):
    """`train --dataset` takes what is prepared as it is; `evaluate` has the run's settings only."""

    def call(*words):
        return CliRunner().invoke(app, list(map(str, (*words, "--cache-dir", tmp_path / "cache", "--json"))))

    sets = [
        w for one in (*helpers.SMALL, "cache.views=3", "cache.seed=9", "cache.dtype=float32") for w in ("--set", one)
    ]
    assert call("prepare", "manifest", "--root", root, "--name", "tiny", *sets).exit_code == 0
    run = ["--run", tmp_path / "run"]
    words = ["train", "--dataset", "tiny", "--target-domain", "gamma", "--epochs", 1, "--batch-size", 4, *run]
    result = call(*words, "--set", "model.hidden=8")
    assert result.exit_code == 0, result.stderr
    result = call("evaluate", *run, "--set", "evaluation.analyses=[]")
    assert result.exit_code == 0, result.stderr
    # What is asked for in so many words must be what is prepared.
    for asked, has in (("cache.views=0", "views: cache has 3, settings say 0"), ("cache.seed=1", "seed: cache has 9")):
        result = call(*words, "--overwrite", "--set", asked)
        assert result.exit_code == 1
        assert has in " ".join(result.stderr.split())
    result = call(*words, "--overwrite", "--set", "cache.views=0", "--set", "cache.trunk_batch_norm=batch")
    assert "trunk_batch_norm: cache has running, settings say batch" in " ".join(result.stderr.split())
    # Sound alone with other views: the two cannot be described by one run's settings.
    more = ["--modalities", "audio", *sets, "--set", "cache.views=1"]
    assert call("prepare", "manifest", "--root", root, "--name", "tiny", *more).exit_code == 0
    result = call(*words, "--overwrite")
    assert result.exit_code == 1
    assert "different cache.views: video 3, audio 1" in " ".join(result.stderr.split())


def uncached(settings, dataset, clips, *, epoch: int):
    """The batches of `dataset.batches`, but decoded from the media and run through the trunks, nothing stored."""
    listing = read_listing(settings)
    generator = np.random.default_rng([settings.training.seed, epoch])
    order = clips[generator.permutation(len(clips))]
    views = {name: generator.integers(settings.cache.views, size=len(order)) for name in dataset.modalities}
    size = settings.training.batch_size
    for first in range(0, len(order) - len(order) % size, size):
        rows = range(first, first + size)
        inputs = {}
        for name, modality in dataset.modalities.items():
            with torch.random.fork_rng():  # the step's own dropout draws from the global generator
                torch.manual_seed(settings.cache.seed)
                trunk, _ = build_encoder(name, modality).cut(modality.cut)
            decoded = [
                load_views(
                    listing.clips[order[row]],
                    name,
                    modality,
                    views=[int(views[name][row])],
                    seed=settings.cache.seed,
                    dataset=settings.dataset,
                )[0]
                for row in rows
            ]
            parts = tuple(torch.from_numpy(np.stack(column)) for column in zip(*decoded, strict=True))
            inputs[name] = trunk(parts)
        index = order[first : first + size]
        yield Batch(
            inputs=inputs,
            labels=torch.tensor([listing.clips[i].label for i in index]),
            domains=torch.zeros(size, dtype=torch.int64),
            clips=torch.from_numpy(index.copy()),
        )


@pytest.mark.parametrize(("cut", "tolerance"), [("input", 0.0), ("layer3", 1e-5)])
def test_cached_training_equals_uncached_training(root, tmp_path, cut, tolerance):
    settings = resolve(
        sets=[
            *helpers.SMALL,
            "cache.dtype=float32",
            "cache.random_weights=true",
            f"modalities.video.cut={cut}",
            f"modalities.audio.cut={cut}",
            "training.batch_size=4",
            "optimizer.lr=0.01",
        ],
        flags={
            "dataset.root": root,
            "dataset.name": "tiny",
            "cache.dir": tmp_path,
            "training.target_domain": "gamma",
        },
    )
    prepare(settings)
    settings, dataset = open_for_training(settings)
    clips = dataset.select(domains=settings.training.source_domains, splits=["train"])
    weights = []
    for source in ("cache", "media"):
        step = assemble(settings, dataset, device=torch.device("cpu")).step
        for epoch in range(2):
            batches = (
                dataset.batches(clips, batch_size=4, training=True, epoch=epoch, drop_last=True)
                if source == "cache"
                else uncached(settings, dataset, clips, epoch=epoch)
            )
            for batch in batches:
                step(batch)
        weights.append(
            {**step.model.state_dict(), **{f"ema.{k}": v for k, v in step.average.model.state_dict().items()}}
        )
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=tolerance, atol=tolerance, msg=key)
