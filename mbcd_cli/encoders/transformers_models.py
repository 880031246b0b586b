"""`hf:FOLDER`: models of the package transformers from a local folder, with its configuration and safetensors.

Nothing is fetched, and no code of a folder's is run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, TypeAdapter
from torch import nn

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders.formats import EncoderFormat, behind_scheme, read_config, validated
from mbcd_cli.encoders.pretrained import refuse_keys
from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.encoders.transformers_families import FAMILIES, DescribedModel, import_transformers
from mbcd_cli.encoders.wants import Wants
from mbcd_cli.errors import FOREIGN, CheckpointError, lines_of

_CONFIG, _WHOLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
_PARTS = ("video_processor", "image_processor", "feature_extractor")  # of a processor_config.json
_OF_LABELS = ("id2label", "label2id", "text_config", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
_OF_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""How it is computed: a repository's name there has transformers fetch that and run its code."""

_THREE = Field(min_length=3, max_length=3)


class _Processor(BaseModel, strict=True):
    """What is read of a processor's configuration; what is not told, or null, is asked for where it is needed."""

    size: dict[str, int | None] | int | None = None
    crop_size: dict[str, int | None] | int | None = None
    do_resize: bool | None = None
    do_center_crop: bool | None = None
    do_normalize: bool | None = None
    do_rescale: bool | None = None
    rescale_factor: PositiveFloat | None = None
    image_mean: Annotated[list[float], _THREE] | None = None
    image_std: Annotated[list[PositiveFloat], _THREE] | None = None
    sampling_rate: PositiveInt | None = None
    max_length: PositiveInt | None = None
    max_length_s: PositiveInt | None = None
    num_mel_bins: PositiveInt | None = None
    mean: float | None = None
    std: PositiveFloat | None = None
    feature_size: PositiveInt | None = None
    fft_window_size: PositiveInt | None = None
    hop_length: PositiveInt | None = None
    frequency_min: float | None = None
    frequency_max: PositiveFloat | None = None
    truncation: str | None = None


_PROCESSOR = TypeAdapter(_Processor)


class TransformersFormat(EncoderFormat):
    """A folder with config.json, the processor's configuration and safetensors."""

    def describe(self, modality: Modality, weights_dir: Path) -> str:
        """The folder's configurations, without what no layer depends on."""
        folder = model_folder(modality, weights_dir)
        config = read_config(folder / _CONFIG)
        model_type = config.get("model_type")
        code = sorted(path.name for path in folder.glob("*.py"))
        if "auto_map" in config or code:
            raise _asks_for_code(folder / _CONFIG, code)
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise CheckpointError(
                f"{folder / _CONFIG}: its model_type is {model_type!r}.", f"Known are {_families()}; export others."
            )
        if "quantization_config" in config or (folder / "adapter_config.json").exists():
            held = "weights that are quantised" if "quantization_config" in config else "an adapter beside its weights"
            raise CheckpointError(f"{folder}: has {held}.", "Put the plain, merged model there.")
        family = FAMILIES[model_type]
        inner = config.get(family.nested) if family.nested else config
        if not isinstance(inner, dict):
            raise CheckpointError(f"{folder / _CONFIG}: has no {family.nested}.", "Download the folder again.")
        file = next((folder / name for name in _PROCESSORS if (folder / name).is_file()), None)
        if file is None:
            raise CheckpointError(
                f"{folder}: has no {_PROCESSORS[1]}, so that nothing says how its input is scaled.",
                "Put the one that was published with the weights beside them.",
            )
        processor = read_config(file)
        processor = next((processor[part] for part in _PARTS if isinstance(processor.get(part), dict)), processor)
        if "auto_map" in processor:
            raise _asks_for_code(file, [])
        validated(_PROCESSOR, processor, file, "Download it again.")
        architectures = config.get("architectures")
        described = DescribedModel(
            model_type=model_type,
            architecture=architectures[0] if isinstance(architectures, list) and architectures else None,
            config={key: value for key, value in _without_code(inner).items() if key not in _OF_LABELS},
            processor=processor,
            **_card(folder),
        )
        try:
            described.wants(folder=folder)
        except FOREIGN as error:
            text = f"its configurations are not those of a {model_type} ({type(error).__name__}: {error})"
            raise CheckpointError(f"{folder}: {text}.", "Download the folder again.") from error
        return described.to_json()

    def wants(self, modality: Modality) -> Wants:
        """`EncoderFormat.wants`."""
        return DescribedModel.from_json(modality.encoder_config).wants()

    def files(self, modality: Modality, weights_dir: Path) -> list[Path]:
        """Weights, and the configurations that they are read with."""
        folder = model_folder(modality, weights_dir)
        weights = _weights(folder)
        if not weights:
            raise CheckpointError(
                f"{folder}: has no {_WHOLE}.", "Put the weights there; --random-weights does without."
            )
        described = [folder / name for name in (_CONFIG, *_PROCESSORS, _INDEX)]
        return [*weights, *(file for file in described if file.is_file())]

    def build(self, modality: Modality) -> StagedEncoder:
        """Stages input, patch, block0 to the last, pool."""
        described = DescribedModel.from_json(modality.encoder_config)
        return _stages(described, described.owner_class(described.owner_config), modality)

    def load(self, encoder: StagedEncoder, modality: Modality, weights_dir: Path) -> None:
        """`EncoderFormat.load`, as transformers reads files: older names of keys are known to it."""
        folder = model_folder(modality, weights_dir)
        described = DescribedModel.from_json(modality.encoder_config)
        check_safetensors(self.files(modality, weights_dir))
        model, told = read_model(described.owner_class, folder, config=described.owner_config)
        filled = _stages(described, model, modality).stages
        ours = {id(value) for value in filled.state_dict(keep_vars=True).values()}
        needed = {key for key, value in model.state_dict(keep_vars=True).items() if id(value) in ours}
        beside = re.compile(rf"(\w+\.)?({described.family.heads})\b")
        problems = [f"missing {key}" for key in sorted(told["missing_keys"]) if key in needed]
        problems += [f"unexpected {key}" for key in sorted(told["unexpected_keys"]) if not beside.match(key)]
        problems += [
            f"shape of {key}: {tuple(there)} in the file, {tuple(here)} in the encoder"
            for key, there, here in sorted(told["mismatched_keys"])
            if key in needed
        ]
        remedy = "Put the weights and the config.json of one model there."
        refuse_keys(problems, folder, described.model_type, remedy)
        encoder.stages.load_state_dict(filled.state_dict(), strict=False, assign=True)


def _weights(folder: Path) -> list[Path]:
    """The files of weights that transformers reads: one, the shards of an index, or the older pickle."""
    if (whole := folder / _WHOLE).is_file():
        return [whole]
    if (folder / _INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    return sorted(folder.glob("pytorch_model.bin"))


def check_safetensors(files: Sequence[Path]) -> None:
    """Refuse safetensors that are damaged, by name: what transformers says of them names none.

    Raises:
        CheckpointError: one cannot be read.
    """
    import_transformers()
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: cannot be read ({lines_of(error)[0]}); it has {file.stat().st_size:,} bytes.",
                    "Download it again; what Git LFS left in its place has a few hundred: `git lfs pull` fetches it.",
                ) from error


def read_model(
    owner_class: type[nn.Module], folder: Path, *, config: object = None
) -> tuple[nn.Module, dict[str, Collection]]:
    """A model with the weights of a folder, float32, and what transformers tells of keys that did not fit.

    Args:
        config: instead of the folder's.

    Raises:
        CheckpointError: they cannot be read.
    """
    told = read_config(folder / _CONFIG) if config is None else {}
    try:
        with quiet(import_transformers()):
            return owner_class.from_pretrained(
                folder,
                config=owner_class.config_class.from_dict(_without_code(told)) if config is None else config,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # safetensors, pickle and transformers have their own for damaged files
        text = lines_of(error)[0][:200]
        raise CheckpointError(
            f"{folder}: its weights cannot be read ({type(error).__name__}: {text}).", "Download the folder again."
        ) from error


def _stages(described: DescribedModel, model: nn.Module, modality: Modality) -> StagedEncoder:
    return described.staged(model, over_time=getattr(modality, "frame_pooling", "mean"))


def model_folder(modality: Modality, weights_dir: Path) -> Path:
    """The folder of an encoder `hf:FOLDER`.

    Raises:
        CheckpointError: it is none of a model's, or weights are named besides.
    """
    folder = weights_dir / Path(behind_scheme(modality)).expanduser()
    if modality.weights is not None:
        raise CheckpointError(
            f"{modality.encoder}: its folder has the weights, and modalities.NAME.weights names {modality.weights}.",
            "Leave weights out.",
        )
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: there is no {_CONFIG}.",
            "Give the folder that holds a model's config.json and safetensors; --weights-dir is where it begins.",
        )
    return folder


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _OF_ATTENTION
    }


def _asks_for_code(file: Path, code: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{file}: asks for code of its own ({', '.join(code) or 'auto_map'}), which is never run.",
        f"Take a model of {_families()}, or export this one: an onnx or torchscript file brings no code.",
    )


def _families() -> str:
    return ", ".join(name for name in FAMILIES if not name.endswith("_model"))


def _card(folder: Path) -> dict[str, str | None]:
    """Licence, and the data of the pretraining, as the head of the model's card states them."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    told = head[1] if head else ""
    licence = re.search(r"^license: *(\S+)", told, re.MULTILINE)
    data = re.search(r"^datasets:(.*(?:\n *- *.*)*)", told, re.MULTILINE)
    names = re.findall(r"[^\s,\[\]'\"]+", re.sub(r"^ *- ", " ", data[1], flags=re.MULTILINE)) if data else []
    return {"licence": licence and licence[1], "pretraining": ", ".join(names) or None}


@contextmanager
def quiet(library: ModuleType) -> Iterator[None]:
    """No reports of transformers' own: what is wrong with the keys is told as an error."""
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
