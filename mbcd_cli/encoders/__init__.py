"""The registry of encoders, and how one is built from its settings."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders import array_mlp, audio_resnet, efficientnet, resnet3d, small
from mbcd_cli.encoders.formats import EncoderFormat
from mbcd_cli.encoders.staged import Adapter, StagedEncoder, Tail, Trunk
from mbcd_cli.errors import FOREIGN, SettingsError, lines_of
from mbcd_cli.naming import did_you_mean
from mbcd_cli.plugins import entry_of, plugins, summaries_of
from mbcd_cli.settings import Settings

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


@dataclass(frozen=True, slots=True)
class Scheme:
    """Encoders from a user's files: what stands behind the colon, the kinds they read, how, and what they are.

    Attributes:
        form: an `EncoderFormat` by its full name, imported when such an encoder is asked for.
    """

    what: str
    kinds: tuple[str, ...]
    form: str
    summary: str


SCHEMES: dict[str, Scheme] = {
    "hf": Scheme(
        "FOLDER",
        ("video", "audio"),
        "mbcd_cli.encoders.transformers_models.TransformersFormat",
        "a folder of transformers' (config.json, safetensors): VideoMAE, V-JEPA 2, CLIP, AST, wav2vec 2, ...",
    ),
    "timm": Scheme(
        "NAME",
        ("video",),
        "mbcd_cli.encoders.timm_models.TimmFormat",
        "a ViT or EfficientNet of timm, with a weights file",
    ),
} | {
    name: Scheme(
        "FILE",
        ("video", "audio", "array"),
        "mbcd_cli.encoders.whole_models.WholeModelFormat",
        f"{what}, with FILE.toml",
    )
    for name, what in (
        ("onnx", "a model of onnxruntime's"),
        ("torchscript", "what torch.jit.save stored"),
        ("export", "what torch.export.save stored"),
    )
}
"""`encoder = "hf:FOLDER"`: scheme -> what it is. Folders and files are relative to `--weights-dir`."""


def format_of(modality: Modality) -> EncoderFormat | None:
    """How the modality's encoder comes from files; None for one of a registry.

    Raises:
        SettingsError: there is no such scheme.
    """
    if not modality.from_files:
        return None
    name = modality.encoder.partition(":")[0]
    if name not in SCHEMES:
        raise SettingsError(
            f"encoder {modality.encoder}: there is no kind of files {name!r}.",
            f"{did_you_mean(name, SCHEMES)}`mbcd list encoders` shows the choices.",
        )
    module, _, form = SCHEMES[name].form.rpartition(".")
    return getattr(importlib.import_module(module), form)()


def described_encoders(settings: Settings) -> Settings:
    """Settings in which every encoder from files is described, and its modality gives it what it wants.

    What the user did not set is set as the encoder wants it; what was described already stays.

    Raises:
        CheckpointError: its files are not there, or not such an encoder's. SettingsError: settings that contradict it.
    """
    modalities = dict(settings.modalities)
    for name, modality in settings.modalities.items():
        form = format_of(modality)
        if form is None or modality.encoder_config is not None:
            continue
        config = form.describe(modality, settings.cache.weights_dir)
        modalities[name] = _as_wanted(name, modality.model_copy(update={"encoder_config": config}), form)
        for sound, other in settings.modalities.items():
            if other.guide == name and modalities[name].frames != modality.frames:
                raise SettingsError(
                    f"modalities.{sound} follows the frames of {name}, of which {modality.encoder} wants "
                    f"{modalities[name].frames}.",
                    f"Say so: --set modalities.{name}.frames={modalities[name].frames}.",
                )
    return settings.model_copy(update={"modalities": modalities})


def _as_wanted(name: str, modality: Modality, form: EncoderFormat) -> Modality:
    """`modality` with what the encoder wants in the settings that the user left alone."""
    _check_kind(name, modality)
    wants = form.wants(modality)
    if wants.kind != modality.kind:
        raise SettingsError(
            f"modalities.{name}.encoder: {modality.encoder} reads {wants.kind}, and {name} is {modality.kind}.",
            f"Name an encoder of {modality.kind}; `mbcd passport ENCODER` says what one reads.",
        )
    wanted = wants.settings()
    given = {field: getattr(modality, field) for field in wanted if field in modality.model_fields_set}
    # The short side is a choice: the crop is what has to fit.
    wrong = [f for f, value in given.items() if f != "short_side" and value is not None and not _same(value, wanted[f])]
    if wrong:
        raise SettingsError(
            "\n".join(f"modalities.{name}.{f} is {given[f]}, and {modality.encoder} wants {wanted[f]}." for f in wrong),
            "Leave it out: what the encoder wants is taken. If a preset sets it, say "
            + " ".join(f"--set modalities.{name}.{f}={json.dumps(wanted[f], separators=(',', ':'))}" for f in wrong),
        )
    filled = modality.model_copy(update={f: v for f, v in wanted.items() if given.get(f) is None})
    try:
        filled = type(modality).model_validate(filled.model_dump())
    except ValidationError as error:
        text = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise SettingsError(f"modalities.{name} with {modality.encoder}: {text}.", "Leave it out.") from error
    _check_reads(name, filled)
    return filled


def _check_reads(name: str, modality: Modality) -> None:
    """Let the encoder read a view in shape only: its owner's own checks come before anything is decoded."""
    (shape, dtype), *_ = modality.part_shapes()
    try:
        with torch.device("meta"):
            encoder = build_encoder(name, modality).eval()
    except (RuntimeError, ImportError, *FOREIGN) as error:
        text = f"{type(error).__name__}: {lines_of(error)[0][:200]}"
        raise SettingsError(
            f"modalities.{name}: {modality.encoder} cannot be built as its files say ({text}).", "Download them again."
        ) from error
    try:
        with torch.device("meta"):
            encoder((torch.empty((1, *shape), dtype=getattr(torch, dtype.name)),))
    except (RuntimeError, *FOREIGN) as error:
        text = lines_of(error)[0][:200]
        raise SettingsError(
            f"modalities.{name}: {modality.encoder} cannot read views of shape {list(shape)}: {text}",
            "Set the modality's frames, crop or samples as it wants them, or mend its files.",
        ) from error


def _same(given: object, wanted: object) -> bool:
    if isinstance(wanted, tuple):
        return all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(given, wanted, strict=True))
    return given == wanted


def _check_kind(name: str, modality: Modality) -> None:
    kinds = SCHEMES[modality.encoder.partition(":")[0]].kinds
    if modality.kind not in kinds:
        raise SettingsError(
            f"modalities.{name}.encoder: {modality.encoder} reads {' or '.join(kinds)}, and {name} is {modality.kind}.",
            "`mbcd list encoders` shows the choices.",
        )


def _registered(name: str, settings: Modality) -> StagedEncoder:
    """The encoder of a registry, ours or another package's."""
    entry = entry_of(settings.encoder, GROUP, ENCODERS, EncoderEntry)
    if entry is None:
        raise SettingsError(
            f"modalities.{name}.encoder: there is no encoder {settings.encoder!r}.",
            f"{did_you_mean(settings.encoder, encoder_names())}`mbcd list encoders` shows the choices.",
        )
    if entry.kind != settings.kind:
        raise SettingsError(
            f"modalities.{name}.encoder: {settings.encoder} reads {entry.kind}, and {name} is {settings.kind}.",
            "`mbcd list encoders` shows the choices.",
        )
    if isinstance(settings, ArrayModality) and settings.dimension is None:
        raise SettingsError(
            "The dimension of an array modality is not known.",
            "Set it with --set modalities.NAME.dimension=D; `mbcd prepare` reads it from the first file.",
        )
    return entry.build(settings)


def encoder_names() -> list[str]:
    """Names of all encoders: ours, then those of installed packages."""
    return list(dict.fromkeys([*ENCODERS, *plugins(GROUP)]))


def build_encoder(name: str, settings: Modality) -> StagedEncoder:
    """The encoder of modality `name`, randomly initialised (`pretrained` or its `EncoderFormat` loads weights).

    An `adapter` stage is appended when the cut asks for it.

    Raises:
        SettingsError: no such encoder, an encoder of another kind, no such stage to cut at, or an encoder from files
            that `described_encoders` has not seen.
    """
    form = format_of(settings)
    if form is not None and settings.encoder_config is None:
        raise SettingsError(
            f"modalities.{name}.encoder: nothing says what {settings.encoder} is like.",
            "Run `mbcd prepare`, which reads its files.",
        )
    encoder = _registered(name, settings) if form is None else form.build(settings)
    if settings.cut == "adapter":
        stages: dict[str, nn.Module] = dict(encoder.stages.items())
        stages["adapter"] = Adapter(encoder.dim)
        encoder = StagedEncoder(stages, dim=encoder.dim, recomputed=encoder.recomputed, wants=encoder.wants)
    if settings.cut not in encoder.names:
        raise SettingsError(
            f"modalities.{name}.cut: {settings.encoder} has no stage {settings.cut!r}.",
            f"Cut at one of: {', '.join(dict.fromkeys([*encoder.names, 'adapter']))}.",
        )
    return encoder


def cut_encoder(name: str, settings: Modality, *, live: bool = False, frozen: bool = False) -> tuple[Trunk, Tail]:
    """The encoder of modality `name`, cut as its settings say; an adapter's own encoder is built for a live trunk only.

    Args:
        live, frozen: as `StagedEncoder.cut`.

    Raises:
        SettingsError: as `build_encoder`.
    """
    form = format_of(settings)
    if form is not None and settings.cut == "adapter" and settings.encoder_config is not None and not live:
        dim = form.wants(settings).dim
        return StagedEncoder({"adapter": Adapter(dim)}, dim=dim).cut("adapter", frozen=frozen)
    return build_encoder(name, settings).cut(settings.cut, live=live, frozen=frozen)


def encoder_summaries() -> list[tuple[str, str, str]]:
    """(name, kinds of modality that it reads, what it is or what is wrong with it) of all encoders and formats."""
    entries = summaries_of(GROUP, ENCODERS, EncoderEntry)
    rows = [(name, "", e) if isinstance(e, str) else (name, e.kind, e.summary) for name, e in entries]
    return rows + [(f"{name}:{s.what}", ", ".join(s.kinds), s.summary) for name, s in SCHEMES.items()]
