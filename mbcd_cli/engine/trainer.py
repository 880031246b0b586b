"""The training loop: epochs of steps, validation, model selection, logs, checkpoints, resume.

Letters: N clips, M modalities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mbcd_cli import console
from mbcd_cli.data.records import Batch
from mbcd_cli.engine import watch
from mbcd_cli.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mbcd_cli.engine.events import Events
from mbcd_cli.engine.interrupts import Interrupts
from mbcd_cli.engine.randomness import Randomness, global_states, load_global_states
from mbcd_cli.engine.run_folder import RunFolder
from mbcd_cli.engine.step import TrainStep, unpack
from mbcd_cli.engine.validation import validate
from mbcd_cli.errors import CheckpointError, RunError, SettingsError
from mbcd_cli.evaluation.evaluator import SOURCE, TARGET, ClipSet
from mbcd_cli.settings import Settings


@dataclass(slots=True)
class Progress:
    """Where a training stands; all of it goes into checkpoints.

    Attributes:
        epoch: epochs finished. epoch_step: steps done in the one after. step: steps in all.
        pending: figures of the steps since the last record of steps.jsonl, as (clips [B], vector) pairs.
        sums: sums over the epoch's steps of their vectors times their clips, float64, and `clips` how many.
        history: records of metrics.jsonl. best: the selected epoch's. warnings: key -> text.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    pending: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    sums: torch.Tensor | None = None
    clips: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    warnings: dict[str, str] = field(default_factory=dict)


def better(figures: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Selection: a higher validation accuracy; of equal ones the lower validation loss, then the earlier epoch."""
    return (figures["accuracy"], -figures["loss"]) > (best["accuracy"], -best["loss"])


class Trainer:
    """Trains `step`'s student and leaves everything in `run`.

    The epoch that is selected is that whose deployed model (the teacher, where there is one) is the best (`better`)
    on the source domains' test split. The target's accuracy is recorded every epoch and never used.

    Args:
        settings: the resolved tree.
        dataset: what `open_dataset` returns (its `batches`, names and fingerprints are used).
        step: the optimisation step, with its student, optimizer and teacher.
        randomness: the step's.
        clips: training clips [N], indices into the clip table.
        held_out: clip sets by name; SOURCE selects, TARGET is only reported.
        run: the open run folder.
        device: where the student is.

    Raises:
        SettingsError: fewer training clips than one batch.
        CheckpointError: on resume, a checkpoint that does not fit.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        dataset: Any,
        step: TrainStep,
        randomness: Randomness,
        clips: np.ndarray,
        held_out: list[ClipSet],
        run: RunFolder,
        device: torch.device,
    ) -> None:
        self.settings, self.dataset, self.step, self.run, self.device = settings, dataset, step, run, device
        self.randomness, self.clips = randomness, clips
        self.held_out = {one.name: one for one in held_out}
        training = settings.training
        self.steps_per_epoch = len(clips) // training.batch_size
        if self.steps_per_epoch == 0:
            raise SettingsError(
                f"training.batch_size: there are {len(clips)} training clips, fewer than one batch of "
                f"{training.batch_size}.",
                "Lower it with --set training.batch_size=N.",
            )
        if SOURCE not in self.held_out:
            raise SettingsError(
                "The source domains have no test split to select the model on.",
                "Give some of their clips the split `test` and prepare again.",
            )
        planned = self.steps_per_epoch * training.epochs
        self.total_steps = min(planned, training.max_steps or planned)
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self._fingerprints = {name: dataset.fingerprints[name] for name in settings.modalities}
        self.progress = Progress()
        if run.resumed:
            self._resume()
        self._events = Events(run.path / "events", purge_after=self.progress.step)

    def fit(self) -> Progress:
        """Train to the end.

        Raises:
            RunError: a non-finite loss, a full disk, or a signal (after a checkpoint; says how to resume).
        """
        progress = self.progress
        self._saved_at = time.monotonic()
        left = self.total_steps - progress.step
        try:
            with Interrupts() as interrupts, console.progress("training", left) as ticker:
                self._interrupts, self._ticker = interrupts, ticker
                while progress.step < self.total_steps or progress.epoch_step > 0:
                    self._epoch()
        finally:
            self._events.close()
        return progress

    def _epoch(self) -> None:
        progress, training = self.progress, self.settings.training
        started, first_step = time.monotonic(), progress.step
        if progress.step < self.total_steps:
            batches = self.dataset.batches(
                self.clips,
                batch_size=training.batch_size,
                training=True,
                seed=training.seed,
                epoch=progress.epoch,
                drop_last=True,
                start=progress.epoch_step,
            )
            for batch in batches:
                self._one(batch)
                if progress.step >= self.total_steps:
                    break
        seconds = time.monotonic() - started
        self._flush()
        record = self._evaluate()
        self._finish_epoch(record)
        self.run.append(
            "timing.jsonl",
            {
                "epoch": record["epoch"],
                "train_seconds": seconds,
                "steps_per_second": (progress.step - first_step) / max(seconds, 1e-9),
                "validation_seconds": time.monotonic() - started - seconds,
            },
        )

    def _one(self, batch: Batch) -> None:
        progress, training = self.progress, self.settings.training
        result = self.step(batch.to(self.device, non_blocking=True))
        progress.step += 1
        progress.epoch_step += 1
        progress.pending.append((batch.clips, result.vector()))
        self._ticker.advance()
        if progress.step % training.log_steps == 0:
            self._flush()
        if self._interrupts.signal is not None:
            self._stop()
        waited = (time.monotonic() - self._saved_at) / 60
        if training.checkpoint_minutes and waited >= training.checkpoint_minutes:
            self._settle()
            self._save()

    # ---- figures

    def _settle(self) -> None:
        """Bring the pending figures to the CPU (the only wait for the device) and stop if one is not finite."""
        progress = self.progress
        if not progress.pending:
            return
        progress.pending = [(clips, vector.to("cpu")) for clips, vector in progress.pending]
        vectors = torch.stack([vector for _, vector in progress.pending])
        finite = torch.isfinite(vectors).all(dim=1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            step = progress.step - len(progress.pending) + bad + 1
            self._non_finite(f"The loss of step {step} is not finite", progress.pending[bad][0])

    def _non_finite(self, what: str, clips: torch.Tensor | None = None) -> None:
        names = ""
        if clips is not None:
            names = " Its clips: " + ", ".join(str(self.dataset.clips.ids[int(i)]) for i in clips) + "."
        kept = (
            f"{self.run.last} is the last good checkpoint."
            if self.run.last.exists()
            else "No checkpoint was written yet."
        )
        error = RunError(
            f"{what} (epoch {self.progress.epoch + 1}); training stopped.{names}",
            f"{kept} Lower optimizer.lr, or look at these clips.",
        )
        self.run.append("warnings.jsonl", {"step": self.progress.step, "warning": error.message})
        raise error

    def _flush(self) -> None:
        """Write the pending steps as one record of steps.jsonl and add them to the epoch's sums."""
        self._settle()
        progress = self.progress
        if not progress.pending:
            return
        weights = torch.tensor([float(len(clips)) for clips, _ in progress.pending], dtype=torch.float64)
        total = (torch.stack([v for _, v in progress.pending]).double() * weights[:, None]).sum(dim=0)
        progress.sums = total if progress.sums is None else progress.sums + total
        progress.clips += int(weights.sum())
        names = self.step.model.modalities
        figures = unpack((total / weights.sum()).tolist(), names)
        record = {
            "step": progress.step,
            "epoch": progress.epoch + 1,
            "steps": len(progress.pending),
            **figures,
        }
        progress.pending = []
        self.run.append("steps.jsonl", record)
        self._events.scalars("step", figures, progress.step)
        balance = " ".join(f"{n} r {v['r']:.2f} p {v['p']:.2f}" for n, v in figures["modalities"].items())
        self._ticker.describe(
            f"epoch {progress.epoch + 1}/{self.epochs} loss {figures['total']:.3f} "
            f"(fused {figures['ce_fused']:.3f}, KL {figures['kl_fused']:.3f}) {balance}"
        )

    def _evaluate(self) -> dict[str, Any]:
        """The epoch's record: training means, validation and target figures."""
        progress, names = self.progress, self.step.model.modalities
        models = {"student": self.step.model}
        if self.step.teacher is not None:
            models = {"teacher": self.step.teacher.model_for_evaluation(), **models}
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "train": unpack((progress.sums / progress.clips).tolist(), names),
        }
        for key, name in (("validation", SOURCE), ("target", TARGET)):
            if name in self.held_out:
                record[key] = validate(
                    models,
                    lambda clips=self.held_out[name].clips: self._watched(clips),
                    device=self.device,
                    precision=self.settings.runtime.precision,
                )
        if any(record["validation"][model]["fused"]["loss"] is None for model in models):
            self._non_finite("The validation loss is not finite")
        return record

    def _watched(self, clips: np.ndarray) -> Iterator[Batch]:
        batches: Iterable[Batch] = self.dataset.batches(
            clips, batch_size=self.settings.evaluation.batch_size, training=False
        )
        for batch in batches:
            if self._interrupts.signal is not None:
                self._stop()
            yield batch

    # ---- the end of an epoch

    def _finish_epoch(self, record: dict[str, Any]) -> None:
        progress = self.progress
        deployed = "student" if self.step.teacher is None else "teacher"
        fused = record["validation"][deployed]["fused"]
        improved = progress.best is None or better(fused, progress.best)
        if improved:
            progress.best = {"epoch": record["epoch"], "accuracy": fused["accuracy"], "loss": fused["loss"]}
        record["best_epoch"] = progress.best["epoch"]
        progress.history.append(record)
        for key, text in watch.warnings(progress.history, epochs=self.epochs).items():
            if key not in progress.warnings:
                progress.warnings[key] = text
                console.warn(text)
        record["warnings"] = sorted(progress.warnings)
        progress.epoch += 1
        progress.epoch_step, progress.sums, progress.clips = 0, None, 0
        self.run.append("metrics.jsonl", record)
        self._events.scalars(
            "epoch", {k: record[k] for k in ("train", "validation", "target") if k in record}, progress.step
        )
        if self.settings.training.keep_checkpoints:
            save_checkpoint(self.run.checkpoints / f"epoch-{progress.epoch:03d}.pt", self._checkpoint(whole=False))
        if improved:
            save_checkpoint(self.run.best, self._checkpoint(whole=False))
        self._save()
        target = record.get("target", {}).get(deployed, {}).get("fused", {}).get("accuracy")
        console.say(
            f"epoch {record['epoch']}/{self.epochs}: loss {record['train']['total']:.3f}, "
            f"validation {100 * fused['accuracy']:.1f} %"
            + (f", target {100 * target:.1f} %" if target is not None else "")
            + (" (best)" if improved else "")
        )

    # ---- checkpoints

    def _check_weights(self) -> None:
        """A finite loss may still give infinite weights: those never get into a checkpoint."""
        tensors = [t for t in self.step.model.state_dict().values() if t.is_floating_point() and t.numel()]
        if not torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all():
            self._non_finite("The weights are not finite any more")

    def _checkpoint(self, *, whole: bool) -> Checkpoint:
        self._check_weights()
        progress, teacher = self.progress, self.step.teacher
        training = None
        if whole:
            training = {
                "optimizer": self.step.optimizer.state_dict(),
                "randomness": self.randomness.state(),
                "global": global_states(),
                "pending": [[clips, vector] for clips, vector in progress.pending],
                "sums": progress.sums,
                "clips": progress.clips,
                "logs": self.run.sync(),
                "warning_keys": dict(progress.warnings),
            }
        return Checkpoint(
            settings=self.settings,
            modalities=dict(self.settings.modalities),
            dataset=self.dataset.name,
            label_names=tuple(self.dataset.label_names),
            domains=tuple(self.dataset.domains),
            fingerprints=self._fingerprints,
            student=self.step.model.state_dict(),
            teacher=None if teacher is None else teacher.model_for_evaluation().state_dict(),
            epoch=progress.epoch,
            epoch_step=progress.epoch_step,
            step=progress.step,
            history=progress.history,
            best=progress.best,
            warnings=list(progress.warnings.values()),
            training=training,
        )

    def _save(self) -> None:
        save_checkpoint(self.run.last, self._checkpoint(whole=True))
        self._saved_at = time.monotonic()

    def _stop(self) -> None:
        """A signal came: checkpoint, then leave."""
        name = self._interrupts.signal.name
        self._settle()
        self._save()
        raise RunError(
            f"Stopped by {name} after step {self.progress.step} of {self.total_steps}; {self.run.last} is up to date.",
            "Go on with the same command and --resume.",
        )

    def _resume(self) -> None:
        if not self.run.last.exists():  # killed before the first checkpoint
            self.run.cut({})
            return
        saved = load_checkpoint(self.run.last)
        if saved.training is None:
            raise CheckpointError(f"{self.run.last} holds weights only.", "Start anew with --overwrite.")
        if saved.fingerprints != self._fingerprints:
            changed = [n for n, f in self._fingerprints.items() if saved.fingerprints.get(n) != f]
            raise CheckpointError(
                f"The cache of {', '.join(changed) or 'some modality'} changed since this run began.",
                "Prepare with the settings of the run again, or start another run.",
            )
        progress, state = self.progress, saved.training
        try:
            self.step.model.load_state_dict(saved.student)
            if self.step.teacher is not None:
                self.step.teacher.model.load_state_dict(saved.teacher or {})
            self.step.optimizer.load_state_dict(state["optimizer"])
            progress.epoch, progress.epoch_step, progress.step = saved.epoch, saved.epoch_step, saved.step
            progress.pending = [(clips, vector) for clips, vector in state["pending"]]
            progress.sums, progress.clips = state["sums"], state["clips"]
            progress.history, progress.best = saved.history, saved.best
            progress.warnings = state["warning_keys"]
            self.run.cut(state["logs"])
            self.randomness.load(state["randomness"])
            load_global_states(state["global"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.run.last} does not fit this run: {str(error).splitlines()[0]}",
                "Start anew with --overwrite.",
            ) from error
        console.say(f"resumed {self.run.path} at step {progress.step} of {self.total_steps}")
