"""Records as what JSON can hold: the one way from dataclasses to a file or to `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

OPTIONAL = {"optional": True}
"""Metadata of a dataclass's field that has no key in JSON where it is None: what was not measured."""


def json_values(value: object) -> Any:
    """Dataclasses and mappings as dicts, sequences as lists, paths as text, NaN and infinities as None."""
    if is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        absent = {field.name for field in fields(value) if "optional" in field.metadata and held[field.name] is None}
        return {name: json_values(held[name]) for name in held if name not in absent}
    if isinstance(value, Mapping):
        return {str(key): json_values(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(held) for held in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
