"""The registry of encoders, and how one is built from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders import array_mlp, audio_resnet, efficientnet, resnet3d, small
from mbcd_cli.encoders.staged import Adapter, StagedEncoder
from mbcd_cli.errors import SettingsError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.plugins import entry_of

GROUP = "mbcd.encoders"


@dataclass(frozen=True, slots=True)
class EncoderEntry:
    """One encoder: the kind of modality it reads, how it is built from that modality's settings, and what it is."""

    kind: str
    build: Callable[..., StagedEncoder]
    summary: str


ENCODERS: dict[str, EncoderEntry] = {
    "small-video": EncoderEntry("video", small.small_video, "four 3-D convolutions, for CPUs"),
    "small-flow": EncoderEntry("flow", small.small_flow, "four 3-D convolutions, for CPUs"),
    "small-audio": EncoderEntry("audio", small.small_audio, "four 2-D convolutions, for CPUs"),
    "slowfast-r101": EncoderEntry("video", resnet3d.slowfast_r101, "SlowFast-R101 8x8 (the paper's; Kinetics-400)"),
    "slowonly-r50": EncoderEntry("flow", resnet3d.slowonly_r50, "SlowOnly-R50 on two flow channels (the paper's)"),
    "audio-resnet18": EncoderEntry("audio", audio_resnet.audio_resnet18, "ResNet-18 (the paper's; VGGSound)"),
    "efficientnet-lite0": EncoderEntry(
        "video", efficientnet.efficientnet_lite0, "EfficientNet-Lite0 on every frame (ImageNet)"
    ),
    "array-mlp": EncoderEntry("array", array_mlp.array_mlp, "two hidden layers, for vectors"),
    "array-conv": EncoderEntry("array", array_mlp.array_conv, "three 1-D convolutions, for sequences"),
}


def build_encoder(name: str, settings: Modality) -> StagedEncoder:
    """The encoder of modality `name`, randomly initialised (`pretrained` loads weights).

    An `adapter` stage is appended when the cut asks for it.

    Raises:
        SettingsError: no such encoder, an encoder of another kind, or no such stage to cut at.
    """
    entry = entry_of(settings.encoder, GROUP, ENCODERS, EncoderEntry)
    if entry is None:
        raise SettingsError(
            f"modalities.{name}.encoder: there is no encoder {settings.encoder!r}.",
            f"{did_you_mean(settings.encoder, ENCODERS)}`mbcd list encoders` shows the choices.",
        )
    if entry.kind != settings.kind:
        raise SettingsError(
            f"modalities.{name}.encoder: {settings.encoder} reads {entry.kind}, and {name} is {settings.kind}.",
            "`mbcd list encoders` shows the choices.",
        )
    encoder = entry.build(settings)
    if settings.cut == "adapter":
        stages: dict[str, nn.Module] = dict(encoder.stages.items())
        stages["adapter"] = Adapter(encoder.dim)
        encoder = StagedEncoder(stages, dim=encoder.dim, recomputed=encoder.recomputed)
    if settings.cut not in encoder.names:
        raise SettingsError(
            f"modalities.{name}.cut: {settings.encoder} has no stage {settings.cut!r}.",
            f"Cut at one of: {', '.join(dict.fromkeys([*encoder.names, 'adapter']))}.",
        )
    return encoder
