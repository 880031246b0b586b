"""An encoder's passport: what it wants and gives, its weights, and its output on a fixed probe.

The probe is a view that no symmetry maps to itself: colours, axes, frames and rates that are mixed up give another
output. Outputs are compared with a tolerance (`identity.same_output`): processors and libraries round differently.
"""

from __future__ import annotations

import json
import math
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
from mbcd_cli.errors import CheckpointError
from mbcd_cli.json_values import json_values

PROBE_RATE = 16000
"""Samples per second of the probe where an encoder takes any."""
_DRAWN_OF, _SAMPLED, _MATRICES = 4096, 2**16, 4
"""Values of a matrix from which on its distribution is looked at, how many of them, and of how many such matrices."""
_SPANS = (0.1, 300.0)
"""Between black and white after mean and std: 2 to 5 mostly, 255 where nothing is divided."""
_KURTOSES = (3.0, 1.8)
"""Of a normal distribution, of a uniform one."""
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


def _doubts(network: nn.Module, wants: Wants, output: tuple[float, ...]) -> tuple[str, ...]:
    """What looks wrong of an encoder whose weights came from a file."""
    doubts = []
    if wants.kind == "video" and wants.values and wants.std:
        span = (wants.values[1] - wants.values[0]) / max(wants.std)
        if not _SPANS[0] <= span <= _SPANS[1]:
            doubts.append(f"pixels differ by up to {span:.3g} after mean and std: values and std are of two scales")
    norms = [m for m in network.modules() if "Norm" in getattr(m, "original_name", type(m).__name__)]
    affine = [m for m in norms if getattr(m, "bias", None) is not None]
    if affine and all(bool((m.weight == 1).all() and (m.bias == 0).all()) for m in affine):
        doubts.append("every norm has its first values: these weights look untrained")
    else:
        large = [p for p in network.parameters() if p.dim() > 1 and p.numel() >= _DRAWN_OF and p.std() > 0]
        drawn = sum(map(_drawn, large))
        if len(large) >= _MATRICES and drawn > 0.9 * len(large):
            doubts.append(f"{drawn} of {len(large)} matrices look drawn at random: these weights look untrained")
    if len(output) > 1 and len(set(output)) == 1:
        doubts.append(f"all its outputs on the probe are {output[0]:g}")
    return tuple(doubts)


def _drawn(values: torch.Tensor) -> bool:
    """Whether numbers have the kurtosis of a normal distribution or of a uniform one, as initial values have.

    Training makes tails heavier. Sampled from a normal one its standard deviation is sqrt(24 / n).
    """
    sample = values.flatten()[:_SAMPLED].double()
    centred = sample - sample.mean()
    kurtosis = float((centred**4).mean() / (centred**2).mean() ** 2)
    return any(abs(kurtosis - drawn) < 5 * math.sqrt(24 / len(sample)) for drawn in _KURTOSES)


@torch.no_grad()
def passport_of(modality: Modality, encoder: StagedEncoder, *, file: Path | None, sha256: str | None) -> Passport:
    """The passport of an encoder whose weights are loaded; it runs once.

    Args:
        modality: its resolved settings.
        file, sha256: of its weights; None for random ones.

    Raises:
        CheckpointError: what it gives is not finite.
    """
    view = probe_tensors(modality)
    network = _without_adapter(encoder)
    wants, public = _wants(modality, encoder), PUBLIC.get(modality.encoder)
    if file is None or (public is not None and not public.is_file(file, str(sha256))):  # of other weights
        wants = replace(wants, pretraining=None)
    output = network(view)[0]
    if not output.isfinite().all():
        raise CheckpointError(
            f"{file or modality.encoder}: its output on the probe is not finite: there are damaged values among its "
            "weights, or in how its input is scaled.",
            "Get the weights again, and see what says how they are fed.",
        )
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
        doubts=() if file is None else _doubts(network, wants, kept),
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
