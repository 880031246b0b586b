"""Builds models, losses and studies for one command: every checkpoint is measured on the same clips."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.errors import SettingsError
from mbcd_cli.landscape.analyses import Study
from mbcd_cli.landscape.connections import Ends
from mbcd_cli.landscape.directions import moving_names
from mbcd_cli.landscape.objective import ModelObjective
from mbcd_cli.landscape.paths import buffers_of, vector_of
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import Group
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.runs.trunks import attach_trunks
from mbcd_cli.say import Say
from mbcd_cli.scoring.clip_sets import SOURCE, TARGET, clip_sets, source_domains
from mbcd_cli.scoring.deployed import build_models, deployed_of
from mbcd_cli.settings import Settings


def _clips(settings: Settings, dataset: Dataset) -> np.ndarray:
    """The clips to measure on: at most `max_clips`, drawn evenly from the table."""
    chosen = settings.landscape
    if chosen.data == "train":
        clips = dataset.select(domains=source_domains(settings, dataset), splits=("train",))
    else:
        wanted = SOURCE if chosen.data == "validation" else TARGET
        found = next((s for s in clip_sets(settings, dataset) if s.name == wanted), None)
        if found is not None and found.sealed:
            raise SettingsError(
                "landscape.data: the target of this run is sealed (dataset.seal_target).",
                "Choose validation or train, or open it: `mbcd reveal RUN`.",
            )
        clips = [] if found is None else found.clips
    if len(clips) == 0:
        raise SettingsError(
            f"landscape.data: there are no {chosen.data} clips.",
            "Choose validation, target or train clips that exist.",
        )
    return _evenly(np.asarray(clips), chosen.max_clips)


def _evenly(clips: np.ndarray, limit: int) -> np.ndarray:
    if limit == 0 or limit >= len(clips):
        return clips
    return clips[np.linspace(0, len(clips) - 1, limit).round().astype(int)]


class Bench:
    """Builds models, losses and studies for one command; every checkpoint is measured on the same clips."""

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        output: Path,
        device: torch.device,
        overwrite: bool,
        group: Group,
        say: Say,
    ) -> None:
        self.group, self._say = group, say
        self.settings, self.dataset, self.output = settings, dataset, output
        self.device, self.overwrite = device, overwrite
        self.clips = _clips(settings, dataset)
        self.calibration = np.zeros(0, dtype=np.int64)
        if settings.landscape.batch_norm == "recalibrated":
            train = dataset.select(domains=source_domains(settings, dataset), splits=("train",))
            self.calibration = _evenly(np.asarray(train), settings.landscape.max_clips)
        if not (self._tested(self.clips) and self._tested(self.calibration)):
            attach_trunks(settings, dataset, device=device, say=say)

    def model(self, label: str, checkpoint: Checkpoint, wanted: str) -> MultiModalModel:
        """The deployed, student or teacher model of a checkpoint."""
        models = build_models(self.settings, self.dataset, checkpoint, device=self.device, source=label)
        if wanted == "deployed":
            return models[deployed_of(models)]
        if wanted not in models:
            raise SettingsError(
                f"landscape.weights: checkpoint {label} has no {wanted}.",
                "It was trained without one; choose deployed or student.",
            )
        return models[wanted]

    def loss(
        self, model: MultiModalModel, *, names: Sequence[str], dtype: torch.dtype = torch.float32
    ) -> ModelObjective:
        """The loss around `model` as a function of `names`."""
        chosen = self.settings.landscape
        return ModelObjective(
            model=model,
            batches=self._batches(self.clips),
            names=names,
            loss=chosen.loss,
            batch_norm=chosen.batch_norm,
            calibration=self._batches(self.calibration),
            device=self.device,
            dtype=dtype,
            points_per_pass=chosen.points_per_pass,
        )

    def _batches(self, clips: np.ndarray) -> Iterable[Batch]:
        """Test views; where a cache has none of these clips, the training views that the seed draws."""
        chosen = self.settings.landscape
        if self._tested(clips):
            return self.dataset.batches(clips, batch_size=chosen.batch_size, training=False)
        return self.dataset.batches(clips, batch_size=chosen.batch_size, training=True, seed=chosen.seed)

    def _tested(self, clips: np.ndarray) -> bool:
        return self.dataset.has_test_views(clips)

    def _names(self, model: MultiModalModel) -> tuple[str, ...]:
        return moving_names(model, group=self.settings.landscape.group, loss=self.settings.landscape.loss)

    def study(self, label: str, model: MultiModalModel) -> Study:
        """The analyses of one checkpoint."""
        chosen = self.settings.landscape
        names = self._names(model)
        identity: dict[str, object] = {
            "weights": _digest(model),
            "clips": _sha(np.ascontiguousarray(self.clips, dtype=np.int64).tobytes()),
            "data": chosen.data if self._tested(self.clips) else f"{chosen.data}, training views of {chosen.seed}",
            "fingerprints": dict(self.dataset.fingerprints),
            "group": chosen.group,
            "loss": chosen.loss,
            "batch_norm": chosen.batch_norm,
        }
        if chosen.batch_norm == "recalibrated":
            identity |= {"calibration_clips": len(self.calibration), "batch_size": chosen.batch_size}
        double = chosen.curvature_dtype == "float64"
        return Study(
            settings=chosen,
            loss=self.loss(model, names=names),
            identity=identity,
            folder=self.output,
            label=label,
            subject=f"{chosen.group} parameters, {chosen.data} clips",
            say=self._say,
            curvature_loss=(lambda: self.loss(model, names=names, dtype=torch.float64)) if double else None,
            overwrite=self.overwrite,
            group=self.group,
        )

    def ends(self, model: MultiModalModel, others: Mapping[str, MultiModalModel]) -> Ends:
        """Paths from `model` to the others; running statistics move along unless they are recalibrated."""
        names = self._names(model)
        running = self.settings.landscape.batch_norm == "running"
        loss = self.loss(model, names=(*names, *buffers_of(model, names)) if running else names)
        towards = {label: vector_of(m.state_dict(), loss.start, label=label) for label, m in others.items()}
        return Ends(loss, names, towards, {label: _digest(m) for label, m in others.items()})


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _digest(model: MultiModalModel) -> str:
    """Names the weights (and running statistics), wherever the checkpoint lies."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
