"""How encoders are made from a user's files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders.pretrained import checked_sha256, same_sha256
from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.encoders.wants import Wants
from mbcd_cli.errors import CheckpointError, SettingsError, lines_of

Told = TypeVar("Told")


class EncoderFormat(ABC):
    """One kind of files that encoders come from, named by a `Scheme`.

    What `describe` returns is kept as `encoder_config` with the cache and every run, so that `wants` and `build` need
    the files no more.
    """

    @abstractmethod
    def describe(self, modality: Modality, weights_dir: Path) -> str:
        """All that shape and preprocessing depend on, as JSON.

        Args:
            modality: its `encoder` is `SCHEME:WHAT`.
            weights_dir: where relative paths begin.

        Raises:
            CheckpointError: files that are not there, or that no encoder of ours can be made from.
        """

    @abstractmethod
    def wants(self, modality: Modality) -> Wants:
        """What the encoder that `modality.encoder_config` describes wants and gives."""

    @abstractmethod
    def files(self, modality: Modality, weights_dir: Path) -> list[Path]:
        """The files that its outputs depend on: one, or several of one folder.

        Raises:
            CheckpointError: they are not there.
        """

    @abstractmethod
    def build(self, modality: Modality) -> StagedEncoder:
        """The encoder that `modality.encoder_config` describes, with random weights, or none yet; also on `meta`."""

    @abstractmethod
    def load(self, encoder: StagedEncoder, modality: Modality, weights_dir: Path) -> None:
        """Put the weights of `files` into an encoder of `build`; all of them or none.

        Raises:
            CheckpointError: damaged files, or another encoder's; every key that differs is named.
        """


def behind_scheme(modality: Modality) -> str:
    """WHAT of the modality's encoder `SCHEME:WHAT`."""
    return modality.encoder.partition(":")[2]


def import_optional(package: str, group: str) -> ModuleType:
    """An optional package.

    Raises:
        SettingsError: it is not installed, or cannot be imported.
    """
    _declare_torchvision()
    try:
        return importlib.import_module(package)
    except Exception as error:  # a compiled half of the package may be of another torch
        raise SettingsError(
            f"{package} cannot be imported: {type(error).__name__}: {lines_of(error)[0]}",
            f"`uv sync --group {group}` (or `pip install {package.partition('.')[0]}`) installs it.",
        ) from error


@cache
def _declare_torchvision() -> None:
    """Let torchvision be imported beside a torch that it was not compiled for, as PyPI's is beside a CPU build.

    transformers and timm import its Python half, which describes operators of the compiled one; where that cannot be
    loaded they are declared. None of them is used here.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return
    folder = Path(spec.submodule_search_locations[0])
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        text = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
        for name in sorted(set(re.findall(r"register_fake\(\"torchvision::(\w+)\"\)", text))):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


def files_sha256(files: Sequence[Path], expected: str | None) -> str:
    """SHA-256 of one file; of several, that of the lines that `sha256sum` prints of them, sorted by name.

    Raises:
        CheckpointError: it does not begin as `expected`, where something is; a file cannot be read.
    """
    try:
        if len(files) == 1:
            return checked_sha256(files[0], expected)
        lines = [f"{checked_sha256(file, None)}  {file.name}\n" for file in sorted(files, key=lambda file: file.name)]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}).", "Mend its rights.") from error
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    same_sha256(files[0].parent, digest, expected)
    return digest


def read_config(file: Path) -> dict[str, Any]:
    """A configuration that comes with a model.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is no readable JSON ({error}).", "Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no settings by name.", "Download it again.")
    return content


def validated(kinds: TypeAdapter[Told], content: object, file: Path, remedy: str) -> Told:
    """What a file says, as the types that it may be of.

    Raises:
        CheckpointError: naming every value that is of another.
    """
    try:
        return kinds.validate_python(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()]
        raise CheckpointError(f"{file}: {'; '.join(problems)}.", remedy) from error
