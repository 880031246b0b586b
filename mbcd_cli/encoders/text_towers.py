"""Text towers: what models of `hf:FOLDER` that saw texts with their views make of a text, in the space of both.

Letters: B clips, P prompts, D pooled features, E dimensions of the common space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders.transformers_families import FAMILIES, DescribedModel, TextSide, import_transformers, owner
from mbcd_cli.encoders.transformers_models import model_folder, quiet, read_model
from mbcd_cli.errors import FOREIGN, CheckpointError, SettingsError, lines_of

_TOGETHER = 128
"""Prompts that are embedded at once."""
_TOKENIZERS = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
"""Files that hold a tokenizer's words: without one transformers makes a tokenizer that knows none."""


@dataclass(frozen=True, slots=True)
class TextTower:
    """The half of a model that reads texts, and what brings the other's pooled features to them.

    Attributes:
        embeddings: of the prompts, [P, E] of length 1.
        projection: pooled features [B, D] -> [B, E].
        scale: that cosines are multiplied by to be the model's logits.
    """

    embeddings: torch.Tensor
    projection: nn.Module
    scale: float


def text_side(modality: Modality) -> TextSide | None:
    """What a modality's encoder has of a text tower; None where it has none."""
    if not modality.encoder.startswith("hf:") or modality.encoder_config is None:
        return None
    described = DescribedModel.from_json(modality.encoder_config)
    return described.family.text if described.pooling == described.family.pooling else None


def read_texts(
    name: str, modality: Modality, prompts: Sequence[str], *, weights_dir: Path, device: torch.device
) -> TextTower:
    """Embed P prompts with the model whose other half is the encoder of the modality `name`.

    Raises:
        SettingsError: the encoder is of no such model.
        CheckpointError: its folder lacks a text tower or a tokenizer, or they do not fit; a prompt is too long.
    """
    side = text_side(modality)
    if side is None:
        families = ", ".join(name for name, family in FAMILIES.items() if family.text is not None)
        raise SettingsError(
            f"modalities.{name}.encoder: {modality.encoder} has no text tower.",
            f"Prepare {name} with hf:FOLDER, a whole model of {families}.",
        )
    folder = model_folder(modality, weights_dir)
    if getattr(modality, "frame_pooling", "mean") != "mean":
        raise SettingsError(
            f"modalities.{name}.frame_pooling is {modality.frame_pooling}: texts are near means of frames only.",
            f"Prepare {name} with modalities.{name}.frame_pooling = mean.",
        )
    model, told = read_model(owner(side.model), folder)
    wrong = [*sorted(told["missing_keys"]), *sorted(key for key, *_ in told["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"{folder}: of a {side.model} its weights lack, or have in another shape, {len(wrong)} keys, the first "
            f"{wrong[0]}: there is no whole text tower.",
            "Put the weights of the whole model there, not those of its encoder alone.",
        )
    model = model.eval().requires_grad_(False).to(device)
    tokens = _tokens(folder, model.config.text_config, prompts, padding=side.padding)
    try:
        with torch.no_grad():
            parts = [model.get_text_features(**{k: v.to(device) for k, v in part.items()}) for part in tokens]
    except (RuntimeError, *FOREIGN) as error:
        text = lines_of(error)[0][:200]
        raise CheckpointError(
            f"{folder}: its text tower cannot read the prompts: {text}", "Put the files of one model there."
        ) from error
    features = torch.cat([getattr(part, "pooler_output", part) for part in parts])
    projection = attrgetter(side.projection)(model) if side.projection else nn.Identity()
    return TextTower(normalize(features.float()).cpu(), projection, float(attrgetter(side.scale)(model).exp()))


def _tokens(folder: Path, config: object, prompts: Sequence[str], *, padding: str) -> list[dict[str, torch.Tensor]]:
    """Prompts as the model's own tokenizer has them, some at a time.

    Raises:
        CheckpointError: there is no tokenizer, another model's, or a prompt that the model cannot take whole.
    """
    library = import_transformers()
    remedy = "Put the model's tokenizer.json and tokenizer_config.json there."
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{folder}: has no tokenizer.", remedy)
    try:
        with quiet(library):
            tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its own kinds, for every kind of tokenizer
        text = lines_of(error)[0][:200]
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({text}).", remedy) from error
    most = min(tokenizer.model_max_length, config.max_position_embeddings)
    for prompt in prompts:
        numbers = tokenizer(prompt)["input_ids"]
        if len(numbers) > most:
            raise CheckpointError(
                f"{folder}: takes {most} tokens, and the prompt {prompt[:60]!r} has {len(numbers)}.", "Shorten it."
            )
        if max(numbers, default=0) >= config.vocab_size:
            raise CheckpointError(
                f"{folder}: its tokenizer knows tokens that its model of {config.vocab_size} does not.",
                "Put the tokenizer of this model there.",
            )
    shape = {"padding": padding, "max_length": most} if padding == "max_length" else {"padding": True}
    parts = [
        tokenizer([*prompts[at : at + _TOGETHER]], return_tensors="pt", **shape)
        for at in range(0, len(prompts), _TOGETHER)
    ]
    return [{key: part[key] for key in ("input_ids", "attention_mask") if key in part} for part in parts]
