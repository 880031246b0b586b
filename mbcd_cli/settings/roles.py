"""Base of every group of settings, and what each field is for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

Role = Literal["weights", "cache", "machine", "report"]
"""What a setting is for.

weights: trained weights depend on it. cache: so do cached bytes. machine: where and how things are kept and computed,
and how often; nothing that is stored depends on it. report: what is computed from finished weights.
"""
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class _For:
    role: Role


# Fields with another role than their group's.
ForWeights = Annotated[_Value, _For("weights")]
ForCache = Annotated[_Value, _For("cache")]
ForMachine = Annotated[_Value, _For("machine")]
ForReport = Annotated[_Value, _For("report")]


class Slice(BaseModel):
    """Base of every part of the tree: frozen, no unknown keys, docstrings as descriptions, finite numbers.

    Attributes:
        role: what its fields are for, but for those that are marked otherwise; unsaid, the most careful answer.
    """

    role: ClassVar[Role] = "weights"
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: object) -> object:
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value  # noqa: PTH111


def field_role(group: type[Slice], field: str) -> Role:
    """What a field of a group is for."""
    return next((mark.role for mark in group.model_fields[field].metadata if isinstance(mark, _For)), group.role)


def fields_for(group: type[Slice], role: Role) -> tuple[str, ...]:
    """The fields of a group with this role, in their order."""
    return tuple(field for field in group.model_fields if field_role(group, field) == role)
