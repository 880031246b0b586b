"""What the fields of settings are, in words: for the docs, and for the help of a method."""

from __future__ import annotations

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mbcd_cli.settings.ranges import range_of

_WORDS = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Path": "path"}


@dataclass(frozen=True, slots=True)
class Described:
    """One setting: where it stands, its type (choices in backticks), default and meaning."""

    path: str
    type: str
    default: str
    meaning: str


def described(model: type[BaseModel], prefix: str) -> list[Described]:
    """Every field of a group of settings, those of groups inside it last."""
    rows, nested = [], []
    for name, field in model.model_fields.items():
        annotation = getattr(field.annotation, "__bound__", field.annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            nested += described(annotation, f"{prefix}{name}.")
            continue
        drawn_from = range_of(field)
        meaning = (field.description or "") + (f" Searched {drawn_from}." if drawn_from else "")
        rows.append(Described(f"{prefix}{name}", _type_name(annotation), _default(field.default), meaning))
    return rows + nested


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_name(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type_name(part) for part in get_args(annotation) if part is not type(None))
    if origin is dict:
        return f"{_type_name(get_args(annotation)[1])} by name"
    if origin is tuple:
        parts = [part for part in get_args(annotation) if part is not Ellipsis]
        return "list of " + (_type_name(parts[0]) if len(parts) == 1 else f"{len(parts)} {_type_name(parts[0])}s")
    name = getattr(annotation, "__name__", str(annotation))
    return _WORDS.get(name, name)


def _default(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
