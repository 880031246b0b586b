"""An encoder's passport: what it wants and gives, its weights, and its output on a fixed probe.

The probe is a view that no symmetry maps to itself: colours, axes, frames and rates that are mixed up give another
output. Outputs are compared with a tolerance (`identity.same_output`): processors and libraries round differently.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mbcd_cli import checksums
from mbcd_cli.data.modalities.audio import AudioModality, audio_view
from mbcd_cli.data.modalities.modality import Modality, ViewParts
from mbcd_cli.encoders import format_of
from mbcd_cli.encoders.model_files import OnnxModel
from mbcd_cli.encoders.pretrained import PUBLIC
from mbcd_cli.encoders.staged import StagedEncoder, Tail
from mbcd_cli.encoders.wants import FULL_SCALE, Wants
from mbcd_cli.json_values import json_values

PROBE_RATE = 16000
"""Samples per second of the probe where an encoder takes any."""
_AXES = {"video": "BCTHW", "flow": "BCTHW", "audio": "BCFT", "array": "BD"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Passport:
    """What is known of an encoder. Letters: D features.

    Attributes:
        wants: of a view, and what it gives.
        file: name of the weights' file or folder; None for random weights, as `sha256` then is.
        parameters: how many; None where the file does not tell (ONNX).
        gflop: 1e9 floating-point operations on the probe, products and their sums; None where none was seen, or
            nobody asked.
        output: on the probe, [D], four digits each.
        digest: of `output`, to name it.
        doubts: what looks wrong, in words.
    """

    encoder: str
    wants: Wants
    file: str | None
    sha256: str | None
    parameters: int | None
    gflop: float | None
    output: tuple[float, ...]
    digest: str
    doubts: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As `identity.stored_passport` reads it."""
        return json.dumps(json_values(self))


def probe(modality: Modality) -> ViewParts:
    """The decoded view that encoders are told apart by, as the modality's settings shape it.

    Frames [C, T, H, W] uint8 have another ramp along every axis in every channel, and a bright square that moves; sound
    is a sweep with clicks, told in seconds; arrays count.
    """
    shape, dtype = modality.part_shapes(test=True)[0]
    if isinstance(modality, AudioModality):
        rate = modality.sample_rate or PROBE_RATE
        seconds = np.arange(modality.samples) / rate
        sweep = 0.3 * np.sin(2 * np.pi * (200 + 300 * seconds) * seconds)
        clicks = 0.5 * ((seconds % 0.21 < 0.002) & (seconds % 0.84 < 0.6))
        return (audio_view((sweep + clicks).astype(np.float32), rate, modality, None),)
    at = np.indices(shape)
    if len(shape) != 4:
        counted = sum((axis + 1) * (7 * number + 3) for number, axis in enumerate(at))
        return ((counted % 17 - (0 if dtype.kind == "i" else 8)).astype(dtype),)
    channel, moment, row, column = at
    size = shape[-1]
    ramps = [column * 2 + moment * 5, row * 3 + column, (row + 2 * moment) * (column // 4 + 1)]
    pixels = np.choose(channel, ramps[: shape[0]]) * 256 // size % 256
    square = (abs(row - size // 4) < size // 8) & (abs(column - (moment + 1) * size // (shape[1] + 1)) < size // 8)
    return (np.where(square, 250 - 40 * channel, pixels).astype(dtype),)


def _at_defaults(modality: Modality) -> Modality:
    """The modality with what its encoder wants, and elsewhere its kind's defaults: whatever a user chooses, an
    encoder is probed with the same view."""
    form, public = format_of(modality), PUBLIC.get(modality.encoder)
    if form is None and public is None:
        return modality  # it wants what it is given
    told = form.wants(modality).settings() if public is None else dict(public.settings)
    kept = {"encoder": modality.encoder, "encoder_config": modality.encoder_config}
    return type(modality).model_validate(kept | told)


def _wants(modality: Modality, encoder: StagedEncoder) -> Wants:
    """What an encoder wants; one of a registry wants what its modality's settings say."""
    if encoder.wants is not None:
        return encoder.wants
    common = {"kind": modality.kind, "axes": _AXES[modality.kind], "dim": encoder.dim}
    common["pooling"] = type(encoder.stages["pool"]).__name__
    public = PUBLIC.get(modality.encoder)
    common |= {} if public is None else {"licence": public.licence, "pretraining": public.data}
    if modality.kind == "audio":
        front = (("nperseg", modality.nperseg), ("noverlap", modality.noverlap), ("log_floor", modality.log_floor))
        told = {"front_end": modality.front_end, "front_end_settings": front, "sample_rate": modality.sample_rate}
        return Wants(**common, **told, samples=modality.samples)
    if modality.kind == "array":
        return Wants(**common)
    mean, std = (value if isinstance(value, tuple) else (value,) * 2 for value in (modality.mean, modality.std))
    pixels = {"values": (0.0, float(FULL_SCALE)), "mean": mean, "std": std}
    colour = "RGB" if modality.kind == "video" else None
    any_size = modality.encoder in PUBLIC
    shape = {} if any_size else {"frames": modality.frames, "size": (modality.crop, modality.crop)}
    return Wants(**common, **pixels, **shape, colour=colour)


def _untrained(encoder: nn.Module) -> bool:
    """Whether every norm has the values that it begins with."""
    norms = [m for m in encoder.modules() if "Norm" in type(m).__name__ and getattr(m, "bias", None) is not None]
    return bool(norms) and all(bool((m.weight == 1).all() and (m.bias == 0).all()) for m in norms)


@torch.no_grad()
def passport_of(modality: Modality, encoder: StagedEncoder, *, file: Path | None, sha256: str | None) -> Passport:
    """The passport of an encoder whose weights are loaded; it runs once.

    Args:
        modality: its resolved settings.
        file, sha256: of its weights; None for random ones.
    """
    view = probe_tensors(modality)
    network = _without_adapter(encoder)
    wants, public = _wants(modality, encoder), PUBLIC.get(modality.encoder)
    if file is None or (public is not None and not public.is_file(file, str(sha256))):  # of other weights
        wants = replace(wants, pretraining=None)
    output = network(view)[0]
    kept = tuple(float(f"{value:.4g}") for value in output.tolist())
    values = sum(value.numel() for value in network.parameters())
    return Passport(
        encoder=modality.encoder,
        wants=wants,
        file=file and file.name,
        sha256=sha256,
        parameters=values or None,
        gflop=None,
        output=kept,
        digest=checksums.of_text(repr(kept))[:16],
        doubts=("every norm has its first values: these weights look untrained",)
        if file is not None and _untrained(encoder)
        else (),
    )


def _without_adapter(encoder: StagedEncoder) -> Tail:
    return Tail({name: stage for name, stage in encoder.stages.items() if name != "adapter"}, dim=encoder.dim).eval()


def counted(passport: Passport, modality: Modality, encoder: StagedEncoder) -> Passport:
    """The passport with its `gflop`; apart, since counting makes torch import as much again as all of it."""
    from torch.utils.flop_counter import FlopCounterMode

    network = _without_adapter(encoder)
    files = [model for model in network.modules() if isinstance(model, OnnxModel)]
    uncounted = {torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops}  # an LSTM on the processor: torch counts none
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=uncounted) as counter, ExitStack() as unseen:
        counts = [unseen.enter_context(file.counted()) for file in files]
        network(probe_tensors(modality))
    flops = counter.get_total_flops() + sum(map(sum, counts))
    return replace(passport, gflop=float(f"{flops / 1e9:.4g}") or None)


def _recurrent_flops(inputs: torch.Size, of_inputs: torch.Size, of_state: torch.Size, *_: object, **__: object) -> int:
    """Of one layer and direction, from shapes: inputs [T, B, D], weights [4 H, D] and [4 H, H]."""
    return 2 * inputs[0] * inputs[1] * (of_inputs.numel() + of_state.numel())


def probe_tensors(modality: Modality) -> tuple[torch.Tensor, ...]:
    """The probe as an encoder of the modality is given it, [1, ...] each."""
    return tuple(torch.from_numpy(part)[None] for part in probe(_at_defaults(modality)))
