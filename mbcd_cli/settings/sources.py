"""Where settings come from, one `Layer` each: presets, TOML files, environment, `--set`; TOML they are saved as."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from mbcd_cli.checksums import PLACE
from mbcd_cli.errors import SettingsError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings.tree import Settings

_PACKAGE = Path(__file__).resolve().parents[1]
ENV_PREFIX = "MBCD_"


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of settings: where it comes from (for messages) and its nested values."""

    source: str
    values: dict[str, Any]


class _Prefixed(BaseSettings):
    """MBCD_A__B variables as nested dictionaries of strings (pydantic-settings does the nesting)."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="ignore")


_Environment = create_model("_Environment", __base__=_Prefixed, **{part: (dict, {}) for part in Settings.model_fields})


def preset_folder() -> Path:
    """The folder of shipped presets: inside the wheel, or beside the package in a clone."""
    inside = _PACKAGE / "presets"
    return inside if inside.is_dir() else _PACKAGE.parent / "presets"


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def preset_purposes() -> dict[str, str]:
    """Name of each shipped preset -> the first line of its file."""
    texts = {name: (preset_folder() / f"{name}.toml").read_text(encoding="utf-8") for name in preset_names()}
    return {name: text.splitlines()[0].lstrip("# ").strip() for name, text in texts.items()}


def read_toml(path: Path, what: str) -> dict[str, object]:
    """The values of a TOML file.

    Raises:
        SettingsError: the file is missing, unreadable or not TOML.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise SettingsError(f"{what} {path} is no plain file.", "Name a TOML file.")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise SettingsError(f"{what} {path} does not exist.", "Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:  # before ValueError, which the latter is
        raise SettingsError(f"{what} {path} cannot be read: {error}.", "It must be a UTF-8 TOML file.") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, deep nesting
        raise SettingsError(f"{what} {path} is not valid TOML: {error}.", "Mend that line.") from error


def load_preset(name: str) -> Layer:
    """A preset by name or by path.

    Raises:
        SettingsError: no such preset.
    """
    if name.endswith(".toml") or "/" in name:
        return Layer(f"preset {name}", read_toml(Path(name), "preset"))
    if name not in preset_names():
        raise SettingsError(
            f"There is no preset {name!r}.",
            f"{did_you_mean(name, preset_names())}`mbcd list presets` shows them; a path to a TOML file works too.",
        )
    return Layer(f"preset {name}", read_toml(preset_folder() / f"{name}.toml", "preset"))


def parse_value(text: str) -> object:
    """A value as TOML writes it (8, 0.5, true, [1, 2], "x"); anything else is taken as a string."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, numbers of thousands of digits, deep nesting
        return text
    return values["value"] if len(values) == 1 else text  # more than one line


def nest(path: str, value: object) -> dict[str, object]:
    """("a.b", 1) -> {"a": {"b": 1}}."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def merge(low: Mapping[str, object], high: Mapping[str, object]) -> dict[str, object]:
    """`high` over `low`, dictionary by dictionary; other values replace each other."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _parse_leaves(values: object) -> object:
    if isinstance(values, Mapping):
        return {key: _parse_leaves(value) for key, value in values.items()}
    return parse_value(values) if isinstance(values, str) else values


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """MBCD_TRAINING__EPOCHS=3 and the like.

    Raises:
        SettingsError: a variable with the prefix names no part of the tree.
    """
    unknown = [
        name
        for name in environ
        if name.upper().startswith(ENV_PREFIX)
        and name[len(ENV_PREFIX) :].split("__")[0].lower() not in Settings.model_fields
    ]
    if unknown:
        raise SettingsError(
            f"Environment variables that name no setting: {', '.join(sorted(unknown))}.",
            f"Write {ENV_PREFIX}PART__FIELD, PART being one of {', '.join(Settings.model_fields)}; or unset them.",
        )
    try:
        values = _parse_leaves(_Environment().model_dump(exclude_defaults=True))
    except (ValueError, RecursionError) as error:  # of a whole part: no JSON, or no object
        ours = [name for name in environ if name.upper().startswith(ENV_PREFIX)]
        bad = [name for name in ours if "__" not in name] or ours  # a field's may be nested too deep
        raise SettingsError(
            f"The environment variable {', '.join(sorted(bad))} does not hold a part's settings.",
            f"Write {ENV_PREFIX}PART__FIELD=value, a field each.",
        ) from error
    for name in environ:  # names of modalities keep their capitals, unless all of the variable is in capitals
        part, _, rest = name[len(ENV_PREFIX) :].partition("__")
        modality = rest.partition("__")[0]
        if part.upper() == "MODALITIES" and modality != modality.upper() and modality.lower() in values["modalities"]:
            values["modalities"][modality] = values["modalities"].pop(modality.lower())
    return Layer("environment", values)


def set_layers(assignments: Sequence[str]) -> list[Layer]:
    """`--set a.b=v` assignments, one layer each.

    Raises:
        SettingsError: an assignment without `=`.
    """
    bad = [text for text in assignments if "=" not in text or not text.split("=")[0].strip()]
    if bad:
        raise SettingsError(f"--set {bad[0]}: not an assignment.", "Write --set part.field=value.")
    layers = []
    for text in assignments:
        path, value = text.split("=", 1)
        layers.append(Layer(f"--set {text}", nest(path.strip(), parse_value(value.strip()))))
    return layers


def to_toml(settings: Settings, *, stamped: bool = False) -> str:
    """The whole tree as TOML; unset (None) fields are left out and come back as their defaults.

    Args:
        stamped: for a file that carries its checksum, in a last comment.
    """
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)) + (f"\n# {PLACE}\n" if stamped else "")
