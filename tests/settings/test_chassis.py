"""The chassis of a method's authors: where it lies among the layers, what it depends on, who has none."""

from __future__ import annotations

from functools import reduce

import pytest

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import METHODS, same_class
from mbcd_cli.resolved import load_settings, method_label, resolve
from mbcd_cli.settings.sources import to_toml

PUBLISHED = {"training.chassis": "published"}
WITH = [name for name, entry in METHODS.items() if entry.published is not None]


def published(method, *sets, preset="epic-kitchens", **sources):
    return resolve(preset=preset, method=method, sets=sets, flags=PUBLISHED, **sources)


@pytest.mark.parametrize("method", WITH)
def test_every_one_is_valid_settings_and_is_taken(method):
    settings = published(method)
    tree = settings.model_dump(mode="json")
    for path, value in METHODS[method].published.items():
        if isinstance(value, dict):
            value = value["epic-kitchens"]
        node = tree
        for key in path.split("."):
            node = node[key]
        assert node == (list(value) if isinstance(value, tuple | list) else value), path
    assert published(method, preset="digits-4").model.feature_dropout == 0.0, "it has neither video nor flow"
    assert resolve(preset="hac", method=method).training.chassis == "shared"


SHARED = {
    "optimizer.name": "adam",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 1e-4,
    "optimizer.schedule": "constant",
}
SHARED |= {"training.batch_size": 16, "training.epochs": 20, "evaluation.checkpoints": ("best", "last")}
BENCHMARK = SHARED | {"model.norm": "none", "model.feature_dropout": 0.5, "model.feature_dropout_on": ("video", "flow")}
BENCHMARK |= {"model.fused_head": "mlp", "model.unimodal_head": "linear", "model.hidden": 512, "model.dropout": 0.5}
MBCD = SHARED | {"model.norm": "layer", "model.feature_dropout": 0.0, "model.fused_head": "mlp"}
MBCD |= {"model.unimodal_head": "mlp", "average.kind": "ema", "average.beta": 0.999}
BALANCE = SHARED | {"model.norm": "none", "model.fused_head": "linear", "model.unimodal_head": "linear"}
BALANCE |= {"optimizer.name": "sgd", "optimizer.lr": 1e-3, "optimizer.momentum": 0.9, "training.batch_size": 64}
OGM = BALANCE | {"training.epochs": 100, "optimizer.schedule": "step", "optimizer.drops": (70,)}
RECIPES = {
    **dict.fromkeys(("erm", "rna-net", "simmmdg", "moosa"), BENCHMARK),
    "cmrf": BENCHMARK | {"training.epochs": 15, "average.kind": "sma", "average.start": 400},
    "cmrf-benchmark": BENCHMARK | {"training.epochs": 20, "average.kind": "sma", "average.start": 400},
    "nel": BENCHMARK | {"training.epochs": 15, "optimizer.schedule": "cosine", "optimizer.least_lr": 1e-6},
    "gmp": BENCHMARK | {"optimizer.weight_decay": 0.0, "model.hidden": 256, "method.hidden": 256},
    "gmp-benchmark": BENCHMARK
    | {"training.epochs": 15, "optimizer.weight_decay": 0.0, "evaluation.checkpoints": ("last",)}
    | {"method.of": "unimodal", "method.unimodal_weight": 3.0},
    "jat-benchmark": BENCHMARK
    | {"training.epochs": 15, "optimizer.weight_decay": 0.0, "evaluation.checkpoints": ("last",)}
    | {"average.kind": "none", "method.unimodal_weight": 3.0, "method.fused_hidden": 512, "method.dropout": 0.0},
    "jat": MBCD | {"method.unimodal_weight": 1.0, "method.fused_hidden": 2048, "method.dropout": 0.5},
    **dict.fromkeys(("mbcd", "ema", "admmdg"), MBCD),
    "ogm-ge": OGM | {"method.noise": True, "method.start": 0, "method.stop": 51},
    "ogm": OGM | {"method.noise": False},
    "arl": OGM | {"method.gamma": 4.0, "method.temperature": 4.0, "method.start": 6},
    "opm": BALANCE
    | {"optimizer.name": "adamw", "optimizer.lr": 5e-5, "optimizer.weight_decay": 0.01, "training.batch_size": 32}
    | {
        "training.epochs": 100,
        "method.rate": 0.5,
        "method.strength": 0.5,
        "method.probability": 0.7,
        "method.start": 6,
    },
    "mmpareto": BALANCE
    | {"optimizer.lr": 2e-3, "training.epochs": 50, "optimizer.schedule": "step", "optimizer.drops": (30,)},
    "d-and-r": BALANCE | {"optimizer.lr": 2e-3, "training.epochs": 90, "method.after": (20, 40, 60)},
    "mer-dg": BENCHMARK | {"training.epochs": 25, "training.batch_size": 48, "method.on": "feature"},
}
"""The recipes of papers (or of their code) as far as they are settings: written down apart from the registry."""


@pytest.mark.parametrize("method", WITH)
def test_every_one_is_its_papers_recipe(method):
    recipe = RECIPES.get(method) or RECIPES["mbcd"]
    assert method in RECIPES or same_class(method, "mbcd")
    settings = published(method)
    assert {path: reduce(getattr, path.split("."), settings) for path in recipe} == recipe


def test_it_lies_above_the_preset_and_below_what_the_user_sets():
    cmrf = published("cmrf", "optimizer.lr=0.5", preset="hac", environ={"MBCD_MODEL__DROPOUT": "0.1"})
    assert (cmrf.training.epochs, cmrf.model.norm) == (15, "none")  # the preset says 20
    assert (cmrf.optimizer.lr, cmrf.training.batch_size) == (0.5, 16)
    assert resolve(preset="hac", method="cmrf", flags={**PUBLISHED, "training.epochs": 3}).training.epochs == 3
    assert resolve(preset="demo", sets=["training.chassis=published"]).average.beta == 0.999, "MBCD, by default"
    assert resolve(preset="demo").average.beta == 0.95


def test_a_config_that_names_the_method_is_the_users(tmp_path):
    (tmp_path / "c.toml").write_text("[method]\nname='nel'\n[training]\nepochs=2\nchassis='published'\n")
    settings = resolve(preset="hac", config=tmp_path / "c.toml")
    assert (settings.training.epochs, settings.optimizer.schedule) == (2, "cosine")


def test_what_was_resolved_is_read_as_it_is(tmp_path):
    settings = published("cmrf", "training.epochs=3", "average.start=7")
    (tmp_path / "s.toml").write_text(to_toml(settings))
    assert load_settings(tmp_path / "s.toml") == settings
    assert resolve(config=tmp_path / "s.toml") == settings


def test_values_per_dataset_and_modalities():
    assert published("cmrf").average.start == 400
    assert published("cmrf", preset="hac").average.start == 100
    assert published("cmrf", "dataset.name=mine").average.start == 400, "by its reader"
    assert published("erm", "model.modalities=audio,flow").model.feature_dropout_on == ("flow",)
    assert published("erm", "model.modalities=audio").model.feature_dropout == 0.0
    with pytest.raises(SettingsError, match="none is named"):
        resolve(method="erm", flags=PUBLISHED)


def test_a_method_without_one_is_refused_in_one_message(tmp_path):
    with pytest.raises(SettingsError, match="no published chassis of method coral") as caught:
        published("coral")
    assert "--chassis shared" in caught.value.remedy
    path = tmp_path / "mine.py"
    path.write_text(
        "from mbcd_cli.methods.base import Method\n"
        "class Mine(Method):\n    '''Mine.'''\n    published = {'model.hidden': 9}\n"
        "class Bare(Method):\n    '''Bare.'''\n"
    )
    assert published(f"{path}:Mine").model.hidden == 9
    with pytest.raises(SettingsError, match="declare `published`"):
        published(f"{path}:Bare")


def test_a_bad_value_tells_where_it_comes_from(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mbcd_cli.methods.base import Method\n"
        "class Mine(Method):\n    '''Mine.'''\n    published = {'model.hiden': 9}\n"
    )
    with pytest.raises(SettingsError, match=r"model\.hiden: no such setting.*from the published chassis of"):
        published(f"{path}:Mine")


def test_names_of_runs_tell_it():
    assert method_label(published("jat-benchmark")) == "jat-benchmark-published"
    assert method_label(published("moosa", "method.weighting=off")) == "moosa-custom-published"
