"""Merging of settings sources, and the messages for what does not validate."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from mbcd_cli.data.modalities import KINDS
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import METHODS, method_class
from mbcd_cli.resolved import changed, load_settings, resolve, validate
from mbcd_cli.settings import CacheSettings, MethodSettings, Role, Settings, fields_for, role_of
from mbcd_cli.settings.roles import field_role
from mbcd_cli.settings.sources import preset_folder, preset_names, to_toml


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.upper().startswith("MBCD_"):
            monkeypatch.delenv(name)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_precedence_flag_over_set_over_environment_over_config_over_preset_over_default(tmp_path, monkeypatch):
    preset = write(
        tmp_path / "p.toml",
        "[training]\nepochs=1\nbatch_size=1\nseed=1\ntarget_domain='p'\n[optimizer]\nlr=1.0\nmomentum=0.1\n",
    )
    config = write(tmp_path / "c.toml", "[training]\nbatch_size=2\nseed=2\ntarget_domain='c'\n[optimizer]\nlr=2.0\n")
    monkeypatch.setenv("MBCD_TRAINING__SEED", "3")
    monkeypatch.setenv("MBCD_TRAINING__TARGET_DOMAIN", "e")
    monkeypatch.setenv("MBCD_OPTIMIZER__LR", "3.0")
    settings = resolve(
        preset=str(preset),
        config=config,
        environ={"MBCD_TRAINING__SEED": "3"},
        sets=["training.target_domain=s", "optimizer.lr=4.0"],
        flags={"optimizer.lr": 5.0, "training.epochs": None},
    )
    assert settings.training.epochs == 1  # preset
    assert settings.training.batch_size == 2  # config
    assert settings.training.seed == 3  # environment
    assert settings.training.target_domain == "s"  # --set
    assert settings.optimizer.lr == 5.0  # flag
    assert settings.optimizer.momentum == 0.1  # preset
    assert settings.optimizer.weight_decay == 1e-4  # default


def test_checks_across_fields_are_not_hidden_by_bad_fields_beside_them():
    sets = ["training.epochs=-1", "training.seed=x", "training.source_domains=a,b", "training.target_domain=a"]
    with pytest.raises(SettingsError) as caught:
        resolve(sets=[*sets, "landscape.radii=[0.1, -1]", "modalities.audio.nperseg=600", "training.epoch=1"])
    message = caught.value.message
    assert "5 problems" in message
    for words in ("training.epochs:", "training.seed:", "also a source domain", "landscape.radii", "training.epoch:"):
        assert words in message


def test_method_is_a_set_of_switches_below_set():
    settings = resolve(method="ema+gcc", sets=["method.dropout.strategy=fixed"])
    assert settings.method.name == "ema+gcc"
    assert settings.average.kind == "ema"
    assert settings.method.dropout.strategy == "fixed"
    assert settings.method.consistency.order == "first"
    assert not settings.method.distillation.enabled
    assert resolve(method="erm", sets=["average.kind=sma"]).average.kind == "sma"


def test_method_in_a_preset_brings_its_switches(tmp_path):
    preset = write(tmp_path / "p.toml", "[method]\nname='ema'\n[average]\nbeta=0.5\n")
    settings = resolve(preset=str(preset))
    assert type(settings.method) is MethodSettings
    assert (settings.average.kind, settings.average.beta) == ("ema", 0.5)


def test_another_class_begins_anew_and_a_variant_keeps_what_was_set(tmp_path):
    text = "[method]\nname='ema+amd'\n[method.consistency]\nalpha=0.5\n[average]\nkind='sma'\nbeta=0.5\n"
    preset = str(write(tmp_path / "p.toml", text))
    erm = resolve(preset=preset, method="erm")
    assert (erm.average.kind, erm.average.beta) == ("none", 0.5)
    gcc = resolve(preset=preset, method="ema+gcc")
    assert (gcc.method.consistency.order, gcc.method.consistency.alpha) == ("first", 0.5)
    assert gcc.method.dropout.strategy == "none"
    assert resolve(preset=preset, method="mbcd").method.distillation.enabled
    assert resolve(preset=preset).average.kind == "sma"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_validates(method):
    assert resolve(method=method).method.name == method


def test_a_setting_that_the_method_lacks_is_refused_with_the_nearest():
    with pytest.raises(SettingsError) as caught:
        resolve(method="erm", sets=["method.unimdal=joint", "method.dropout.strategy=none"])
    assert "method.unimdal: no such setting; did you mean method.unimodal?" in caught.value.message
    assert "method.dropout: no such setting" in caught.value.message
    with pytest.raises(SettingsError, match="objective: no such setting"):
        resolve(sets=["objective.teacher.beta=0.9"])


def test_a_flag_is_blamed_by_its_own_name():
    with pytest.raises(SettingsError) as caught:
        resolve(flags={"cache.dir": 3, "dataset.reader": 4, "landscape.points": -1})
    for told in ("cache.dir", r"--cache-dir"), ("dataset.reader", "DATASET"), ("landscape.points", "the command line"):
        assert re.search(rf"{told[0]}: .* \[from {told[1]}\]", caught.value.message)


def test_all_problems_in_one_message_with_their_source():
    with pytest.raises(SettingsError) as caught:
        resolve(
            sets=[
                "landscape.point=3",
                "evaluation.batch_size=x",
                "average.kind=none",
                "modalities.audio.noverlap=600",
                "modalities.video.frames=-1",
                "training.source_domains=a,b",
                "training.target_domain=a",
            ]
        )
    message = caught.value.message
    assert "6 problems" in message
    assert "landscape.point: no such setting; did you mean landscape.points?" in message
    assert "[from --set evaluation.batch_size=x]" in message
    assert "distils from the weight average" in message
    assert "noverlap (600) must be smaller than nperseg (512)" in message
    assert "modalities.video.frames:" in message
    assert "target domain 'a' is also a source domain" in message


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"preset": "av-digit"}, "Did you mean av-digits"),
        ({"method": "mcbd"}, "no method"),
        ({"sets": ["training.epochs"]}, "not an assignment"),
        ({"config": Path("nowhere.toml")}, "does not exist"),
        ({"environ": {"MBCD_TRAINNG__SEED": "1"}}, "MBCD_TRAINNG__SEED"),
    ],
)
def test_wrong_sources_name_the_remedy(call, words):
    with pytest.raises(SettingsError) as caught:
        resolve(**call)
    assert words in str(caught.value)


def test_broken_toml_names_the_file(tmp_path):
    path = write(tmp_path / "c.toml", "[training\nepochs=1")
    with pytest.raises(SettingsError, match=r"c\.toml is not valid TOML"):
        resolve(config=path)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_load_and_round_trip(preset, tmp_path):
    settings = resolve(preset=preset)
    path = write(tmp_path / "s.toml", to_toml(settings))
    assert load_settings(path) == settings
    header = (preset_folder() / f"{preset}.toml").read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("Prepare:", "Run:", "Override:"):
        assert word in header, f"the header of {preset} lacks its {word} line"


def test_settings_are_frozen_and_refuse_unknown_keys():
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.training.epochs = 3
    with pytest.raises(SettingsError, match="no such setting"):
        validate({"nonsense": 1})


def test_every_field_has_a_docstring():
    def walk(model):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"
            if hasattr(field.annotation, "model_fields"):
                walk(field.annotation)

    walk(Settings)
    for method in METHODS:
        walk(method_class(method).Settings)
    for kind in KINDS.values():
        walk(kind)


def groups(model=Settings, path=""):
    """(dotted path, group) of every group of the tree, with those of every method and kind."""
    yield path, model
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from groups(field.annotation, f"{path}.{name}" if path else name)
    if model is Settings:
        for method in METHODS:
            yield from groups(method_class(method).Settings, "method")
        for kind in KINDS.values():
            yield from groups(kind, "modalities.NAME")


def test_every_field_says_what_it_is_for():
    for path, group in groups():
        assert {field_role(group, field) for field in group.model_fields} <= set(get_args(Role)), path


def test_only_these_settings_may_change_without_other_weights():
    """Written out, since a run that is resumed, and a cell of a sweep that is reused, rest on it."""
    whole = {"evaluation", "landscape", "adapt"}
    free = {
        f"{path}.{field}"
        for path, group in groups()
        for field in group.model_fields
        if path.split(".")[0] not in {"", "modalities", *whole} and role_of(f"{path}.{field}") in ("machine", "report")
    }
    assert free == {
        *(f"runtime.{field}" for field in ("device", "threads", "prefetch", "cache_device", "verify")),
        *(f"cache.{field}" for field in ("dir", "workers", "weights_dir", "shard_clips", "compression")),
        *("dataset.root", "dataset.max_bad", "training.checkpoint_minutes", "training.keep_checkpoints"),
        *(f"ray.{field}" for field in ("processors", "memory_gb", "gpus")),
        *("training.log_steps", "average.snapshots"),
        "dataset.left_out",  # which of them there are is in the cache's fingerprint
    }
    assert {role_of(f"{part}.seed") for part in whole} == {"report"}


def test_what_reads_a_view_is_no_part_of_the_view():
    for kind in KINDS.values():
        assert set(fields_for(kind, "weights")) == {"encoder", "encoder_config", "weights", "weights_sha256", "width"}
    assert fields_for(CacheSettings, "cache") == ("views", "trunk_batch_norm", "dtype", "seed")
    assert role_of("modalities.video.frames") == "cache"
    assert role_of("method.dropout.rate") == "weights"


def test_a_reader_has_settings_of_its_own():
    named = resolve(sets=["dataset.reader=demo", "dataset.reader.shortcut=0.5"])
    assert (named.dataset.reader.name, named.dataset.reader.shortcut) == ("demo", 0.5)
    assert validate(tomllib.loads(to_toml(named))) == named
    other = resolve(preset="synthetic-4", flags={"dataset.reader": "hac"})
    assert other.dataset.reader.model_dump() == {"name": "hac", "splits": None}
    same = resolve(preset="synthetic-4", flags={"dataset.reader": "synthetic"})
    assert same.dataset.reader.domain_shift == 1.5
    with pytest.raises(SettingsError, match=r"dataset\.reader\.shortcuts: .*did you mean dataset\.reader\.shortcut\?"):
        resolve(sets=["dataset.reader=demo", "dataset.reader.shortcuts=0.5"])
    with pytest.raises(SettingsError, match=r"dataset\.reader\.shortcut: no such setting"):
        resolve(sets=["dataset.reader.shortcut=0.5"])


def test_a_setting_that_a_method_lacks_is_told_with_those_it_has():
    for sets, words in (
        (["method.dropout.rate=0.5"], r"method\.dropout: no such setting; the method has unimodal \[from --set"),
        (["method.weigth=1"], r"did you mean method\.weight\?"),
        (["method=erm", "training.chassis=published"], r"group of settings, one by one: method\.name="),
    ):
        with pytest.raises(SettingsError, match=words):
            resolve(method="rna-net" if "weigth" in sets[0] else "erm", sets=sets)


def test_files_and_assignments_as_people_write_them(tmp_path):
    assert resolve(config=write(tmp_path / "bom.toml", "\ufeff[training]\nepochs = 2\n")).training.epochs == 2
    assert resolve(sets=["cache.dir=~/x"]).cache.dir == Path.home() / "x"
    assert resolve(sets=["dataset.max_bad=3"]).dataset.max_bad == "3"
    share = resolve(sets=["dataset.max_bad=5%"]).dataset
    assert share.tolerates(5, 100)
    assert not share.tolerates(6, 100)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training.epochs=1\ntraining.seed=5", "training.epochs"),
        (f"training.epochs={'1' * 5000}", "training.epochs"),
        (f"training.epochs={'[' * 5000}", "training.epochs"),
        ("training.seed=-1", "training.seed"),
        ("model.hidden=100000000000000000000", "model.hidden"),
        ("optimizer.lr=1e308", "optimizer.lr"),
        ("dataset.max_bad=200%", "such as 5%"),
        ("ray.gpus=1.5", "nor a fraction of one"),
        ("ray.gpus=0.00001", "nor a fraction of one"),
        ("landscape.radii=[]", "landscape.radii"),
        ("modalities.video.kind=vidoe", "Did you mean video?"),
        ("cache.dtype=float", "Did you mean float"),
        ("landscape.radii=[1e39]", "have 1 problem:\n  landscape.radii.0: "),
        ("landscape.radii=[]", "landscape.radii: Input should be a list of at least 1 "),
        ("landscape.analyses=[curve]", 'Input should be a list, such as \'["a", "b"]\' (in single quotes'),
        ("method=[]", "method: Input should be a group of settings"),
    ],
)
def test_values_that_cannot_be_are_one_short_message(text, told):
    with pytest.raises(SettingsError) as caught:
        resolve(sets=[text])
    assert told in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("MBCD_TRAINING", value) for value in ("5", "{bad", "[]", "x")), ("MBCD_TRAINING__EPOCHS", "[" * 10_000)],
)
def test_a_variable_that_cannot_be_read_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"variable {name} does"):
        resolve(environ={name: value})


def test_a_variable_reaches_a_modality_with_capitals(monkeypatch):
    environ = {"MBCD_MODALITIES__RGBfeat__WIDTH": "3", "MBCD_MODALITIES__VIDEO__WIDTH": "4"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = resolve(environ=environ).modalities
    assert {name: one.width for name, one in found.items()} == {"RGBfeat": 3, "video": 4}


def test_what_differs_is_told_of_what_weights_depend_on_alone():
    saved, now = resolve(), resolve(sets=["training.checkpoint_minutes=5", "training.log_steps=3", "cache.workers=1"])
    assert changed(saved, now) == {}
    now = resolve(sets=["training.epochs=3", "cache.dtype=float32", "evaluation.bins=3"])
    assert changed(saved, now) == {"cache.dtype": ("float16", "float32"), "training.epochs": (20, 3)}
