"""`mbcd zero-shot`: clips of each domain classified by a model that saw texts with its views; nothing is trained.

Each target is a folder beside the runs, with results that `mbcd evaluate --runs` takes: a row marked as zero-shot.

Letters: B clips, P prompts, C classes, D pooled features, E dimensions of the space of texts and views.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tomli_w
import torch
from pydantic import BeforeValidator, Field, ValidationError, field_validator
from torch import nn
from torch.nn.functional import normalize

from mbcd_cli import checksums
from mbcd_cli.data.dataset import CachedDataset, open_dataset
from mbcd_cli.data.readers import narrations_of
from mbcd_cli.encoders.formats import behind_scheme
from mbcd_cli.encoders.text_towers import read_texts, text_side
from mbcd_cli.errors import CheckpointError, MbcdError, SettingsError
from mbcd_cli.evaluation.evaluator import Evaluated
from mbcd_cli.evaluation.report.comparison import Comparison
from mbcd_cli.evaluation.report.evaluated import ZERO_SHOT
from mbcd_cli.evaluation.report.results import Results, pretraining_words, results_of
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.files import append_record, give_place, read_records, write_json, write_text
from mbcd_cli.json_values import json_values
from mbcd_cli.ledger import revealed_by
from mbcd_cli.locks import folder_aside
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.naming import did_you_mean
from mbcd_cli.preparation.trunk import weights_file
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.folder import DONE, SEALED, SETTINGS
from mbcd_cli.runs.names import PROMPTS
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import SOURCE, TARGET, clip_sets
from mbcd_cli.scoring.metrics import figures_of_heads
from mbcd_cli.scoring.predictions import predict
from mbcd_cli.scoring.unlabelled import said_classes
from mbcd_cli.settings import Settings
from mbcd_cli.settings.roles import Slice
from mbcd_cli.settings.sources import Layer, read_toml, to_toml

Over = Literal["max", "mean"]
NARRATIONS = "narrations"
"""In place of a file of prompts: what the reader's tables say of the sources' training clips."""
_PRETRAINED = "pretrained"
"""What stands in results for the checkpoint."""
_RESULTS = "results.json"


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Prompts(Slice):
    """What is said of each class: the file that `--prompts` names.

    Attributes:
        prompts: class -> its texts. templates: what each text is put into, at `{}`.
        over: a class is as near as its nearest text (max), or as the mean of its texts' unit vectors.
        source: what they are called in tables: a digest of them, or `NARRATIONS`.
    """

    prompts: dict[str, Annotated[tuple[str, ...], BeforeValidator(_texts)]]
    templates: Annotated[tuple[str, ...], BeforeValidator(_texts), Field(min_length=1)] = ("{}",)
    over: Over = "max"
    source: str = ""

    @field_validator("prompts")
    @classmethod
    def _said(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if bare := [name for name, texts in value.items() if not texts or not all(map(str.strip, texts))]:
            raise ValueError(f"nothing is said of {', '.join(bare)}: write a text or more for each class")
        if odd := [name for name, texts in value.items() if any("{}" in text for text in texts)]:
            raise ValueError(f"{{}} in a text of {', '.join(odd)}: it belongs into templates")
        return value

    @field_validator("templates")
    @classmethod
    def _places(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if odd := [text for text in value if "{}" not in text]:
            raise ValueError(f"no {{}} in {odd[0]!r}, where a class's text is to stand")
        return value

    def of_class(self, name: str) -> list[str]:
        """All that is said of a class."""
        return [template.replace("{}", text) for template in self.templates for text in self.prompts[name]]


def read_prompts(path: Path, *, over: Over | None = None) -> Prompts:
    """The prompts of a TOML file.

    Args:
        over: in place of the file's.

    Raises:
        SettingsError: it cannot be read, or is none of prompts.
    """
    told = read_toml(path, "prompts file") | ({} if over is None else {"over": over})
    try:
        read = Prompts.model_validate(told)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise SettingsError(
            f"prompts file {path}: {'; '.join(lines)}.", "docs/evaluation.md shows such a file (section Zero-shot)."
        ) from error
    text = json.dumps([read.prompts, read.templates], sort_keys=True)
    return read.model_copy(update={"source": read.source or hashlib.sha256(text.encode()).hexdigest()[:8]})


def check_classes(prompts: Prompts, label_names: Sequence[str], *, path: Path | str) -> None:
    """Refuse prompts of other classes than a dataset's.

    Raises:
        SettingsError: naming those that are missing, and those that it does not have.
    """
    missing = [name for name in label_names if name not in prompts.prompts]
    unknown = [name for name in prompts.prompts if name not in label_names]
    faults = [f"says nothing of {', '.join(missing)}"] * bool(missing)
    faults += [f"speaks of {', '.join(unknown)}, of which the dataset has none"] * bool(unknown)
    if faults:
        near = did_you_mean(unknown[0], missing) if unknown and missing else ""
        raise SettingsError(
            f"prompts file {path} {', and '.join(faults)}.", f"{near}The classes are {', '.join(label_names)}."
        )


class TextHead(nn.Module):
    """Pooled features [B, D] -> logits [B, C]: the scaled cosine of their projection with each class's texts.

    Args:
        texts: unit vectors [E] of the texts, class by class. projection: [B, D] -> [B, E]. scale: of the cosine.
        over: the largest of a class's cosines, or that with the mean of its texts, made a unit vector again.
    """

    def __init__(self, texts: Sequence[torch.Tensor], *, projection: nn.Module, scale: float, over: Over) -> None:
        super().__init__()
        if over == "mean":
            texts = [normalize(of_class.mean(0, keepdim=True)) for of_class in texts]
        self.projection, self.scale, self.counts = projection, scale, [len(of_class) for of_class in texts]
        self.register_buffer("texts", torch.cat([*texts]))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, C]."""
        cosines = normalize(self.projection(features)) @ self.texts.T
        return self.scale * torch.stack([of_class.amax(1) for of_class in cosines.split(self.counts, dim=1)], dim=1)


def text_head(
    settings: Settings, dataset: CachedDataset, name: str, prompts: Prompts, *, device: torch.device
) -> TextHead:
    """The head that tells the classes of a prepared dataset by prompts, from the pooled features of a modality.

    Raises:
        SettingsError: its encoder has no text tower. CheckpointError: the folder's files are damaged, lack something,
            or are not those that the dataset was prepared with.
    """
    modality, said = dataset.modalities[name], [prompts.of_class(label) for label in dataset.label_names]
    tower = read_texts(
        *(name, modality, [text for of_class in said for text in of_class]),
        weights_dir=settings.cache.weights_dir,
        device=device,
    )
    found = weights_file(settings, modality.model_copy(update={"weights_sha256": None}))
    if found is None or found.sha256 != dataset.caches[name].recipe.get("weights"):
        raise CheckpointError(
            f"{settings.cache.weights_dir / behind_scheme(modality)}: is not what {name} of {dataset.name} was "
            "prepared with: its texts would be in another space.",
            "Bring those files back, or run `mbcd prepare` with these.",
        )
    texts = tower.embeddings.split([len(of_class) for of_class in said])
    return TextHead(texts, projection=tower.projection, scale=tower.scale, over=prompts.over)


def zero_shot_model(
    settings: Settings, dataset: CachedDataset, prompts: Prompts, *, device: torch.device
) -> MultiModalModel:
    """A prepared modality's encoder as it is, with a `text_head` for its own and for the fused head.

    Raises:
        what `text_head` raises.
    """
    (name,) = dataset.modalities
    head = text_head(settings, dataset, name, prompts, device=device)
    plain = {"norm": "none", "tails": "frozen", "feature_dropout": 0.0}
    model = build_model(
        dataset.modalities,
        settings=settings.model.model_copy(update=plain),
        classes=dataset.classes,
        live_trunks=settings.cache.live_trunks,
        tail_weights=dataset.tail_weights,
        trunk_weights=dataset.trunk_weights if settings.cache.live_trunks else None,
    )
    model.fused_head = model.heads[name] = head
    return model.to(device).requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Classified:
    """A target classified.

    Attributes:
        results: without the target's where it is sealed. said: the classes that were said of the target.
    """

    results: Results
    said: dict[str, object]


def classify(
    settings: Settings, dataset: CachedDataset, prompts: Prompts, *, device: torch.device, say: Say = SILENT
) -> Classified:
    """Classify the clips that `evaluate` tests by the prompts; no label of a sealed target is read.

    Args:
        settings: with one modality, sources and target resolved against the dataset.

    Raises:
        what `text_head` and `clip_sets` raise.
    """
    (name,) = dataset.modalities
    model = zero_shot_model(settings, dataset, prompts, device=device)
    evaluated: list[Evaluated] = []
    said: dict[str, object] = {}
    for clip_set in clip_sets(settings, dataset):
        batches = dataset.batches(clip_set.clips, batch_size=settings.evaluation.batch_size, training=False)
        told = predict(model, say.over(batches, f"{', '.join(clip_set.domains)}, batches"), device=device)
        if clip_set.name == TARGET:
            said = said_classes(told)
        if clip_set.sealed:
            continue
        names = {"label_names": list(dataset.label_names), "domain_names": list(dataset.domains)}
        figures = figures_of_heads(told, **names, k=settings.evaluation.top_k)
        evaluated.append(Evaluated(_PRETRAINED, ZERO_SHOT, clip_set, told, figures))
    if not evaluated:
        raise MbcdError(
            "The sources have no clips to test, and the target is sealed (dataset.seal_target).",
            "Prepare held-out clips of the sources.",
        )
    chosen = (_PRETRAINED, ZERO_SHOT)
    results = results_of(settings, dataset, {}, evaluated, deployed=chosen, device=device)
    results.method = f"{ZERO_SHOT} {_encoder(settings, name)} ({name}, {prompts.over})"
    # Nothing else of the tree has a part in it.
    results.settings = {"prompts": prompts.source, "dataset.target_split": settings.dataset.target_split}
    results.provenance[f"{_PRETRAINED} weights, sha256"] = str(dataset.caches[name].recipe.get("weights"))
    return Classified(results, said)


def _encoder(settings: Settings, name: str) -> str:
    return Path(behind_scheme(settings.modalities[name])).name


def zero_shot(
    settings: Settings, *, prompts: str, over: Over | None = None, runs_dir: Path = Path("runs"), say: Say = SILENT
) -> Comparison:
    """Classify each domain as a target by its own, by every modality whose encoder has a text tower; write the rows.

    Args:
        settings: name a prepared dataset; `model.modalities`, `training.target_domain` choose of it.
        prompts: a TOML file, or `NARRATIONS`.
        over: in place of the file's.

    Raises:
        SettingsError: prompts that do not fit; no modality with a text tower; no target. And what `classify` raises.
    """
    device = configure(settings.runtime)
    named = str(settings.dataset.name)
    whole = open_dataset(settings, name=named, modalities=settings.model.modalities)
    asked, sources = settings.training.target_domain, settings.training.source_domains
    targets = [asked] if asked else [d for d in settings.dataset.domains or whole.domains if d not in sources]
    if not targets:
        raise SettingsError(
            f"All domains of {named} are sources: there is no target to classify.", "Leave out training.source_domains."
        )
    file = None if prompts == NARRATIONS else read_prompts(Path(prompts), over=over)
    done: list[tuple[Path, Classified]] = []
    for name in settings.model.modalities or _with_texts(whole):
        dataset = open_dataset(settings, name=named, modalities=(name,))
        for domain in targets:
            training = settings.training.model_copy(update={"target_domain": domain})
            of_target, _ = open_for_training(settings.model_copy(update={"training": training}), dataset)
            used = file or narrated(of_target, over=over or "max")
            check_classes(used, dataset.label_names, path=prompts)
            done.append(_written(of_target, dataset, used, runs_dir / named, device=device, say=say))
    files = {folder.name: folder / _RESULTS for folder, _ in done}
    warnings = [text for _, classified in done for text in classified.results.warnings]
    return Comparison([folder for folder, _ in done], warnings, [_table(done, named)], files)


def _with_texts(dataset: CachedDataset) -> list[str]:
    """The modalities whose encoders have a text tower; the first one where there is none, to be told so."""
    return [name for name, modality in dataset.modalities.items() if text_side(modality)] or [*dataset.modalities][:1]


def narrated(settings: Settings, *, over: Over) -> Prompts:
    """Narrations as prompts: those of the sources' training clips; the target's are never opened.

    Raises:
        SettingsError: the dataset's reader has none. ManifestError: tables that are missing, or wrong.
    """
    texts = narrations_of(settings.dataset, settings.training.source_domains)
    return Prompts(prompts=dict(texts), over=over, source=NARRATIONS)


def _written(
    settings: Settings, dataset: CachedDataset, prompts: Prompts, runs: Path, *, device: torch.device, say: Say
) -> tuple[Path, Classified]:
    """Classify one target, and write its folder: one of a name for a target, sources, cache and prompts."""
    (name,) = dataset.modalities
    training = settings.training
    domains = sorted({*training.source_domains, str(training.target_domain)})  # most often those of every target
    told = [prompts.model_dump(mode="json"), dataset.fingerprints[name], domains]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    words = (_encoder(settings, name), prompts.over, name, training.target_domain, digest)
    folder = runs / "-".join((ZERO_SHOT, *map(str, words)))
    opened = _opened(settings, folder)
    with folder_aside(folder) as aside:  # before the work: it tells whether there is a place
        classified = classify(opened, dataset, prompts, device=device, say=say)
        files = [write_text(aside / SETTINGS, to_toml(settings, stamped=True))]
        text = tomli_w.dumps(prompts.model_dump(mode="json")) + f"\n# {checksums.PLACE}\n"
        files.append(write_text(aside / PROMPTS, text))
        if settings.dataset.seal_target:
            append_record(aside / SEALED, {"epoch": 0, ZERO_SHOT: classified.said}, place="--runs-dir", then="again")
            files.append(aside / SEALED)
        files.append(write_json(aside / _RESULTS, {**json_values(classified.results), "files": {}}))
        sums = {file.name: checksums.of_file(file) for file in files if file.name != _RESULTS}
        files.append(write_json(aside / DONE, {"files": sums}))
        give_place(aside, folder, [file.name for file in files], earlier=[folder / _RESULTS])
    return folder, classified


def _opened(settings: Settings, folder: Path) -> Settings:
    """`settings` of a target that is not sealed any more, where it was revealed."""
    if not revealed_by(folder):
        return settings
    return settings.model_copy(update={"dataset": settings.dataset.model_copy(update={"seal_target": False})})


def reopened(run: Path, flags: Mapping[str, object]) -> tuple[Settings, CachedDataset]:
    """Settings of a zero-shot folder, and its dataset; its target is not sealed any more once it was revealed.

    Raises:
        CacheError: its dataset is not prepared here.
    """
    saved = Layer(f"{run / SETTINGS}", read_toml(run / SETTINGS, "settings file"))
    settings = resolve(base=saved, environ=os.environ, flags=flags)
    settings = _opened(settings, run)
    return settings, open_dataset(settings, name=str(settings.dataset.name), modalities=settings.model.modalities)


def classify_again(run: Path, flags: Mapping[str, object]) -> Results:
    """Classify the clips of a zero-shot folder that was revealed, and write the results with the target's.

    Raises:
        CheckpointError: other classes are said than before; and what `classify` raises.
    """
    settings, dataset = reopened(run, flags)
    prompts = read_prompts(run / PROMPTS)
    device = configure(settings.runtime)
    now = classify(settings, dataset, prompts, device=device)
    if read_records(run / SEALED)[-1][ZERO_SHOT] != now.said:
        raise CheckpointError(
            f"{run}: other classes are said now than while its target was sealed.",
            "Bring back the device, the cache and the encoder's folder of then.",
        )
    write_json(run / _RESULTS, {**json_values(now.results), "files": {}})
    return now.results


def _table(done: Sequence[tuple[Path, Classified]], dataset: str) -> Table:
    """A row per modality and target, and of several their means."""
    results = [classified.results for _, classified in done]
    clip_set = TARGET if all(one.headline.clips == TARGET for one in results) else SOURCE
    rows: list[list[str | Score]] = []
    for method in dict.fromkeys(one.method for one in results):
        group = [one for one in results if one.method == method]
        figures = [one.deployed_sets[clip_set]["fused"] for one in group]
        shares = [[f.top1, f.mean_class_accuracy] for f in figures]
        where = [str(one.target_domain) if clip_set == TARGET else f"without {one.target_domain}" for one in group]
        clips = [f.clips for f in figures]
        if len(group) > 1:
            where.append("mean")
            shares.append(np.mean(shares, axis=0).tolist())
            clips.append(0)
            if clip_set == TARGET:
                where.append("all clips")
                shares.append([np.average([f.top1 for f in figures], weights=[f.clips for f in figures]), None])
                clips.append(sum(f.clips for f in figures))
        data = pretraining_words(group[0].modalities, group[0].provenance)
        rows += [
            [method, name, str(count or ""), *(Score(None if value is None else 100 * value) for value in both), data]
            for name, count, both in zip(where, clips, shares, strict=True)
        ]
    columns = ["row", "domain", "clips", "top-1 (%)", "mean class (%)", "pretraining"]
    note = "Nothing was trained on this dataset."
    if clip_set == SOURCE:
        note += " The targets are sealed: held-out clips of the sources; `mbcd reveal` opens them."
    return Table(ZERO_SHOT, f"{dataset}: zero-shot", columns, rows, note, blocks=True)
