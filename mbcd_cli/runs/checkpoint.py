"""Checkpoints: atomic saving of everything a training needs to go on, and safe loading.

A checkpoint holds tensors and primitives only, so that it loads with `torch.load(weights_only=True)`: a hostile
file is refused, nothing in it is executed.
"""

from __future__ import annotations

import json
import sys
import warnings as python_warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from mbcd_cli import checksums
from mbcd_cli.data.modalities import AnyKind
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.errors import FOREIGN, CheckpointError, SettingsError, lines_of
from mbcd_cli.files import written_file
from mbcd_cli.resolved import validate
from mbcd_cli.settings import Settings

_FORMAT = "mbcd-checkpoint"
_VERSION = 5
_MODALITIES = TypeAdapter(dict[str, AnyKind])

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training at one moment.

    Attributes:
        settings: the resolved tree it was trained with.
        modalities: resolved settings of every modality, in fusion order.
        dataset: name of the dataset.
        label_names: names of the C classes.
        domains: the dataset's domains.
        fingerprints: modality -> fingerprint of the cache it was trained on.
        student: state dict of the whole student.
        teacher: state dict of the averaged model with the student's uni-modal heads, or None.
        epoch: epochs finished (1 after the first).
        epoch_step: steps done in the epoch after that.
        step: steps done in all.
        history: one record per finished epoch, as in metrics.jsonl.
        best: epoch and validation figures of the selected epoch so far, or None.
        warnings: texts of the warnings so far.
        training: the method's own modules, optimizer, random states and log positions, or None in a checkpoint that
            only holds weights (`best.pt`, `epoch-NNN.pt`).
        averaged: what `mbcd average` has made it of (its average.json), or None; `student` is that average then.
        checksum: of the file that it was read from, which may be another by now; empty where it was not read.
    """

    settings: Settings
    modalities: dict[str, Modality]
    dataset: str
    label_names: tuple[str, ...]
    domains: tuple[str, ...]
    fingerprints: dict[str, str]
    student: Tensors
    teacher: Tensors | None
    epoch: int
    epoch_step: int
    step: int
    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    warnings: list[str]
    training: dict[str, Any] | None = None
    averaged: dict[str, Any] | None = None
    checksum: str = ""

    @property
    def classes(self) -> int:
        """C."""
        return len(self.label_names)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` so that at any moment `path` is the old file or the complete new one.

    Raises:
        FileError: it cannot be written (a full disk, no permission); the previous file is untouched.
    """
    payload = {
        "format": _FORMAT,
        "version": _VERSION,
        # As text: pickling thousands of plain values took longer than writing the weights of a small model.
        "settings": checkpoint.settings.model_dump_json(),
        "modalities": _MODALITIES.dump_json(checkpoint.modalities).decode(),
        "history": json.dumps(checkpoint.history),
        "averaged": json.dumps(checkpoint.averaged),
        "label_names": list(checkpoint.label_names),
        "domains": list(checkpoint.domains),
        "fingerprints": dict(checkpoint.fingerprints),
        "student": {key: by_itself(value) for key, value in checkpoint.student.items()},
        "teacher": None
        if checkpoint.teacher is None
        else {key: by_itself(value) for key, value in checkpoint.teacher.items()},
    }
    payload |= {key: getattr(checkpoint, key) for key in _PLAIN}
    save_tensors(path, payload)


def save_tensors(path: Path, payload: Mapping[str, Any]) -> None:
    """Write tensors and primitives so that at any moment `path` is the old file or the complete new one.

    Raises:
        FileError: it cannot be written.
    """
    kept = "go on with --resume (the previous checkpoint is kept)"
    with written_file(path, place="--run", then=kept) as file:
        torch.save(_alike(payload), file)


def _alike(value: Any) -> Any:
    """The tree with equal texts as one object and every container its own, so that equal trees are equal bytes: pickle
    writes an object that it meets again as a reference, and what was loaded shares others than what was not."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        return {_alike(key): _alike(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_alike, value))
    return value


def by_itself(value: torch.Tensor) -> torch.Tensor:
    """The tensor without a graph, and without those that it shares its memory with: torch would save them all."""
    value = value.detach()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


_PLAIN = ("dataset", "epoch", "epoch_step", "step", "best", "warnings", "training")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: missing, truncated, hostile (nothing in it is executed), foreign, or of another version.
    """
    path = Path(path)
    then = "Name another .pt file under the checkpoints/ folder of a run."
    payload = read_tensors(path, format=_FORMAT, version=_VERSION, what="checkpoint", then=then)
    try:
        return _parse(payload)
    except (SettingsError, ValidationError) as error:
        raise CheckpointError(
            f"{path} was written by another version of mbcd, or with a method that is not installed here: its settings "
            f"do not fit. {error}",
            "Use the version that wrote it, or train again.",
        ) from error
    except FOREIGN as error:
        raise CheckpointError(
            f"{path} is damaged: {lines_of(error)[0]}", "Use another checkpoint, or train again."
        ) from error


def read_tensors(path: Path, *, format: str, version: int, what: str, then: str) -> Mapping[str, Any]:
    """What `save_tensors` wrote, on the CPU; and `checksum`, the file's.

    Args:
        format, version: that it has to have. what: a word for such a file.
        then: what to do where it is missing or damaged.

    Raises:
        CheckpointError: missing, truncated, hostile (nothing in it is executed), foreign, or of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no {what} {path}.", then)
    try:
        with python_warnings.catch_warnings():  # about a strange file's pickle protocol: the error says enough
            python_warnings.simplefilter("ignore")
            told = checksums.verified(path)
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes in the reader
        code = "weights_only" in str(error)  # torch would advise to trust the file
        reason = "its pickle asks for code" if code else lines_of(error)[0][:200]
        raise CheckpointError(
            f"{path} is no readable {what} ({type(error).__name__}: {reason}).",
            f"It is truncated, or holds more than tensors and plain values (nothing in it was executed). {then}",
        ) from error
    if not isinstance(payload, Mapping) or payload.get("format") != format:
        raise CheckpointError(
            f"{path} was not written by mbcd train.", "Encoder weights are set with modalities.NAME.weights."
        )
    found = payload.get("version")
    if not isinstance(found, int) or found != version:
        raise CheckpointError(
            f"{path} has format version {str(found)[:20]}, this mbcd reads {version}.",
            "Use the mbcd that wrote it, or train again.",
        )
    return {**payload, "checksum": told}


def _parse(payload: Mapping[str, Any]) -> Checkpoint:
    """Everything a later stage relies on is checked here."""
    for key in ("epoch", "epoch_step", "step"):
        if not isinstance(payload[key], int):
            raise TypeError(f"{key} is no whole number")
    history = json.loads(payload["history"])
    for key, kind in (("warnings", list), ("label_names", list), ("fingerprints", dict)):
        if not isinstance(payload[key], kind):
            raise TypeError(f"{key} is no {kind.__name__}")
    if not isinstance(history, list):
        raise TypeError("history is no list")
    averaged = json.loads(payload["averaged"])
    if not isinstance(averaged, dict | None):
        raise TypeError("averaged is no object")
    return Checkpoint(
        settings=validate(json.loads(payload["settings"])),
        modalities=_MODALITIES.validate_json(payload["modalities"]),
        label_names=tuple(str(name) for name in payload["label_names"]),
        domains=tuple(str(name) for name in payload["domains"]),
        fingerprints={str(k): str(v) for k, v in payload["fingerprints"].items()},
        student=state_of(payload["student"], "student"),
        teacher=None if payload["teacher"] is None else state_of(payload["teacher"], "teacher"),
        history=history,
        averaged=averaged,
        checksum=payload["checksum"],
        **{key: payload[key] for key in _PLAIN},
    )


def state_of(value: object, what: str) -> Tensors:
    """A state dict that was read.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, Mapping) or not all(isinstance(t, torch.Tensor) for t in value.values()):
        raise TypeError(f"{what} is no state dict")
    return dict(value)
