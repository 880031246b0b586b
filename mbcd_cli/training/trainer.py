"""The training loop: epochs of steps, validation, model selection, logs, checkpoints, resume.

Letters: N clips, M modalities, F numbers in a step's figures.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.errors import RunError, SettingsError, StoppedError
from mbcd_cli.json_values import json_values
from mbcd_cli.methods import code_digest
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.randomness import Randomness
from mbcd_cli.runs.checkpoint import Checkpoint, save_checkpoint
from mbcd_cli.runs.events import Events
from mbcd_cli.runs.folder import SEALED, RunFolder
from mbcd_cli.runs.snapshot_files import save_snapshot
from mbcd_cli.say import SILENT, Say, Ticker
from mbcd_cli.scoring.clip_sets import SOURCE, TARGET, ClipSet
from mbcd_cli.scoring.deployed import deployed_of
from mbcd_cli.scoring.predictions import Predictions, predict
from mbcd_cli.scoring.unlabelled import said_classes, unlabelled_record
from mbcd_cli.settings import Settings
from mbcd_cli.training import watch
from mbcd_cli.training.between_epochs import InterruptedReading, TrainingClips
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.figures import Layout, Record
from mbcd_cli.training.interrupts import Interrupts
from mbcd_cli.training.optimizer import rate_factor, set_rates
from mbcd_cli.training.resume import Progress, resume, training_state
from mbcd_cli.training.step import TrainStep
from mbcd_cli.training.validation import EpochRecord, HeadRecord, Validation, held_out_record, merged

Said = Mapping[str, Predictions]
"""What each of a training's models says on held-out clips."""
Asking = Generator[Batch | Validation, torch.Tensor | Said, None]
"""A training that asks for what it needs."""


def better(figures: HeadRecord, best: HeadRecord) -> bool:
    """Selection: a higher validation accuracy; of equal ones the lower validation loss, then the earlier epoch."""
    return (figures.accuracy, -figures.loss) > (best.accuracy, -best.loss)


class Trainer:
    """Trains `step`'s student and leaves everything in `run`.

    The epoch that is selected is that whose deployed model (the teacher, where weights are averaged) is the best
    (`better`) on the source domains' test split. The target's accuracy (of a sealed one, the classes that are said) is
    recorded every epoch and never used.

    Args:
        settings: the resolved tree.
        dataset: what `open_dataset` returns (its `batches`, names and fingerprints are used).
        step: the optimisation step, with its student, method, optimizer and average.
        run_step: batch -> its figures, where the step is to be run another way (`StaticStep`).
        randomness: the step's.
        clips: training clips [N], indices into the clip table.
        held_out: clip sets by name; SOURCE selects, TARGET is only reported.
        run: the open run folder.
        device: where the student is.
        feed: where batches come from; by default read when needed.
        group: the processes that train together.
        say: told of every epoch and warning.

    Raises:
        SettingsError: a batch that the processes cannot share evenly, fewer training clips than one batch.
        CheckpointError: on resume, a checkpoint that does not fit.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        dataset: Dataset,
        step: TrainStep,
        randomness: Randomness,
        clips: np.ndarray,
        held_out: list[ClipSet],
        run: RunFolder,
        device: torch.device,
        feed: Feed | None = None,
        run_step: Callable[[Batch], torch.Tensor] | None = None,
        group: Group = ALONE,
        say: Say = SILENT,
    ) -> None:
        self.settings, self.dataset, self.step, self.run, self.device = settings, dataset, step, run, device
        self.randomness, self.clips, self.group, self._say = randomness, clips, group, say
        self.feed = feed or Feed(dataset, device=device, group=group)
        self.run_step = run_step or step
        self.held_out = {clip_set.name: clip_set for clip_set in held_out}
        training = settings.training
        self.steps_per_epoch = len(clips) // training.batch_size
        if self.steps_per_epoch == 0:
            raise SettingsError(
                f"training.batch_size: there are {len(clips)} training clips, fewer than one batch of "
                f"{training.batch_size}.",
                "Lower it with --set training.batch_size=N.",
            )
        if training.batch_size % group.world:
            raise SettingsError(
                f"training.batch_size: {training.batch_size} clips do not divide among {group.world} processes.",
                "Choose a multiple: it is the batch of all processes together.",
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
        self._code = code_digest(settings.method.name)  # now: the file may be edited meanwhile
        self.progress = Progress()
        place = self.progress, step, randomness, run, self._fingerprints
        if run.resumed and resume(*place, code=self._code, steps_per_epoch=self.steps_per_epoch):
            self._say(f"resumed {run.path} at step {self.progress.step} of {self.total_steps}")
        step.context.step.fill_(self.progress.step)
        self._events = Events(run.path / "events", purge_after=self.progress.step) if group.main else None

    def fit(self) -> Progress:
        """Train to the end.

        Raises:
            RunError: a non-finite loss, a full disk, or a signal (after a checkpoint; says how to resume).
        """
        left = self.total_steps - self.progress.step
        with Interrupts() as interrupts, self._say.progress("training", left) as ticker:
            asking = self.training(interrupts, ticker)
            with closing(asking):
                try:
                    asked = next(asking)
                    while True:
                        step = isinstance(asked, Batch)
                        asked = asking.send(self.run_step(asked) if step else self.predicted(asked))
                except StopIteration:
                    return self.progress

    def training(self, interrupts: Interrupts, ticker: Ticker) -> Asking:
        """The whole training, which asks for every step: it yields a batch and is sent the step's figures, [F]; and for
        every validation, when it is sent what the models say, by name.

        Raises:
            RunError: as `fit`.
        """
        self._interrupts, self._ticker = interrupts, ticker
        self._saved_at = time.monotonic()
        try:
            while self.progress.step < self.total_steps or self.progress.epoch_step > 0:
                yield from self._epoch()
            if came := self.group.largest(int(self._interrupts.signal or 0))[0]:  # after the last step
                self._stop(signal.Signals(came))
        finally:
            if self._events is not None:
                self._events.close()

    def _epoch(self) -> Asking:
        progress, training = self.progress, self.settings.training
        started, first_step = time.monotonic(), progress.step
        self.feed.reset()
        self.step.context.epoch.fill_(progress.epoch)
        rates = self.settings.optimizer
        set_rates(self.step.optimizer, rate_factor(rates, epoch=progress.epoch, epochs=training.epochs))
        if progress.epoch_step == 0:
            try:
                self.step.method.before_epoch(self._clips_of_epoch())
            except InterruptedReading:
                self._leave_alone()
        if progress.step < self.total_steps:
            batches = self.feed.training(
                self.clips,
                batch_size=training.batch_size,
                seed=training.seed,
                epoch=progress.epoch,
                start=progress.epoch_step,
                views=self.step.method.views,
            )
            with closing(batches):
                for clips, batch in batches:
                    self._take(clips, (yield batch))
                    if progress.step >= self.total_steps:
                        break
        self._flush()  # waits for the device
        seconds = time.monotonic() - started
        record, sealed = yield from self._evaluate()
        self.run.append(  # before the checkpoint, which counts it: a run that goes on from there keeps it
            "timing.jsonl",
            {
                "epoch": record.epoch,
                "train_seconds": seconds,
                "data_wait_share": round(self.feed.waited / max(seconds, 1e-9), 4),
                "steps_per_second": (progress.step - first_step) / max(seconds, 1e-9),
                "validation_seconds": time.monotonic() - started - seconds,
            },
        )
        self._finish_epoch(record, sealed)

    def _clips_of_epoch(self) -> TrainingClips:
        return TrainingClips(
            step=self.step,
            feed=self.feed,
            settings=self.settings,
            clips=self.clips,
            held_out=self.held_out[SOURCE].clips,
            epoch=self.progress.epoch,
            interrupted=self._leaves_alone,
        )

    def _leaves_alone(self) -> bool:
        """Whether a signal came; several processes leave together only: after the next step."""
        return self.group.world == 1 and self._interrupts.signal is not None

    def _leave_alone(self) -> None:
        if self._leaves_alone():
            self._stop(self._interrupts.signal)

    def _take(self, clips: torch.Tensor, vector: torch.Tensor) -> None:
        progress, training = self.progress, self.settings.training
        self.group.average_([vector])
        progress.step += 1
        progress.epoch_step += 1
        progress.pending.append((clips, vector))
        self._ticker.advance()
        if progress.step % training.log_steps == 0:
            self._flush()
        waited = (time.monotonic() - self._saved_at) / 60
        due = self.group.main and bool(training.checkpoint_minutes) and waited >= training.checkpoint_minutes
        # All processes leave, or save, after the same step.
        came, due = self.group.largest(int(self._interrupts.signal or 0), int(due))
        if came:
            self._stop(signal.Signals(came))
        if due:
            self._settle()
            self._save()

    # ---- figures

    def _settle(self) -> None:
        """Bring the pending figures to the CPU (the only wait for the device) and stop if one is not finite."""
        progress = self.progress
        if not progress.pending:
            return
        vectors = torch.stack([vector.to(self.device) for _, vector in progress.pending]).to("cpu")
        progress.pending = [(clips, vector) for (clips, _), vector in zip(progress.pending, vectors, strict=True)]
        finite = torch.isfinite(vectors).all(dim=1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            step = progress.step - len(progress.pending) + bad + 1
            self._non_finite(f"The loss of step {step} is not finite", progress.pending[bad][0])

    def _non_finite(self, what: str, clips: torch.Tensor | None = None) -> None:
        names = ""
        if clips is not None:
            everyones = dict.fromkeys(int(i) for part in self.group.gathered(clips.tolist()) for i in part)
            names = " Its clips: " + ", ".join(str(self.dataset.clips.ids[i]) for i in everyones) + "."
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
        self.group.leave(error)

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
        figures = self._layout.unpack((total / weights.sum()).tolist())
        record = {
            "step": progress.step,
            "epoch": progress.epoch + 1,
            "steps": len(progress.pending),
            **figures,
        }
        progress.pending = []
        self.run.append("steps.jsonl", record)
        if self._events is not None:
            self._events.scalars("step", figures, progress.step)
        shown = [self._ticked(name, figures) for name in self.step.method.ticker]
        self._ticker.describe(
            f"epoch {progress.epoch + 1}/{self.epochs} loss {figures['total']:.3f} {' '.join(filter(None, shown))}"
        )

    @property
    def _layout(self) -> Layout:
        assert self.step.layout is not None, "figures come from steps"
        return self.step.layout

    @staticmethod
    def _ticked(name: str, figures: Record) -> str:
        """A figure for the progress line: `name 0.12`, or one value per modality; nothing where there is none."""
        if name in figures:
            return f"{name} {figures[name]:.3f}"
        rows = {modality: row[name] for modality, row in figures["modalities"].items() if name in row}
        return f"{name} {', '.join(f'{modality} {value:.2f}' for modality, value in rows.items())}" if rows else ""

    def _evaluate(self) -> Generator[Validation, Said, tuple[EpochRecord, Said]]:
        """The epoch's record: training means, validation and target figures; and what is said of a sealed target."""
        progress = self.progress
        models = {"student": self.step.model}
        if self.step.average is not None:
            if self.step.average.reads_validation:  # before the averaged weights are known
                loss = held_out_record((yield self._validation(models, SOURCE))).student.fused.loss
                if loss is None:
                    self._non_finite("The validation loss is not finite")
                self.step.average.validated(loss, progress.step)
            models = {"teacher": self.step.average.model_for_evaluation(), **models}
        record = EpochRecord(
            epoch=progress.epoch + 1,
            step=progress.step,
            train=self._layout.unpack((progress.sums / progress.clips).tolist()),
            validation=held_out_record(source := (yield self._validation(models, SOURCE))),
        )
        if any(figures.fused.loss is None for figures in record.validation.models.values()):
            self._non_finite("The validation loss is not finite")
        if TARGET not in self.held_out:
            return record, {}
        target = yield self._validation(models, TARGET)
        deployed = deployed_of(models)
        record.unlabelled = unlabelled_record(source[deployed], target[deployed])
        if self.held_out[TARGET].sealed:
            return record, target
        record.target = held_out_record(target)
        return record, {}

    def _validation(self, models: Mapping[str, MultiModalModel], name: str) -> Validation:
        return Validation(models, self.held_out[name].clips)

    def predicted(self, asked: Validation) -> Said:
        """What the models say on the held-out clips, which the processes share."""
        clips, group = asked.clips, ALONE
        if len(clips) >= self.group.world:
            clips, group = np.array_split(clips, self.group.world)[self.group.rank], self.group
        how = {"device": self.device, "precision": self.settings.runtime.precision}
        return {
            name: merged(group.gathered(predict(model, self._watched(clips), **how)))
            for name, model in asked.models.items()
        }

    def _watched(self, clips: np.ndarray) -> Iterator[Batch]:
        for batch in self.feed.testing(clips, batch_size=self.settings.evaluation.batch_size):
            self._leave_alone()
            yield batch

    # ---- the end of an epoch

    def _finish_epoch(self, record: EpochRecord, sealed: Said) -> None:
        progress = self.progress
        fused = record.validation.deployed.fused
        improved = progress.best is None or better(fused, progress.best.validation.deployed.fused)
        if improved:
            progress.best = record
        record.best_epoch = progress.best.epoch
        progress.history.append(record)
        for key, text in watch.training_warnings(
            progress.history, epochs=self.epochs, alarms=self.step.method.alarms
        ).items():
            if key not in progress.warnings:
                progress.warnings[key] = text
                self._say.warn(text)
        record.warnings = sorted(progress.warnings)
        progress.epoch += 1
        progress.epoch_step, progress.sums, progress.clips = 0, None, 0
        line = json_values(record)
        self.run.append("metrics.jsonl", line)
        if sealed:  # `mbcd reveal` makes accuracies of it
            said = {name: said_classes(predictions) for name, predictions in sealed.items()}
            self.run.append(SEALED, {"epoch": record.epoch, **said})
        if self._events is not None:
            shown = {name: line[name] for name in ("train", "validation", "target") if name in line}
            self._events.scalars("epoch", shown, progress.step)
        if self.settings.training.keep_checkpoints:
            self._write(self.run.checkpoints / f"epoch-{progress.epoch:03d}.pt", whole=False)
        if improved:
            self._write(self.run.best, whole=False)
        if self.step.snapshots is not None:
            snapshot = self.step.snapshots.close(progress.epoch, progress.step)
            self.group.on_main(lambda: save_snapshot(self.run.path, snapshot))
        self._save()
        target = record.target
        self._say(
            f"epoch {record.epoch}/{self.epochs}: loss {record.train['total']:.3f}, "
            f"validation {100 * fused.accuracy:.1f} %"
            + (f", target {100 * target.deployed.fused.accuracy:.1f} %" if target is not None else "")
            + (" (best)" if improved else "")
        )

    # ---- checkpoints

    def _check_weights(self) -> None:
        """A finite loss may still give infinite weights: those never get into a checkpoint."""
        states = (self.step.model.state_dict(), self.step.method.state_dict())
        tensors = [t for state in states for t in state.values() if t.is_floating_point() and t.numel()]
        if not torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all():
            self._non_finite("The weights are not finite any more")

    def _checkpoint(self, *, whole: bool) -> Checkpoint:
        progress, average, best = self.progress, self.step.average, self.progress.best
        state = progress, self.step, self.randomness, self.run
        training = training_state(*state, code=self._code) if whole else None
        return Checkpoint(
            settings=self.settings,
            modalities=dict(self.settings.modalities),
            dataset=self.dataset.name,
            label_names=tuple(self.dataset.label_names),
            domains=tuple(self.dataset.domains),
            fingerprints=self._fingerprints,
            student=self.step.model.state_dict(),
            teacher=None if average is None else average.model_for_evaluation().state_dict(),
            epoch=progress.epoch,
            epoch_step=progress.epoch_step,
            step=progress.step,
            history=json_values(progress.history),
            best=None if best is None else {"epoch": best.epoch, **json_values(best.validation.deployed.fused)},
            warnings=list(progress.warnings.values()),
            training=training,
        )

    def _write(self, path: Path, *, whole: bool) -> None:
        self._check_weights()
        self.group.on_main(lambda: save_checkpoint(path, self._checkpoint(whole=whole)))

    def _save(self) -> None:
        self._write(self.run.last, whole=True)
        self._saved_at = time.monotonic()

    def _stop(self, came: signal.Signals) -> None:
        """A signal came: checkpoint, then leave."""
        self._settle()
        self._save()
        error = StoppedError(
            f"Stopped by {came.name} after step {self.progress.step} of {self.total_steps}; "
            f"{self.run.last} is up to date.",
            "Go on with the same command and --resume.",
        )
        self.group.leave(error)
