"""The frozen part of an encoder, as `prepare` runs and keeps it: its weights, and the shapes of what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.quantise import scale_shape
from mbcd_cli.encoders import build_encoder, format_of
from mbcd_cli.encoders.formats import behind_scheme, files_sha256
from mbcd_cli.encoders.pretrained import check_settings, checked_sha256, find_weights, load_pretrained
from mbcd_cli.encoders.staged import StagedEncoder, Trunk
from mbcd_cli.files import written_file
from mbcd_cli.preparation.passport import Passport, passport_of
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings

Shapes = list[tuple[tuple[int, ...], np.dtype]]


def needs_weights(settings: Settings, modality: Modality) -> bool:
    """Whether a weights file has to be there: nothing is frozen at the cut `input`, and random weights may be said."""
    return modality.prepared_encoder and not settings.cache.random_weights


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """The file of the weights that an encoder needs, or their folder, and its SHA-256 (`formats.files_sha256`)."""

    file: Path
    sha256: str


def weight_files(settings: Settings, modality: Modality) -> list[Path]:
    """The files that hold the weights of `modality`'s encoder.

    Raises:
        CheckpointError: they are not there.
    """
    form, folder = format_of(modality), settings.cache.weights_dir
    if form is None:
        return [find_weights(modality.encoder, modality.weights, folder)]
    return form.files(modality, folder)


def weights_file(settings: Settings, modality: Modality) -> WeightsFile | None:
    """The weights file of `modality`'s encoder; None where it needs none. Nothing of it is loaded.

    Raises:
        CheckpointError: it is not there, or another one than the settings say.
    """
    if not needs_weights(settings, modality):
        return None
    files = weight_files(settings, modality)
    if modality.from_files:
        named = settings.cache.weights_dir / behind_scheme(modality)
        return WeightsFile(named if named.exists() else files[0], files_sha256(files, modality.weights_sha256))
    (file,) = files
    source = WeightsFile(file, checked_sha256(file, modality.weights_sha256))
    check_settings(modality.encoder, modality, file, source.sha256)
    return source


@dataclass(frozen=True, slots=True)
class Frozen:
    """What `prepare` runs and keeps of an encoder.

    Attributes:
        trunk: the stages whose outputs are cached; none where decoded views are.
        weights: file in the cache folder -> state dict that `train` begins with; none where it draws its own.
        source: of the pretrained weights; None for random ones.
        encoder: all of it.
        passport: of the encoder; None where nothing of it is frozen.
    """

    trunk: Trunk
    weights: dict[str, dict[str, torch.Tensor]]
    source: WeightsFile | None
    encoder: StagedEncoder
    passport: Passport | None


def build_trunk(settings: Settings, name: str, modality: Modality, *, say: Say = SILENT) -> Frozen:
    """The encoder of `modality`, with its weights, cut.

    Raises:
        CheckpointError: weights that are missing, damaged or another encoder's; a trunk is never silently random.
    """
    torch.manual_seed(settings.cache.seed)
    encoder = build_encoder(name, modality)
    if not modality.prepared_encoder:
        return Frozen(encoder.cut(modality.cut)[0], {}, None, encoder, None)
    source = weights_file(settings, modality)
    if source is not None:
        if (form := format_of(modality)) is not None:
            form.load(encoder, modality, settings.cache.weights_dir)
        else:
            load_pretrained(encoder, modality.encoder, source.file, sha256=source.sha256)
        say(f"{name}: {modality.encoder} with the weights of {source.file} (SHA-256 {source.sha256[:8]}...)")
    passport = passport_of(modality, encoder, file=source and source.file, sha256=source and source.sha256)
    for doubt in passport.doubts:
        say.warn(f"{name}: {modality.encoder}: {doubt}")
    cut = encoder.cut(modality.cut, live=settings.cache.live_trunks)
    weights = {"tail.pt": cut[1].state_dict()}
    if settings.cache.views == 0:
        weights["trunk.pt"] = cut[0].state_dict()
    return Frozen(Trunk({}) if settings.cache.live_trunks else cut[0], weights, source, encoder, passport)


def meta_inputs(modality: Modality, group: str) -> tuple[torch.Tensor, ...]:
    """The parts of one view, [1, ...] each, in shape only (on the meta device)."""
    inputs = modality.part_shapes(test=group == "test")
    return tuple(
        torch.empty((1, *shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device="meta")
        for shape, dtype in inputs
    )


def meta_trunk(settings: Settings, name: str, modality: Modality) -> Trunk:
    """The trunk that `prepare` runs, in shape only: no memory, no weights, instant."""
    if settings.cache.live_trunks:
        return Trunk({})
    with torch.device("meta"):
        return build_encoder(name, modality).cut(modality.cut)[0]


def cached_shapes(name: str, modality: Modality, settings: Settings, group: str) -> Shapes:
    """Shape and stored dtype of one row of every part at the cut; nothing is computed."""
    stored = np.dtype(settings.cache.dtype)
    trunk = meta_trunk(settings, name, modality)
    if not trunk.names:
        inputs = modality.part_shapes(test=group == "test")
        return [(shape, dtype if dtype.kind in "iu" else stored) for shape, dtype in inputs]
    return [(tuple(part.shape[1:]), stored) for part in trunk(meta_inputs(modality, group))]


def row_bytes(shapes: Shapes) -> int:
    """Bytes of one row, its scales included."""
    return sum(
        int(np.prod(shape)) * dtype.itemsize + (int(np.prod(scale_shape(shape))) * 4 if dtype == np.int8 else 0)
        for shape, dtype in shapes
    )


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a state dict, whole or not at all (`files.written_file`).

    Raises:
        FileError: full disk or missing rights.
    """
    with written_file(path, place="--cache-dir") as file:
        torch.save({key: value.cpu() for key, value in weights.items()}, file)


def weights_bytes(settings: Settings, name: str, modality: Modality) -> int:
    """About what `save_weights` will write of a modality's encoder."""
    if not modality.prepared_encoder:
        return 0
    with torch.device("meta"):
        trunk, tail = build_encoder(name, modality).cut(modality.cut, live=settings.cache.live_trunks)
    kept = [tail, trunk] if settings.cache.views == 0 else [tail]
    return sum(value.numel() * value.element_size() for part in kept for value in part.state_dict().values())
