"""The models of a checkpoint, and which of them is deployed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import CheckpointError, SettingsError, lines_of
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.settings import Settings

StateDict = Mapping[str, torch.Tensor]


AnyWeights = TypeVar("AnyWeights")


class Weights(Protocol):
    """What a checkpoint must offer to be evaluated."""

    student: StateDict
    teacher: StateDict | None
    label_names: Sequence[str]
    epoch: int


def build_models(
    settings: Settings,
    dataset: Dataset,
    weights: Weights,
    *,
    device: torch.device,
    source: str = "checkpoint",
) -> dict[str, MultiModalModel]:
    """The models of one checkpoint on `device`: "teacher" (first, where there is one) and "student".

    The teacher averages encoders and fused head; its uni-modal heads are the student's (method.md section Deviations).

    Raises:
        CheckpointError: the weights do not fit the model of `settings`, or the dataset's classes differ.
    """
    if list(weights.label_names) != list(dataset.label_names):
        raise CheckpointError(
            f"The {source} checkpoint was trained on the classes {', '.join(weights.label_names)}, "
            f"and the prepared dataset has {', '.join(dataset.label_names)}.",
            "Evaluate on a dataset with the same classes in the same order.",
        )
    modalities = dict(dataset.modalities)
    if settings.model.modalities:
        absent = [name for name in settings.model.modalities if name not in modalities]
        if absent:
            raise SettingsError(
                f"The model reads {', '.join(absent)}, which is not prepared.",
                "Run `mbcd prepare` with that modality.",
            )
        modalities = {name: modalities[name] for name in settings.model.modalities}
    models = {}
    for name, state in states_of(weights).items():
        model = build_model(
            modalities,
            settings=settings.model,
            classes=len(dataset.label_names),
            live_trunks=settings.cache.live_trunks,
        )
        try:
            model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise CheckpointError(
                f"The {name} in the {source} checkpoint does not fit these settings: {lines_of(error)[:2][-1]}",
                "Evaluate with the settings of the run (`--run RUN` reads them from the run folder).",
            ) from error
        models[name] = model.to(device).requires_grad_(False).eval()
    return models


def states_of(weights: Weights) -> dict[str, StateDict]:
    """The state dicts of a checkpoint's models: "teacher" (first, where there is one) and "student"."""
    states: dict[str, StateDict] = {"student": weights.student}
    if weights.teacher is None:
        return states
    averaged = {k: v for k, v in weights.teacher.items() if not k.startswith("heads.")}
    return {"teacher": {**weights.student, **averaged}, **states}


def deployed_of(models: Container[str]) -> str:
    """Which of a training's models is deployed: the teacher (the averaged weights) where there is one."""
    return "teacher" if "teacher" in models else "student"


def deployed_checkpoint(names: Iterable[str]) -> str:
    """Which of a run's checkpoints is deployed: best where there is one, else the first, which is the last epoch's."""
    names = list(names)
    return "best" if "best" in names else next(iter(names), "last")


def evaluated_checkpoints(asked: Sequence[str], checkpoints: Mapping[str, AnyWeights]) -> dict[str, AnyWeights]:
    """Those of a run's checkpoints that are evaluated: what is `asked` for (`evaluation.checkpoints`) and there.

    Raises:
        SettingsError: none is.
    """
    chosen = {name: checkpoints[name] for name in asked if name in checkpoints}
    if not chosen:
        raise SettingsError(
            f"evaluation.checkpoints = {', '.join(asked) or 'nothing'}, and the run has {', '.join(checkpoints)}.",
            "Ask for one that is there.",
        )
    return chosen


def deployed(checkpoints: Mapping[str, Weights]) -> tuple[str, str]:
    """(checkpoint, model) that is deployed: best where there is one, and its teacher where there is one."""
    checkpoint = deployed_checkpoint(checkpoints)
    return checkpoint, deployed_of(("student",) if checkpoints[checkpoint].teacher is None else ("student", "teacher"))
