"""The chassis of a method's authors: where it lies among the layers, what it depends on, who has none."""

from __future__ import annotations

import pytest

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import METHODS
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
