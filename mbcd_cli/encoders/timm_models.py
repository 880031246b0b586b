"""`timm:NAME`: image models of the package timm on every frame, with a weights file of the user's.

Vision transformers and EfficientNets can be cut at every block, others behind the whole model alone. Letters: B clips,
C channels, T frames, H W pixels, N tokens, D features; M = B T frames.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, TypeAdapter
from torch import nn

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders.formats import EncoderFormat, behind_scheme, import_optional, read_config, validated
from mbcd_cli.encoders.pretrained import differing_keys, find_weights, read_weights, refuse_keys
from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.encoders.tokens import Block, channels_first, over_time, pixels, single_frames, tokens_first
from mbcd_cli.encoders.wants import Wants
from mbcd_cli.errors import CheckpointError, lines_of
from mbcd_cli.naming import did_you_mean

_OF_PREPROCESSING = ("mean", "std", "input_size", "crop_pct", "classifier", "license", "tag")


_THREE = Field(min_length=3, max_length=3)


class _Preprocessing(BaseModel, strict=True):
    """What is read of `pretrained_cfg`; timm knows what is not told, or null."""

    input_size: Annotated[list[PositiveInt], _THREE] | None = None
    crop_pct: PositiveFloat | None = None
    mean: Annotated[list[float], _THREE] | None = None
    std: Annotated[list[PositiveFloat], _THREE] | None = None
    classifier: str | list[str] | None = None
    license: str | None = None
    tag: str | None = None


class _Config(BaseModel, strict=True):
    """What is read of the config.json beside weights of timm's."""

    architecture: str = ""
    pretrained_cfg: _Preprocessing = _Preprocessing()
    model_args: dict[str, object] | None = None


_CONFIG = TypeAdapter(_Config)


class TimmFormat(EncoderFormat):
    """A model by its name in timm, with a state dict in a file."""

    def describe(self, modality: Modality, weights_dir: Path) -> str:
        """what timm, or a config.json beside the weights, says of the model's preprocessing."""
        name, timm = behind_scheme(modality), _timm()
        if not timm.is_model(name):
            near = did_you_mean(name, timm.list_models())
            raise CheckpointError(f"timm has no model {name!r}.", f"{near}timm.list_models() names them.")
        try:
            told = timm.get_pretrained_cfg(name).to_dict()
        except RuntimeError as error:  # its tag is none of timm's
            raise CheckpointError(f"timm: {lines_of(error)[0]}", f"Say timm:{name.partition('.')[0]}.") from error
        beside = _beside(modality, weights_dir)
        if beside is not None:
            config = read_config(beside)
            validated(_CONFIG, config, beside, "Download it again.")
            if other := config.get("model_args"):
                raise CheckpointError(
                    f"{beside}: is of a model with other settings than timm's {name} ({', '.join(other)}).",
                    "Export it: an onnx or export file has them.",
                )
            there = config.get("architecture", name)
            if there.partition(".")[0] != name.partition(".")[0]:
                raise CheckpointError(f"{beside}: is of {there}, not of {name}.", f"Say encoder=timm:{there}.")
            told |= {key: value for key, value in config.get("pretrained_cfg", {}).items() if value is not None}
        side = told["input_size"][1]
        if side != told["input_size"][2]:
            raise CheckpointError(f"timm's {name} takes no square frames ({told['input_size']}).", "Take another.")
        with torch.device("meta"):
            model = _model(name)
        pooling = model.global_pool if isinstance(getattr(model, "global_pool", None), str) else "avg"
        described = {"name": name, "dim": model.num_features, "pooling": pooling}
        return json.dumps({key: told.get(key) for key in _OF_PREPROCESSING} | described, sort_keys=True)

    def wants(self, modality: Modality) -> Wants:
        """`EncoderFormat.wants`."""
        told = json.loads(modality.encoder_config)
        side = told["input_size"][1]
        return Wants(
            kind="video",
            axes="BCHW",
            per_frame=True,
            size=(side, side),
            short_side=int(side / (told["crop_pct"] or 1)),
            colour="RGB",
            values=(0.0, 1.0),
            mean=tuple(told["mean"]),
            std=tuple(told["std"]),
            pooling={"token": "first token", "map": "attention"}.get(told["pooling"], "mean"),
            dim=told["dim"],
            licence=told["license"],
            pretraining=_data(told["tag"] or ""),
        )

    def files(self, modality: Modality, weights_dir: Path) -> list[Path]:
        """`EncoderFormat.files`."""
        beside = _beside(modality, weights_dir)
        return [find_weights(modality.encoder, modality.weights, weights_dir), *([] if beside is None else [beside])]

    def build(self, modality: Modality) -> StagedEncoder:
        """`EncoderFormat.build`."""
        return _staged(_model(behind_scheme(modality)), modality)

    def load(self, encoder: StagedEncoder, modality: Modality, weights_dir: Path) -> None:
        """`EncoderFormat.load`."""
        file = find_weights(modality.encoder, modality.weights, weights_dir)
        model = _model(behind_scheme(modality))
        told, target = json.loads(modality.encoder_config), model.state_dict()
        classifier = told["classifier"] or ()
        heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
        state = {key: value for key, value in read_weights(file).items() if key in target or not key.startswith(heads)}
        remedy = f"Give the file that was published as {told['name']}."
        refuse_keys(differing_keys(state, target), file, modality.encoder, remedy)
        model.load_state_dict(state)
        encoder.stages.load_state_dict(_staged(model, modality).stages.state_dict(), strict=False, assign=True)


_DATA = {
    **{f"in{k}k": f"ImageNet-{k}k" for k in (1, 12, 21, 22)},
    "laion2b": "LAION-2B",
    "laion400m": "LAION-400M",
    "datacompxl": "DataComp-1B",
    "dfn2b": "DFN-2B",
    "dfn5b": "DFN-5B",
    "metaclip": "MetaCLIP's",
    "merged2b": "Merged-2B",
    "webli": "WebLI",
    "openai": "OpenAI's (unpublished)",
    "lvd142m": "LVD-142M",
    "inat21": "iNaturalist-2021",
    "ig1b": "Instagram-1B",
    "yfcc100m": "YFCC-100M",
}
"""Word of a tag of timm's -> the data that it means."""


def _data(tag: str) -> str | None:
    """What a tag says of the data that the weights were trained on, in order: augreg_in21k_ft_in1k."""
    return ", ".join(dict.fromkeys(_DATA[word] for word in tag.split("_") if word in _DATA)) or None


def _timm() -> ModuleType:
    return import_optional("timm", "timm")


def _model(name: str) -> nn.Module:
    return _timm().create_model(name, pretrained=False, num_classes=0)


def _beside(modality: Modality, weights_dir: Path) -> Path | None:
    """The config.json beside the weights, where there is one."""
    file = modality.weights and (weights_dir / modality.weights).with_name("config.json")
    return file if file and file.is_file() else None


class FrameWise(nn.Module):
    """A module that reads images, on every frame: [B, C, T, H, W] -> what it makes of one, channel-first.

    That is tokens [B, D, T, N], feature maps [B, D, T, H, W], or vectors [B, D, T].
    """

    def __init__(self, module: nn.Module, *, steps: Sequence[str] = ("forward",), tokens: bool = False) -> None:
        super().__init__()
        self.module, self.steps, self.tokens = module, tuple(steps), tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        clips = len(x)
        x = single_frames(x)
        for step in self.steps:
            x = getattr(self.module, step)(x)
        if self.tokens:
            return channels_first(x, clips)
        return x.unflatten(0, (clips, -1)).transpose(1, 2).contiguous()


class ImagePool(nn.Module):
    """What an image model makes of tokens [B, D, T, N] or maps [B, D, T, H, W] at its end, pooled over time: [B, D]."""

    def __init__(self, module: nn.Module, *, steps: Sequence[str], how: str) -> None:
        super().__init__()
        self.module, self.steps, self.how = module, tuple(steps), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        clips = len(x)
        x = tokens_first(x) if x.dim() == 4 else single_frames(x)
        for step in self.steps:
            x = getattr(self.module, step)(x)
        return over_time(x, clips, self.how)


_LAST = {"norm", "attn_pool", "fc_norm", "head_drop", "head", "conv_head", "bn2", "global_pool", "classifier"}


def _staged(model: nn.Module, modality: Modality) -> StagedEncoder:
    """The stages of a timm model; its parameters are theirs."""
    wanted = TimmFormat().wants(modality)
    vit = isinstance(model, _timm().models.VisionTransformer)
    stages: dict[str, nn.Module] = {"input": pixels(wanted)}
    if vit or isinstance(model, _timm().models.EfficientNet):
        first = _part(model, [name for name in model._modules if name not in {"blocks", *_LAST}])
        stages["patch"] = FrameWise(first, steps=("forward_features",), tokens=vit)
        stages |= {f"block{i}": Block(b) if vit else FrameWise(b) for i, b in enumerate(model.blocks)}
        last, steps = _part(model, _LAST), ("norm",) if vit else ("conv_head", "bn2")
        last._parameters = {}  # of the positions
        stages["pool"] = ImagePool(last, steps=(*steps, "forward_head"), how=modality.frame_pooling)
    else:
        stages["body"] = FrameWise(model)
        stages["pool"] = ImagePool(nn.Identity(), steps=(), how=modality.frame_pooling)
    return StagedEncoder(stages, dim=wanted.dim, wants=wanted)


def _part(model: nn.Module, kept: Iterable[str]) -> nn.Module:
    """The same model, of whose modules only those `kept` do anything."""
    part = copy.copy(model)
    part._modules = {name: m if name in kept or m is None else nn.Identity() for name, m in model._modules.items()}
    return part
