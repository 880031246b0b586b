"""Kinds of modality, one a file; a new kind is a file and its line in `KINDS`."""

from __future__ import annotations

import re
from typing import Annotated, Union

from pydantic import Field

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.settings import Settings

KINDS: dict[str, type[Modality]] = {
    modality.model_fields["kind"].default: modality
    for modality in (VideoModality, FlowModality, AudioModality, ArrayModality)
}
AnyKind = Annotated[Union[tuple(KINDS.values())], Field(discriminator="kind")]  # noqa: UP007
"""Type of a modality's settings in a tree, told by their `kind`."""


def infer_kind(name: str) -> str | None:
    """Kind of a modality told from its name (`video_left` -> video), or None when the name tells nothing."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((kind for kind, modality in KINDS.items() if any(word in words for word in modality.words)), None)


def asked_modalities(settings: Settings) -> dict[str, Modality]:
    """The modalities that settings name, for a reader; empty takes all that a dataset has."""
    wanted = dict(settings.modalities)
    if settings.model.modalities:
        wanted = {name: wanted.get(name) or default_modality(name) for name in settings.model.modalities}
    return wanted


def default_modality(name: str, kind: str | None = None) -> Modality:
    """The default settings of a modality called `name`; a name that tells nothing is that of arrays."""
    return KINDS[kind or infer_kind(name) or "array"]()
