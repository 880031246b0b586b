"""Encoders that come whole in one file: ONNX, TorchScript and torch.export (an `EncoderFormat`; docs/encoders.md).

Such a file does not tell what its input means. A TOML file beside it does (`FILE.toml`): the fields of `Wants`, and
in a table `front_end` those of `FrontEnd`. Nothing of the model trains: it is cut at `adapter`.

Letters: B clips, N rows (clips, frames or windows) that pass together, D features, P positions; axes as in `Wants`.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from torch import nn

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders.formats import EncoderFormat, behind_scheme, validated
from mbcd_cli.encoders.model_files import ModelFile, OnnxModel, TorchModel, external_files, shape_text
from mbcd_cli.encoders.staged import Normalise, StagedEncoder
from mbcd_cli.encoders.wants import FULL_SCALE, STRICTLY, RowLetters, Wants
from mbcd_cli.errors import CheckpointError, SettingsError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings import Count

_WANTS = TypeAdapter(Wants)
_NEEDED = {
    "video": ("size", "colour", "values", "mean", "std"),
    "audio": ("sample_rate", "samples", "values"),
    "array": (),
}
_HERE = {"video": "BCTHW", "audio": "BS", "array": "BTD"}
"""Axes of a batch of decoded views; a vector has no T."""
_SAME, _ALIKE = 1e-4, 1e-2
"""Of a clip's features' length, by which rounding may change them the next time, and beside another clip in float16."""
POOLINGS = ("mean", "max", "mean+max", "first")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEnd:
    """A model that runs before the model, such as a spectrogram; `scale` and `offset` are applied to what it gives.

    Attributes:
        file: beside the model's, in the same format.
        axes, gives: of its input and its output.
        window, step: the model takes so many of its steps (T) at once, every so many; all, where there is none.
    """

    __pydantic_config__ = STRICTLY

    file: Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")]
    axes: RowLetters = "BS"
    gives: Annotated[RowLetters, Field(pattern="T")] = "BTC"
    scale: float = 1.0
    offset: float = 0.0
    window: Count | None = None
    step: Count = 1


_FRONT_END = TypeAdapter(FrontEnd)


class WholeModelFormat(EncoderFormat):
    """A model in one file, and the TOML file beside it."""

    def describe(self, modality: Modality, weights_dir: Path) -> str:
        """`EncoderFormat.describe`: the wants that the TOML file beside the model tells."""
        file = _model_file(modality, weights_dir)
        beside = file.with_name(f"{file.name}.toml")
        try:
            told = tomllib.loads(beside.read_text(encoding="utf-8"))
        except FileNotFoundError:
            told = {}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{beside}: cannot be read: {error}.", "Mend it; docs/encoders.md shows one."
            ) from error
        kind = told.get("kind", modality.kind)
        needed = ["kind", "axes", *_NEEDED.get(str(kind), ()), "pooling", "dim"]
        if kind == "video" and not told.get("per_frame"):
            needed.append("frames")  # or per_frame = true
        if missing := [key for key in needed if key not in told]:
            raise CheckpointError(
                f"{beside}: says nothing of {', '.join(missing)}, and {file.name} does not tell what its input means.",
                f"Write {', '.join(f'{key} = ...' for key in missing)} there; docs/encoders.md shows such a file.",
            )
        _refuse_unknown(told, Wants, beside)
        front, remedy = told.pop("front_end", None), "docs/encoders.md shows such a file."
        if front is not None:
            _refuse_unknown(front, FrontEnd, beside)
            known = asdict(validated(_FRONT_END, front, beside, remedy))
            told |= {"front_end": known.pop("file"), "front_end_settings": tuple(known.items())}
        wants = validated(_WANTS, told, beside, remedy)
        for key in ("mean", "std"):
            value, channels = getattr(wants, key), 3 if wants.kind == "video" else 1
            if value is not None and len(value) != channels:
                raise CheckpointError(f"{beside}: {key} has {len(value)} values, and {wants.kind} {channels}.", remedy)
        if wants.pooling not in POOLINGS:
            raise CheckpointError(
                f"{beside}: there is no pooling {wants.pooling!r}.", f"Use one of {', '.join(POOLINGS)}."
            )
        return json.dumps(asdict(wants))

    def wants(self, modality: Modality) -> Wants:
        """`EncoderFormat.wants`."""
        return _WANTS.validate_json(modality.encoder_config)

    def files(self, modality: Modality, weights_dir: Path) -> list[Path]:
        """`EncoderFormat.files`: the model, its front end, and data that ONNX keeps beside either."""
        file, front = _model_file(modality, weights_dir), self.wants(modality).front_end
        named = [file] if front is None else [file, _there(file.with_name(front), modality)]
        onnx = modality.encoder.partition(":")[0] == "onnx"
        return named + (sorted({data for one in named for data in external_files(one)}) if onnx else [])

    def build(self, modality: Modality) -> StagedEncoder:
        """`EncoderFormat.build`."""
        wanted = self.wants(modality)
        if modality.cut not in ("pool", "adapter"):
            raise SettingsError(
                f"{modality.encoder}: nothing of a whole model trains, and the cut is {modality.cut}.",
                "Set modalities.NAME.cut = adapter.",
            )
        if getattr(modality, "frame_pooling", "mean") != "mean":
            raise SettingsError(
                f"{modality.encoder} does not read modalities.NAME.frame_pooling, which is {modality.frame_pooling}.",
                f"Leave it out, and set pooling in {Path(behind_scheme(modality)).name}.toml.",
            )
        normalise = Normalise(modality.mean, modality.std, dims=5) if wanted.kind == "video" else Scaled(wanted)
        stages = {"input": normalise, "model": WholeModel(wanted), "pool": nn.Identity()}
        return StagedEncoder(stages, dim=wanted.dim, wants=wanted)

    def load(self, encoder: StagedEncoder, modality: Modality, weights_dir: Path) -> None:
        """`EncoderFormat.load`; the model is tried with a view alone, and twice with two."""
        stage: WholeModel = encoder.stages["model"]
        file, wanted = _model_file(modality, weights_dir), stage.wants
        stage.model = _opened(modality, file)
        if wanted.front_end is not None:
            stage.front = _opened(modality, file.with_name(wanted.front_end))
        shape, _ = modality.part_shapes(test=True)[0]
        views = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        views[0] *= 0.2  # statistics of a batch are then those of neither
        views = encoder.stages["input"](views * FULL_SCALE if wanted.kind == "video" else views)
        with torch.no_grad():
            alone, both, again = stage.eval()(views[:1]), stage(views), stage(views)
        given = alone.shape[1]
        if _apart(again, both) > _SAME or _apart(both[:1], alone) > _ALIKE:
            raise CheckpointError(
                f"{file}: makes other features of a clip beside another, or each time: it was exported in train mode, "
                "or is quantised by what a batch holds.",
                "Export it after model.eval(), for quantised numbers with a first axis of 1.",
            )
        if given != wanted.dim:
            raise CheckpointError(
                f"{file}: makes {given} features a clip, pooled by {wanted.pooling}, and {file.name}.toml promises "
                f"{wanted.dim}.",
                f"Set dim = {given} there, or another pooling.",
            )


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


def _refuse_unknown(told: object, kinds: type, beside: Path) -> None:
    names = {field.name for field in fields(kinds)} - {"front_end_settings"}
    unknown = next((key for key in told if key not in names), None) if isinstance(told, dict) else None
    if unknown is not None:
        known = ", ".join(sorted(names))
        raise CheckpointError(
            f"{beside}: there is no {unknown!r}.", f"{did_you_mean(unknown, names)}There are {known}."
        )


def _model_file(modality: Modality, weights_dir: Path) -> Path:
    return _there(weights_dir / Path(behind_scheme(modality)).expanduser(), modality)


def _there(file: Path, modality: Modality) -> Path:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: the file of encoder {modality.encoder} is not there.",
            "Put it there, or name another folder with --weights-dir.",
        )
    return file


def _opened(modality: Modality, file: Path) -> ModelFile:
    form = modality.encoder.partition(":")[0]
    return OnnxModel(file) if form == "onnx" else TorchModel(file, exported=form == "export")


class Scaled(nn.Module):
    """Samples from -1 to 1, brought to the range that a model wants, and standardised where it wants that."""

    def __init__(self, wanted: Wants) -> None:
        super().__init__()
        low, high = wanted.values or (-1.0, 1.0)
        self.scale, self.offset = (high - low) / 2, (high + low) / 2
        self.mean, self.std = (wanted.mean or (0.0,))[0], (wanted.std or (1.0,))[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> the same."""
        return (x * self.scale + self.offset - self.mean) / self.std


class WholeModel(nn.Module):
    """A model with what stands around it: layout, front end, windows or frames one by one, pooling."""

    def __init__(self, wanted: Wants) -> None:
        super().__init__()
        self.wants = wanted
        self.model: ModelFile | None = None
        self.front: ModelFile | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decoded views, normalised, [B, ...] -> [B, dim]."""
        wanted = self.wants
        if x.is_meta:
            return x.new_empty((len(x), wanted.dim))
        if self.model is None:
            raise CheckpointError(
                "A model from a file has no random weights.", "Leave --random-weights out, and put the file there."
            )
        clips, axes = len(x), _HERE[wanted.kind]
        if wanted.kind == "audio":
            x = x.flatten(1)
        elif wanted.kind == "array" and x.dim() == 2:
            axes = "BD"
        if wanted.colour == "BGR":
            x = x.flip(1)
        if wanted.per_frame:
            x, axes = x.transpose(1, 2).flatten(0, 1), "BCHW"
        file = self.model.file
        if self.front is not None:
            front = FrontEnd(file=wanted.front_end, **dict(wanted.front_end_settings))
            x = self.front(_laid_out(x, axes, front.axes, file)) * front.scale + front.offset
            axes = front.gives
            if front.window is not None:
                x, axes = _windows(x, axes, front), axes
        out = self.model(_laid_out(x, axes, wanted.axes, file))
        return _pooled(_laid_out(out, wanted.gives, _features_last(wanted.gives), file), clips, wanted.pooling)


def _laid_out(x: torch.Tensor, axes: str, wanted: str, file: Path) -> torch.Tensor:
    """A tensor of some axes -> of others; axes that only one of them has are of length 1.

    Raises:
        CheckpointError: they are longer.
    """
    gone = [at for at, letter in enumerate(axes) if letter not in wanted]
    if x.dim() != len(axes) or any(x.shape[at] != 1 for at in gone):
        raise CheckpointError(
            f"{file}.toml: axes are said to be {axes}, of which {wanted} is to be made, and the shape is "
            f"{shape_text(x.shape)}.",
            "Mend axes or gives there.",
        )
    x, axes = x.squeeze(gone), "".join(letter for letter in axes if letter in wanted)
    x = x.permute([axes.index(letter) for letter in wanted if letter in axes])
    for at, letter in enumerate(wanted):
        x = x if letter in axes else x.unsqueeze(at)
    return x


def _features_last(axes: str) -> str:
    return axes.replace("D", "") + "D"


def _windows(x: torch.Tensor, axes: str, front: FrontEnd) -> torch.Tensor:
    """[B, ..., T, ...] -> [B K, ..., window, ...]: K windows of every clip, `step` apart."""
    at = axes.index("T")
    if x.shape[at] < front.window:
        raise CheckpointError(
            f"{front.file}: gives {x.shape[at]} steps of a clip, fewer than a window of {front.window}.",
            "Set a larger number of samples in the TOML file beside the model.",
        )
    return x.unfold(at, front.window, front.step).movedim(-1, at + 1).movedim(at, 1).flatten(0, 1)


def _pooled(out: torch.Tensor, clips: int, pooling: str) -> torch.Tensor:
    """[N, ..., D], N a multiple of the clips -> [B, D], or [B, 2 D]; the first position is that of every row."""
    rows = out.flatten(1, -2) if out.dim() > 2 else out.unsqueeze(1)  # [N, P, D]
    if pooling == "first":
        rows = rows[:, :1]
    rows = rows.unflatten(0, (clips, -1)).flatten(1, 2)
    pooled = {"mean": lambda: rows.mean(1), "first": lambda: rows.mean(1), "max": lambda: rows.amax(1)}
    return torch.cat([pooled[part]() for part in pooling.split("+")], dim=1)
