"""Merging preset, config file, environment, `--set` and flags into one validated `Settings` tree.

Precedence: flag > --set a.b=v > MBCD_A__B > --config > --preset > default. `--method` sits just below `--set`. A layer
that names a method drops the `method` settings of the layers below where those are another class's, and what the name
stands for (a variant's settings, the kind of average; with `training.chassis = "published"` its authors' chassis) lies
right below that layer, and above the preset in any case.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mbcd_cli.data.modalities import AnyKind, infer_kind
from mbcd_cli.data.modalities.frames import FrameSampling
from mbcd_cli.data.readers import reader_settings
from mbcd_cli.errors import SettingsError
from mbcd_cli.files import flatten
from mbcd_cli.methods import DEFAULT, method_class, over_defaults, published_chassis, same_class, short_name
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings import ReaderSettings, Settings, flag_of, role_of
from mbcd_cli.settings.sources import Layer, environment_layer, load_preset, merge, nest, read_toml, set_layers

_SHOWN = 80
_PLAINLY = {  # what pydantic says in Python's words
    "tuple_type": 'Input should be a list, such as \'["a", "b"]\' (in single quotes, or the shell takes the others)',
    "too_short": "Input should be a list of at least {min_length}",
    "model_type": "Input should be a group of settings, one by one: {path}.name=... and the like",
    "model_attributes_type": "Input should be a group of settings, one by one: {path}.name=... and the like",
}
"""Characters of a wrong value that a message repeats."""
DEFAULT_READER = ReaderSettings().name
PUBLISHED = "-published"
"""How a method on its authors' chassis is marked, in names of runs and in tables."""


def _at(values: object, *keys: str) -> object:
    """What stands at these keys of nested mappings, or None."""
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def _name_at(values: Mapping[str, object], *keys: str) -> str | None:
    name = _at(values, *keys, "name")
    return name if isinstance(name, str) else None


def _merged(layers: Sequence[Mapping[str, object]], chassis: Mapping[str, object] | None = None) -> dict[str, object]:
    """All layers over each other, the first being the lowest; `chassis` over what the method that is chosen stands for.

    Raises:
        SettingsError: there is no such method.
    """
    chassis = chassis or {}
    chosen, below, over = DEFAULT, {}, merge(over_defaults(DEFAULT), chassis)
    above: dict[str, object] = {}
    for values in layers:
        name = _name_at(values, "method")
        if name is not None:
            below = merge(below, above)
            if not same_class(name, chosen):
                below = {part: group for part, group in below.items() if part != "method"}
            chosen, over, above = name, merge(over_defaults(name), chassis), {}
        above = merge(above, values)
    tree, reader = merge(merge(below, over), above), _reader(layers)
    return merge(tree, {"dataset": {"reader": reader}}) if reader else tree


def _reader(layers: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The reader of all layers over each other; one that names a reader drops another reader's settings below it."""
    chosen: dict[str, object] = {}
    for values in layers:
        group = _at(values, "dataset", "reader")
        group = {"name": group} if isinstance(group, str) else group
        if isinstance(group, Mapping):
            name = _name_at(group)
            if name is not None and name != chosen.get("name", DEFAULT_READER):
                chosen = {}
            chosen = merge(chosen, group)
    return chosen


def layers_of(
    *,
    base: Layer | None = None,
    preset: str | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    sets: Sequence[str] = (),
    method: str | None = None,
    flags: Mapping[str, object] | None = None,
) -> list[Layer]:
    """The layers that these sources (of `resolve`) are, the lowest first.

    Raises:
        SettingsError: one of them cannot be read.
    """
    layers: list[Layer] = [] if base is None else [base]
    if preset is not None:
        layers.append(load_preset(preset))
    if config is not None:
        layers.append(Layer(f"config {config}", read_toml(config, "config file")))
    if environ is not None:
        layers.append(environment_layer(environ))
    if method is not None:
        layers.append(Layer(f"--method {method}", {"method": {"name": method}}))
    layers.extend(set_layers(sets))
    for path, value in (flags or {}).items():
        if value is not None:
            layers.append(Layer(flag_of(path), nest(path, value)))
    return layers


def stated(layers: Sequence[Layer], path: str) -> object:
    """What the highest layer that speaks of a setting says, unchecked; None where none does."""
    for layer in reversed(layers):
        value: object = layer.values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def resolve(*, base: Layer | None = None, preset: str | None = None, **sources: Any) -> Settings:
    """The settings that these sources give together.

    Args:
        base: below everything: a finished run's settings, for commands that read one.
        preset: by name or path.
        sources: `config` (a file), `environ`, `sets` (assignments), `method` (a name) and `flags` (dotted path ->
            value, None being unset).

    Raises:
        SettingsError: every problem of the merged tree in one message, each with the source of the value.
    """
    layers = layers_of(base=base, preset=preset, **sources)
    return settled(layers, lowest=(base is not None) + (preset is not None), chassis=base is None)


def settled(layers: Sequence[Layer], *, lowest: int, chassis: bool = True) -> Settings:
    """The settings that layers give together, the lowest first.

    Args:
        lowest: how many of them are a run or a preset: what they name as the method is no wish of the user's.
        chassis: whether the method's published chassis is laid below them, where they ask for it.

    Raises:
        SettingsError: as `resolve`.
    """
    layers = list(layers)
    merged = _merged([layer.values for layer in layers])
    name = _name_at(merged, "method")
    if chassis and name is not None and _at(merged, "training", "chassis") == "published":
        published = published_settings(name, merged)
        if not any(_name_at(layer.values, "method") for layer in layers[lowest:]):
            layers.insert(lowest, Layer(f"method {name}", {"method": {"name": name}}))
        merged = _merged([layer.values for layer in layers], published)
        layers.insert(0, Layer(f"the published chassis of {name}", published))
    return _with_followed_frames(validate(merged, layers))


def published_settings(name: str, values: Mapping[str, object]) -> dict[str, object]:
    """What the published chassis of a method sets, as groups of the tree.

    Args:
        values: of all layers, for the dataset's name or its reader's, and the modalities, of which only those that take
            part are dropped out.

    Raises:
        SettingsError: the method has none, or nothing names the modalities.
    """
    names = (_at(values, "dataset", "name"), _name_at(values, "dataset", "reader"))
    groups: dict[str, object] = {}
    for path, value in published_chassis(name).items():
        if isinstance(value, Mapping):
            value = next((value[dataset] for dataset in names if dataset in value), value["default"])
        groups = merge(groups, nest(path, value))
    model = groups.get("model")
    if isinstance(model, dict) and "feature_dropout_on" in model:
        taking_part = _named_modalities(values)
        if not taking_part:
            raise SettingsError(
                f"The published chassis of {name} depends on the modalities, and none is named.",
                "Name them with --set model.modalities=video,audio.",
            )
        model["feature_dropout_on"] = [m for m in model["feature_dropout_on"] if m in taking_part]
        if not model["feature_dropout_on"]:  # which would mean all of them
            model["feature_dropout"] = 0.0
    return groups


def _named_modalities(values: Mapping[str, object]) -> tuple[str, ...]:
    """The modalities that are chosen, else all that are described."""
    chosen, described = _at(values, "model", "modalities"), values.get("modalities")
    if isinstance(chosen, str):
        chosen = [part.strip() for part in chosen.split(",")]
    chosen = chosen if isinstance(chosen, list | tuple) else ()
    return tuple(chosen) or tuple(described if isinstance(described, Mapping) else ())


def _with_followed_frames(settings: Settings) -> Settings:
    """Sound that follows frames, with the settings of those frames.

    Where the modality that it was to follow is left out, it follows the first with frames that is read. That is the
    protocol of HAC: with sound and flow alone the sound's span is that of the flow's frames.

    Raises:
        SettingsError: there is no such modality with frames.
    """
    chosen, modalities = settings.model.modalities, dict(settings.modalities)
    framed = [name for name in chosen if name in modalities and modalities[name].framed]
    for name, sound in settings.modalities.items():
        guide = sound.guide
        if guide is None:
            continue
        if name in chosen and guide not in chosen and framed:
            guide = framed[0]
        if guide in modalities and modalities[guide].framed:
            told = {field: getattr(modalities[guide], field) for field in FrameSampling.model_fields}
            modalities[name] = sound.model_copy(update={"follow": guide, "followed": FrameSampling(**told)})
        elif sound.followed is None:
            raise SettingsError(
                f"modalities.{name}.follow: there is no modality {guide!r} with frames.",
                f"Set modalities.{guide}, or take it back with --set modalities.{name}.follow=",
            )
    return settings.model_copy(update={"modalities": modalities})


def named_dataset(settings: Settings, preset: str | None) -> Settings:
    """The settings with a dataset's name: the preset's where they have none."""
    if settings.dataset.name is not None or preset is None:
        return settings
    return settings.model_copy(update={"dataset": settings.dataset.model_copy(update={"name": Path(preset).stem})})


def validate(values: Mapping[str, object], layers: Sequence[Layer] = ()) -> Settings:
    """Validated settings, with the settings class of the method that they name (else of the default one).

    Raises:
        SettingsError: all problems together; or there is no such method.
    """
    problems: list[Mapping[str, Any]] = []
    left = _merged([values])
    kind = method_class(_name_at(left, "method") or DEFAULT).Settings
    reader = _name_at(left, "dataset", "reader") or DEFAULT_READER
    tree = Settings[kind, AnyKind, type(reader_settings(reader))]
    first: ValidationError | None = None
    # Checks across fields wait until the fields are valid: take the bad values out and look again.
    while True:
        try:
            settings = tree.model_validate(_with_kinds(left))
            break
        except ValidationError as error:
            first = first or error
            problems += _outermost(error.errors())
            dropped = [_drop(left, _path(problem)) for problem in error.errors()]
            if not all(dropped):
                break
    if not problems:
        return settings
    lines = list(dict.fromkeys(_describe(problem, layers, tree) for problem in problems))
    noun = "problem" if len(lines) == 1 else "problems"
    raise SettingsError(
        "\n".join([f"The settings have {len(lines)} {noun}:", *(f"  {line}" for line in lines)]),
        "`mbcd train --show-settings` prints a valid tree; docs/settings.md explains every field.",
    ) from first


def _outermost(problems: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without what is said of a list only because some of its values are refused: that it is too short."""
    around = {problem["loc"][:-1] for problem in problems}
    return [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in around]


def _with_kinds(values: Mapping[str, object]) -> Mapping[str, object]:
    """`values` with the kinds of the modalities that leave theirs to their name."""
    given = values.get("modalities")
    if not isinstance(given, Mapping):
        return values
    kinds = {
        name: {"kind": infer_kind(name) or "array", **group} if isinstance(group, Mapping) else group
        for name, group in given.items()
    }
    return {**values, "modalities": kinds}


def _path(problem: Mapping[str, object]) -> list[str]:
    """Keys of a problem's value, as a user writes them."""
    loc = [str(part) for part in problem["loc"]]
    if len(loc) > 2 and loc[0] == "modalities":
        del loc[2]  # the discriminator's tag, which no user ever wrote
    return loc


def _drop(values: dict[str, object], path: Sequence[str]) -> bool:
    """Take the value at `path` (or the list around it) out of `values`, copying what is shared; False: not there."""
    node = values
    for depth, key in enumerate(path):
        if key not in node:
            return False
        if depth == len(path) - 1 or not isinstance(node[key], Mapping):
            del node[key]
            return True
        node[key] = dict(node[key])
        node = node[key]
    return False


def _describe(problem: Mapping[str, object], layers: Sequence[Layer], tree: type[Settings]) -> str:
    loc = _path(problem)
    path = ".".join(loc)
    message = problem["msg"].removeprefix("Value error, ")
    if plain := _PLAINLY.get(problem["type"]):
        message = plain.format_map({"path": path, **problem.get("ctx", {})})
    if problem["type"] == "extra_forbidden":
        message = "no such setting" + (_nearest(loc, tree) or _of_method(loc, tree))
        given = ""
    else:
        value = problem.get("input")
        given = f" (got {_quoted(value)})" if isinstance(value, str | int | float | bool) else ""
        if problem["type"] == "union_tag_invalid":
            path, value = f"{path}.kind", str(problem["ctx"]["tag"])
            message, given = f"Input should be one of {problem['ctx']['expected_tags']}", f" (got {_quoted(value)})"
        if problem["type"] in ("literal_error", "union_tag_invalid") and isinstance(value, str):
            choices = re.findall(r"'([^']*)'", str(problem["ctx"].get("expected", problem["ctx"].get("expected_tags"))))
            hint = did_you_mean(value, choices).strip()
            message += f". {hint}" if hint else ""
    source = _source(loc, layers)
    return f"{_cut(path)}: {message}{given}{f' [from {_cut(source)}]' if source else ''}"


def _quoted(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _nearest(loc: Sequence[str], tree: type[Settings]) -> str:
    node: Any = tree
    for key in loc[:-1]:
        field = getattr(node, "model_fields", {}).get(key)
        node = field.annotation if field is not None else None
        if not hasattr(node, "model_fields"):
            return ""
    close = difflib.get_close_matches(loc[-1], list(node.model_fields), n=1)
    return f"; did you mean {'.'.join([*loc[:-1], close[0]])}?" if close else ""


def _of_method(loc: Sequence[str], tree: type[Settings]) -> str:
    """What the method has instead, where it is the method that lacks a setting."""
    if loc[0] != "method" or len(loc) != 2:
        return ""
    has = [name for name in tree.model_fields["method"].annotation.model_fields if name != "name"]
    return f"; the method has {', '.join(has)}"


def _source(loc: Sequence[str], layers: Sequence[Layer]) -> str | None:
    return next((layer.source for layer in reversed(layers) if _at(layer.values, *loc) is not None), None)


def method_label(settings: Settings) -> str:
    """The method's name, marked `-custom` when its switches (settings that are no numbers) or what it says of the model
    were changed one by one, and `-published` on the chassis of its authors."""
    name = settings.method.name
    over = over_defaults(name)
    plain = _untouched(name, method_class(name))
    same = _switches(settings.method) == _switches(plain.method) and settings.average.kind == plain.average.kind
    same = same and all(getattr(settings.model, key) == value for key, value in over["model"].items())
    published = settings.training.chassis == "published"
    return short_name(name) + ("" if same else "-custom") + (PUBLISHED if published else "")


@cache
def _untouched(name: str, _: type) -> Settings:
    """The settings of a method, of this class, that nothing is said of."""
    return validate(over_defaults(name))


def _switches(group: BaseModel) -> dict[str, str | bool]:
    switches: dict[str, str | bool] = {}
    for key in type(group).model_fields:
        value = getattr(group, key)
        if isinstance(value, BaseModel):
            switches |= {f"{key}.{inner}": switch for inner, switch in _switches(value).items()}
        elif isinstance(value, str | bool):
            switches[key] = value
    return switches


def changed(saved: Settings, now: Settings) -> dict[str, tuple[object, object]]:
    """The settings that differ, of those that weights or cached bytes depend on: dotted name -> (saved, now)."""
    before, after = (flatten(settings.model_dump(mode="json")) for settings in (saved, now))
    return {
        path: (before.get(path), after.get(path))
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path) and role_of(path) in ("weights", "cache")
    }


def load_settings(path: Path) -> Settings:
    """Settings saved by `to_toml`.

    Raises:
        SettingsError: missing file, bad TOML or values that do not validate.
    """
    return validate(read_toml(path, "settings file"))
