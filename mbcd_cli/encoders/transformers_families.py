"""Families of models of the package transformers: where their parts are, and what of them becomes which stage.

Letters: B clips, C channels, T frames, H W pixels, n samples, F mel bands, N tokens, D features.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from mbcd_cli.encoders.formats import import_optional
from mbcd_cli.encoders.front_ends import FBANK_FFT, KaldiFbank, LogMel, Standardise
from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.encoders.tokens import Block, Pooling, TokenPool, channels_first, pixels, single_frames
from mbcd_cli.encoders.wants import FULL_SCALE, Wants
from mbcd_cli.errors import CheckpointError, SettingsError, lines_of


@dataclass(frozen=True, slots=True)
class PoolingTask:
    """A class of models with a head that pools: where that and the base model are, and how it pools."""

    model: str
    base: str
    head: str
    pooling: Pooling


@dataclass(frozen=True, slots=True)
class TextSide:
    """A class of models that embed text and views in one space: what stands between pooled features and that space.

    Attributes:
        model: the class, which has `get_text_features`.
        projection: inside it, of pooled features [B, D] -> [B, E]; empty where they are there already.
        scale: inside it, the logarithm of what cosines are multiplied by to be logits.
        padding: of prompts, as the model was trained with.
    """

    model: str
    projection: str = ""
    scale: str = "logit_scale"
    padding: str = "longest"


@dataclass(frozen=True, slots=True)
class Family:
    """Where the parts of a family's models are.

    Attributes:
        kind: of modality.
        config: class of its configuration. model: class of the model.
        axes: of its input; `BCHW` encodes frames one by one.
        patch: what turns the input into tokens, in order, inside the model. patch_args: what the first takes besides.
        layers, norm: inside the model. layer_args: what layers take besides tokens.
        pooling: how its owner pools tokens.
        heads: pattern of keys in files that belong to what stands after the encoder, or beside it.
        nested: part of a file's configuration with that of this model.
        frames, side: fields of the configuration with the frames of a clip, and the pixels of a frame's side.
        any_size: positions are interpolated, so that frames may have another size.
        task: a published variant with a pooling of its own.
        text: the text tower beside it; None where a folder has none.
    """

    kind: str
    config: str
    model: str
    axes: str
    patch: tuple[str, ...]
    layers: str
    norm: str
    pooling: Pooling
    heads: str
    patch_args: tuple[object, ...] = ()
    layer_args: tuple[object, ...] = ()
    nested: str = ""
    frames: str = ""
    side: str = "image_size"
    any_size: bool = False
    task: PoolingTask | None = None
    text: TextSide | None = None


_SPEECH = Family(
    kind="audio",
    config="Wav2Vec2Config",
    model="Wav2Vec2Model",
    axes="BS",
    patch=("feature_extractor", "feature_projection", "encoder.pos_conv_embed"),
    layers="encoder.layers",
    norm="encoder.layer_norm",
    pooling="mean",
    heads="quantizer|project_hid|project_q|lm_head|projector|classifier|layer_weights|masked_spec_embed",
)
_CLIP = Family(
    kind="video",
    config="CLIPVisionConfig",
    model="CLIPVisionModel",
    axes="BCHW",
    patch=("embeddings", "pre_layrnorm"),
    layers="encoder.layers",
    layer_args=(None,),
    norm="post_layernorm",
    pooling="first",
    heads="text_model|text_projection|visual_projection|logit_scale|classifier",
    nested="vision_config",
    text=TextSide("CLIPModel", "visual_projection"),
)
_SIGLIP = replace(
    _CLIP,
    config="SiglipVisionConfig",
    model="SiglipVisionModel",
    patch=("embeddings",),
    pooling="head",
    heads="text_model|logit_scale|logit_bias|classifier",
    text=TextSide("SiglipModel", padding="max_length"),
)
_CLAP = Family(
    kind="audio",
    config="ClapAudioConfig",
    model="ClapAudioModelWithProjection",
    axes="BCTF",
    patch=("audio_model.audio_encoder",),
    layers="audio_model.audio_encoder.layers",
    norm="audio_model.audio_encoder.norm",
    pooling="mean",
    heads="text_model|text_projection|audio_projection|logit_scale_[at]",
    nested="audio_config",
    text=TextSide("ClapModel", "audio_projection", scale="logit_scale_a"),
)
FAMILIES: dict[str, Family] = {
    "videomae": Family(
        kind="video",
        config="VideoMAEConfig",
        model="VideoMAEModel",
        axes="BTCHW",
        patch=("embeddings",),
        patch_args=(None,),
        layers="encoder.layer",
        norm="layernorm",
        pooling="mean",
        heads="decoder|encoder_to_decoder|mask_token|classifier|position_embeddings",
        frames="num_frames",
        task=PoolingTask("VideoMAEForVideoClassification", "videomae", "fc_norm", "mean"),
    ),
    "vjepa2": Family(
        kind="video",
        config="VJEPA2Config",
        model="VJEPA2Model",
        axes="BTCHW",
        patch=("encoder.embeddings",),
        layers="encoder.layer",
        norm="encoder.layernorm",
        pooling="mean",
        heads="predictor|classifier",
        frames="frames_per_clip",
        side="crop_size",
        task=PoolingTask("VJEPA2ForVideoClassification", "vjepa2", "pooler", "head"),
    ),
    "audio-spectrogram-transformer": Family(
        kind="audio",
        config="ASTConfig",
        model="ASTModel",
        axes="BTF",
        patch=("embeddings",),
        layers="layers",
        norm="layernorm",
        pooling="first two",
        heads="classifier",
    ),
    "wav2vec2": _SPEECH,
    "hubert": replace(_SPEECH, config="HubertConfig", model="HubertModel"),
    "clap": _CLAP,
    "clap_audio_model": replace(_CLAP, nested="", text=None),
    "clip": _CLIP,
    "clip_vision_model": replace(_CLIP, nested="", text=None),
    "siglip": _SIGLIP,
    "siglip_vision_model": replace(_SIGLIP, nested="", text=None),
    "dinov2": replace(
        _CLIP,
        config="Dinov2Config",
        model="Dinov2Model",
        patch=("embeddings",),
        layers="encoder.layer",
        norm="layernorm",
        heads="classifier",
        nested="",
        any_size=True,
        layer_args=(),  # an attention mask is taken by later versions only
        text=None,
    ),
}
"""`model_type` of a config.json -> the family."""
_POOLINGS: dict[Pooling, str] = {
    "mean": "mean of tokens",
    "first": "first token",
    "first two": "mean of the first two tokens",
    "head": "attention",
}


def import_transformers() -> ModuleType:
    """The package, told to fetch nothing.

    Raises:
        SettingsError: it is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    return import_optional("transformers", "hf")


def owner(name: str) -> Any:
    """A class of transformers', which imports its modules when they are asked for."""
    library = import_transformers()
    try:
        return getattr(library, name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"transformers {library.__version__} has no usable {name}: {lines_of(error)[0]}",
            "`uv sync --group hf` installs a version that has one.",
        ) from error


@dataclass(frozen=True)
class DescribedModel:
    """What the files of a folder say of a model, without what no layer depends on; `encoder_config` is this as JSON.

    Attributes:
        model_type: a key of `FAMILIES`. architecture: the class whose weights the folder has.
        config: of the model. processor: of its preprocessing. licence, pretraining: as its card states them.
    """

    model_type: str
    architecture: str | None
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    licence: str | None
    pretraining: str | None

    @classmethod
    def from_json(cls, text: str) -> DescribedModel:
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """As text, the same for the same."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def family(self) -> Family:
        """Its family."""
        return FAMILIES[self.model_type]

    @cached_property
    def owner_config(self) -> Any:
        """The owner's configuration, with no dropout: what is trained of it follows its method alone.

        Raises:
            CheckpointError: it is none. SettingsError: transformers is not installed.
        """
        config_class = owner(self.family.config)
        try:
            config = config_class.from_dict(dict(self.config))
        except Exception as error:  # whatever the owner's checks raise
            told = " ".join(lines_of(error))
            raise CheckpointError(f"config.json: is no {self.family.config}: {told}", "Download it again.") from error
        for field, value in config.to_dict().items():
            if "drop" in field and isinstance(value, float):
                setattr(config, field, 0.0)
        return config

    @property
    def task(self) -> PoolingTask | None:
        """The family's task, where the weights are of it."""
        task = self.family.task
        # Without mean pooling VideoMAE's classifier reads the first token, and has no norm of its own.
        its = task is not None and self.architecture == task.model
        return task if its and getattr(self.owner_config, "use_mean_pooling", True) else None

    @property
    def owner_class(self) -> type[nn.Module]:
        """The owner's class."""
        return owner(self.task.model if self.task else self.family.model)

    @property
    def pooling(self) -> Pooling:
        """How tokens become one vector."""
        if self.task is not None:
            return self.task.pooling
        return self.family.pooling if getattr(self.owner_config, "vision_use_head", True) else "mean"

    def wants(self, *, folder: Path = Path()) -> Wants:
        """What the model wants of a view, and gives.

        Args:
            folder: named in messages.

        Raises:
            CheckpointError: its configurations contradict each other, or one lacks something.
        """
        family, processor = self.family, self.processor
        try:
            config = self.owner_config
        except CheckpointError as error:
            raise CheckpointError(f"{folder / error.message}", error.remedy) from error

        def told(key: str) -> Any:
            if processor.get(key) is None:
                raise CheckpointError(f"{folder}: its processor's configuration has no {key}.", "Download it again.")
            return processor[key]

        def same(key: str, field: str) -> Any:
            if told(key) != getattr(config, field):
                text = f"its processor's {key} is {told(key)}, and {field} of its config.json {getattr(config, field)}"
                raise CheckpointError(f"{folder}: {text}.", "Put the files of one model there.")
            return told(key)

        common = {
            "kind": family.kind,
            "axes": family.axes,
            "pooling": _POOLINGS[self.pooling],
            "dim": config.hidden_size,
            "licence": self.licence,
            "pretraining": self.pretraining,
        }
        if family.kind == "video":
            side, short = _sides(processor, folder)
            fits, patch = getattr(config, family.side), config.patch_size
            fits = fits[0] if isinstance(fits, list | tuple) else fits
            if side % patch if family.any_size else side != fits:
                text = (
                    f"its processor makes frames of {side} pixels, and its config.json wants {fits}, patches of {patch}"
                )
                raise CheckpointError(f"{folder}: {text}.", "Put the files of one model there.")
            scale = processor.get("rescale_factor") or 1 / FULL_SCALE
            normal = processor.get("do_normalize", True)
            return Wants(
                **common,
                frames=getattr(config, family.frames) if family.frames else None,
                per_frame=not family.frames,
                size=(side, side),
                short_side=short,
                colour="RGB",
                values=(0.0, FULL_SCALE * scale if processor.get("do_rescale", True) else float(FULL_SCALE)),
                mean=tuple(told("image_mean")) if normal else (0.0, 0.0, 0.0),
                std=tuple(told("image_std")) if normal else (1.0, 1.0, 1.0),
            )
        rate, samples, keys = told("sampling_rate"), None, ("do_normalize",)
        front_end = "waveform"
        if family.axes == "BTF":
            front_end, keys = "fbank", ("num_mel_bins", "max_length", "do_normalize")
            same("num_mel_bins", "num_mel_bins"), same("max_length", "max_length")
            keys += ("mean", "std") if told("do_normalize") else ()
        elif family.axes == "BCTF":
            front_end, samples = "log-mel", told("max_length_s") * rate
            keys = ("feature_size", "fft_window_size", "hop_length", "frequency_min", "frequency_max", "truncation")
            same("feature_size", "num_mel_bins")
            common["dim"] = config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1)
        return Wants(
            **common,
            sample_rate=rate,
            samples=samples,
            front_end=front_end,
            front_end_settings=tuple((key, told(key)) for key in keys),
        )

    def staged(self, model: nn.Module, *, over_time: str) -> StagedEncoder:
        """The stages of an owner's model: input, patch, block0 to the last, pool. Their parameters are the model's.

        Args:
            over_time: how frames that were encoded alone are pooled, mean or max.
        """
        family, config, task = self.family, self.owner_config, self.task
        base = attrgetter(task.base)(model) if task else model
        parts = [attrgetter(path)(base) for path in family.patch]
        layers, norm = attrgetter(family.layers)(base), attrgetter(family.norm)(base)
        head = attrgetter(task.head)(model) if task else getattr(base, "head", None)  # SigLIP's, where it has one
        wanted = self.wants()
        told = dict(wanted.front_end_settings)
        args = [family.layer_args] * len(layers)
        if wanted.front_end == "log-mel":
            entry: nn.Module = LogMel(_mel(wanted), hop=told["hop_length"])
            patch: nn.Module = SpectrogramPatch(parts[0])
            args = [(size,) for size in parts[0].input_resolutions]
        elif wanted.front_end == "waveform":
            entry = Standardise() if told["do_normalize"] else nn.Identity()
            last = getattr(config, "do_stable_layer_norm", False)  # else the norm comes before the layers
            patch = SpeechPatch(*parts, nn.Identity() if last else norm)
            norm = norm if last else None
        else:
            if wanted.front_end == "fbank":
                entry = KaldiFbank(_mel(wanted), frames=told["max_length"], mean=told.get("mean"), std=told.get("std"))
            else:
                entry = pixels(wanted)
            patch = TransformerPatch(parts, family.axes, *family.patch_args)
        return StagedEncoder(
            {
                "input": entry,
                "patch": patch,
                **{f"block{i}": Block(layer, *args[i]) for i, layer in enumerate(layers)},
                "pool": TokenPool(norm, self.pooling, head, over_time),
            },
            dim=wanted.dim,
            wants=wanted,
        )


def _sides(processor: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Pixels of the square crop and, before it, of a frame's short side, as an image processor is configured."""

    def square(value: object) -> int | None:
        sides = {*value.values()} - {None} if isinstance(value, dict) else {value}
        return sides.pop() if len(sides) == 1 and all(isinstance(side, int) for side in sides) else None

    if processor.get("do_resize") is False:
        text = "its processor resizes no frames (do_resize is false), so that nothing says how large they are to be"
        raise CheckpointError(f"{folder}: {text}.", "Write true there, or export the model.")
    short = square(size := processor.get("size"))
    side = square(processor.get("crop_size")) if processor.get("do_center_crop", "crop_size" in processor) else short
    if side is None or (short is None and size is not None):
        raise CheckpointError(
            f"{folder}: its processor's configuration has no square size of frames.", "Only square frames can be had."
        )
    return side, max(short or side, side)


def _mel(wanted: Wants) -> np.ndarray:
    """The owner's mel filters, [bins, bands]."""
    from transformers.audio_utils import mel_filter_bank

    told, rate = dict(wanted.front_end_settings), wanted.sample_rate
    if wanted.front_end == "fbank":
        kaldi = {"norm": None, "mel_scale": "kaldi", "triangularize_in_mel_space": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of AST's 128 bands falls between two bins, and is empty
            return mel_filter_bank(FBANK_FFT // 2 + 1, told["num_mel_bins"], 20, rate // 2, rate, **kaldi)
    fused = told["truncation"] == "fusion"
    scale = {"norm": None, "mel_scale": "htk"} if fused else {"norm": "slaney", "mel_scale": "slaney"}
    ends = told["frequency_min"], told["frequency_max"]
    return mel_filter_bank(told["fft_window_size"] // 2 + 1, told["feature_size"], *ends, rate, **scale)


class TransformerPatch(nn.Module):
    """Input to tokens: [B, C, T, H, W] or a filter bank [B, 1, T, F] -> [B, D, N], of single frames [B, D, T, N]."""

    def __init__(self, modules: Sequence[nn.Module], axes: str, *args: object) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.axes, self.args = axes, args

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        clips = len(x) if self.axes == "BCHW" else None
        x = {"BTCHW": lambda: x.transpose(1, 2), "BCHW": lambda: single_frames(x), "BTF": lambda: x[:, 0]}[self.axes]()
        first, *others = self.parts
        x = first(x, *self.args)
        for module in others:
            x = module(x)
        return channels_first(x, clips)


class SpeechPatch(nn.Module):
    """wav2vec 2 and HuBERT before their layers: samples [B, 1, n] -> [B, D, N]."""

    def __init__(self, features: nn.Module, projection: nn.Module, positions: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.features, self.projection, self.positions, self.norm = features, projection, positions, norm
        features._requires_grad = False  # it would mark its input, which only their checkpointing needs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, n] -> [B, D, N]."""
        tokens = self.projection(self.features(x[:, 0]).transpose(1, 2))
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return channels_first(self.norm(tokens + self.positions(tokens)))


class SpectrogramPatch(nn.Module):
    """CLAP before its layers: a log-mel spectrogram [B, 1, T, F] -> [B, D, N]. A clip is never longer than a window."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.norm, self.patch = encoder.batch_norm, encoder.patch_embed
        shape = SimpleNamespace(spec_size=encoder.spec_size, freq_ratio=encoder.freq_ratio)
        self.as_image = partial(type(encoder).reshape_mel2img, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, T, F] -> [B, D, N]."""
        return channels_first(self.patch(self.as_image(self.norm(x.transpose(1, 3)).transpose(1, 3)), []))
