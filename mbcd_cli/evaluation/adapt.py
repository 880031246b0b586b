"""`mbcd adapt`: finished runs' deployed models adapted to the inputs of the clips that they are tested on.

What comes out uses target inputs at test time: it is a table of its own, never a row beside methods that do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.checksums import of_file
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.errors import MbcdError, RunError
from mbcd_cli.evaluation.adaptation_rules import RULES, AdaptationRule, Moment
from mbcd_cli.evaluation.evaluate import checkpoint_checksums
from mbcd_cli.evaluation.evaluator import evaluate_models
from mbcd_cli.evaluation.report.comparison import Comparison
from mbcd_cli.evaluation.report.evaluated import Run, distinct, run_of_results, told_apart
from mbcd_cli.evaluation.report.results import Results, SetFigures, results_of
from mbcd_cli.evaluation.report.score_tables import adapted_tables
from mbcd_cli.evaluation.report.tables import Score, Table, comma_separated, markdown
from mbcd_cli.files import give_place, write_json, write_text
from mbcd_cli.json_values import json_values
from mbcd_cli.locks import folder_aside
from mbcd_cli.model import MultiModalModel
from mbcd_cli.randomness import global_states, load_global_states
from mbcd_cli.runs import opening
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.runs.folder import DONE
from mbcd_cli.runs.names import run_checkpoints, trained_at
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import SOURCE, TARGET, ClipSet, clip_sets
from mbcd_cli.scoring.deployed import deployed, evaluated_checkpoints
from mbcd_cli.scoring.metrics import figures_of_heads
from mbcd_cli.scoring.predictions import Predictions, autocast
from mbcd_cli.settings import AdaptSettings, Settings

ADAPTATION_FORMAT = 1
"""Version of the layout of adaptation.json."""
_RESULTS = "adaptation.json"
_USES = "target inputs at test time"
_MARK = f"What uses {_USES} is not to be compared with what does not."


@dataclass(slots=True, kw_only=True)
class Adapted:
    """What one run's adaptation found: what adaptation.json holds.

    Attributes:
        format: `ADAPTATION_FORMAT`. rule: its name. uses: the mark of its figures.
        moment: the prediction that the rule's authors report.
        settings: of the adaptation, the rule's own constants filled in. moved: name -> shape of what adapts.
        batches: domain -> clips of each batch, in order.
        before, after: source or target -> head -> figures, of the predictions before and after the steps.
        unadapted: what `evaluate` finds of the same checkpoint, without analyses.
    """

    format: int
    rule: str
    uses: str
    moment: Moment
    settings: dict[str, object]
    moved: dict[str, list[int]]
    batches: dict[str, list[int]]
    before: SetFigures
    after: SetFigures
    unadapted: Results

    def rows(self, clip_set: str) -> dict[str, dict[str, float]]:
        """Row of a table -> head -> top-1 (0 to 1) on a set of clips, the unadapted one first."""
        sets = {"unadapted": self.unadapted.deployed_sets, **self.adapted}
        return {row: {head: one.top1 for head, one in figures[clip_set].items()} for row, figures in sets.items()}

    @property
    def adapted(self) -> dict[str, SetFigures]:
        """Row of a table -> figures, of what uses target inputs."""
        return {
            f"{self.rule}, {when} the step (uses target inputs)": getattr(self, when) for when in ("before", "after")
        }


class _Copy:
    """A model that adapts, and goes back to the weights that it came with."""

    def __init__(
        self, model: MultiModalModel, rule: AdaptationRule, settings: AdaptSettings, *, precision: str
    ) -> None:
        self.model, self.rule, self.settings, self.precision = model, rule, settings, precision
        self.moved = rule.moved(model, settings)
        self._first = {key: value.clone() for key, value in model.state_dict().items()}
        self.reset()

    def reset(self) -> None:
        """The weights, statistics and optimizer of the beginning."""
        self.model.load_state_dict(self._first)
        for parameter in self.moved.values():
            parameter.requires_grad_(True).grad = None
        rates = {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay}
        self.optimizer = torch.optim.Adam(self.moved.values(), **rates)

    def step(self, batch: Batch) -> dict[Moment, dict[str, torch.Tensor]]:
        """Adapt to a batch; head -> logits [B, C] on the CPU, before and after."""
        first = heads = self._heads(batch)
        for left in reversed(range(self.settings.steps)):
            self.optimizer.zero_grad()
            self.rule.loss(heads["fused"], {k: v for k, v in heads.items() if k != "fused"}, self.settings).backward()
            self.optimizer.step()
            with torch.set_grad_enabled(left > 0):
                heads = self._heads(batch)
        return {
            "before": {name: logits.detach().cpu() for name, logits in first.items()},
            "after": {name: logits.cpu() for name, logits in heads.items()},
        }

    def _heads(self, batch: Batch) -> dict[str, torch.Tensor]:
        with autocast(batch.labels.device, self.precision):
            fused, unimodal = self.model(batch.inputs)
        return {"fused": fused.float(), **{name: logits.float() for name, logits in unimodal.items()}}


def batches_of(clips: np.ndarray, domain: int, settings: AdaptSettings) -> list[np.ndarray]:
    """Clips [n] of the domain-th domain in a seeded order, cut into batches; a last clip alone joins those before it.

    Raises:
        MbcdError: there is one clip.
    """
    if len(clips) < 2:
        raise MbcdError(
            "A domain with one clip to test cannot be adapted to: a batch of one has no spread of classes.",
            "Test all of its clips with dataset.target_split=all, given to `mbcd prepare` and here.",
        )
    order = clips[np.random.default_rng([settings.seed, domain]).permutation(len(clips))]
    parts = np.split(order, range(settings.batch_size, len(order), settings.batch_size))
    return [*parts[:-2], np.concatenate(parts[-2:])] if len(parts[-1]) == 1 else parts


def _streams(settings: AdaptSettings, dataset: Dataset, clip_set: ClipSet) -> Iterator[tuple[str, list[np.ndarray]]]:
    """(domain, batches of clips) of a set, domain by domain."""
    for name in clip_set.domains:
        domain = list(dataset.domains).index(name)
        clips = clip_set.clips[dataset.clips.domains[clip_set.clips] == domain]
        if len(clips):
            yield name, batches_of(clips, domain, settings)


def _seed(*words: int) -> None:
    """The same dropout for the same batch, whatever came before it."""
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1)


def adapted_predictions(
    copy: _Copy,
    dataset: Dataset,
    streams: Sequence[tuple[str, list[np.ndarray]]],
    *,
    device: torch.device,
    say: Say = SILENT,
) -> dict[Moment, Predictions]:
    """Adapt over the batches of each domain in turn; what was predicted of all their clips, before and after."""
    settings = copy.settings
    kept: list[Batch] = []
    logits: dict[Moment, list[dict[str, torch.Tensor]]] = {"before": [], "after": []}
    states = global_states()
    try:
        for name, parts in streams:
            if settings.reset == "target":
                copy.reset()
            for number, clips in enumerate(say.over(parts, f"adapting to {name}, batches")):
                if settings.reset == "batch":
                    copy.reset()
                (batch,) = dataset.batches(clips, batch_size=len(clips), training=False)
                _seed(settings.seed, list(dataset.domains).index(name), number)
                for when, heads in copy.step(batch.to(device)).items():
                    logits[when].append(heads)
                kept.append(replace(batch, inputs={}))
    finally:
        load_global_states(states)
    labels, domains, clips = (torch.cat([getattr(b, what) for b in kept]) for what in ("labels", "domains", "clips"))
    joined = {when: {head: torch.cat([one[head] for one in of]) for head in of[0]} for when, of in logits.items()}
    return {when: Predictions(labels, domains, clips, heads.pop("fused"), heads) for when, heads in joined.items()}


def adapt_run(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Mapping[str, Checkpoint],
    *,
    device: torch.device,
    run: Path | None = None,
    say: Say = SILENT,
) -> Adapted:
    """Adapt a copy of the deployed model of `checkpoints` to the test clips of each domain, as `settings.adapt` says.

    Args:
        settings: the run's, with those of evaluation and adaptation to use now.
        dataset: prepared, matching `settings`.
        checkpoints: best / last -> checkpoint.
        run: its folder, for the checksums of its files.

    Raises:
        MbcdError: a sealed target; a domain with one clip; nothing that the rule could move.
        SettingsError, CheckpointError: as of `evaluate`.
    """
    sets = clip_sets(settings, dataset)
    if any(one.sealed for one in sets):
        raise MbcdError(
            f"The target of {run or 'this run'} is sealed (dataset.seal_target), and accuracy on it would be a look.",
            f"Open it with `mbcd reveal {run or 'RUN'}` first.",
        )
    if len(dataset.label_names) < 2:
        raise MbcdError("With one class there is nothing to adapt.", "Name a run of two classes or more.")
    rule = RULES[settings.adapt.rule]
    own = {"lr": rule.lr, "weight_decay": rule.weight_decay}
    used = settings.adapt.model_copy(update={k: v for k, v in own.items() if getattr(settings.adapt, k) is None})
    streams = {one.name: list(_streams(used, dataset, one)) for one in sets}
    chosen = deployed(checkpoints)
    only = {chosen[0]: checkpoints[chosen[0]]}
    evaluated, model = evaluate_models(settings, dataset, only, device=device, say=say)
    unadapted = results_of(settings, dataset, only, evaluated, deployed=chosen, device=device)
    unadapted.checkpoints = checkpoint_checksums(run, only)
    copy = _Copy(model, rule, used, precision=settings.runtime.precision)
    figures: dict[Moment, SetFigures] = {"before": {}, "after": {}}
    for clip_set, of_set in streams.items():
        for when, predictions in adapted_predictions(copy, dataset, of_set, device=device, say=say).items():
            figures[when][clip_set] = figures_of_heads(
                predictions,
                label_names=list(dataset.label_names),
                domain_names=list(dataset.domains),
                k=settings.evaluation.top_k,
            )
            if bad := sum(head.unpredicted for head in figures[when][clip_set].values()):
                unadapted.warnings.append(
                    f"Adapted, it diverged: {bad} non-finite outputs on {clip_set} {when} the step."
                )
    return Adapted(
        format=ADAPTATION_FORMAT,
        rule=used.rule,
        uses=_USES,
        moment=rule.moment,
        settings=used.model_dump(mode="json"),
        moved={name: list(value.shape) for name, value in copy.moved.items()},
        batches={name: list(map(len, parts)) for of_set in streams.values() for name, parts in of_set},
        **figures,
        unadapted=unadapted,
    )


def run_table(adapted: Adapted) -> Table:
    """One run: every set of clips, unadapted, before and after the step."""
    plain = adapted.unadapted
    rows: list[list[str | Score]] = []
    for clip_set in plain.deployed_sets:
        for row, figures in {"unadapted": plain.deployed_sets, **adapted.adapted}.items():
            fused = figures[clip_set]["fused"]
            cells = [100 * fused.top1, 100 * fused.mean_class_accuracy, fused.loss]
            rows.append([plain.clips_name(clip_set), row, *map(Score, cells)])
    note = f"{_MARK} {adapted.rule.upper()}'s authors report what is predicted {adapted.moment} the step."
    columns = ["clips", "prediction", "top-1 (%)", "mean class (%)", "cross-entropy"]
    return Table("adaptation", f"{plain.title}: adapted by {adapted.rule.upper()}", columns, rows, note, blocks=True)


def adapt(
    paths: Sequence[Path],
    *,
    output: Path | None = None,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> Comparison:
    """Adapt the deployed model of every run, each from its own checkpoint; write what came out.

    A run's results go into RUN/adaptation/RULE; of several runs there are tables over seeds too.

    Args:
        paths: run folders, folders of runs, or of a sweep's tables.
        output: folder in place of RUN/adaptation of one run; of the tables over several (`adaptation`).
        config, sets, flags: settings over those of the training, as `opening.load_checkpoints` takes them.

    Raises:
        RunError: no run, or one that is not trained to its end; and what `adapt_run` raises.
        FileError: there is no place to write to.
    """
    runs = trained_at(paths)
    for run in runs:
        if not (run / DONE).is_file():
            raise RunError(f"{run} is not trained to its end.", "Go on with `mbcd train ... --resume` first.")
    warnings: list[str] = []
    done: dict[Path, Adapted] = {}
    files: dict[str, Path] = {}
    asked = {"config": config, "sets": sets, "flags": flags}
    if len(runs) > 1:
        _check_alike({run: opening.load_checkpoints(run_checkpoints(run), **asked)[0].adapt for run in runs})
    for run in runs:
        settings, dataset, checkpoints = opening.open_checkpoints(run_checkpoints(run), **asked)
        checkpoints = evaluated_checkpoints(settings.evaluation.checkpoints, checkpoints)
        place = (output if output and len(runs) == 1 else run / "adaptation") / settings.adapt.rule
        with folder_aside(place) as aside:  # before the work: it tells whether there is a place
            device = configure(settings.runtime)
            try:
                done[run] = adapt_run(settings, dataset, checkpoints, device=device, run=run, say=say)
            except MbcdError as error:
                if len(runs) == 1:
                    raise
                raise RunError(f"{run}: {error.message}", error.remedy) from error
            table = run_table(done[run])
            files = _placed(aside, place, [table], json_values(done[run]))
        warnings += [f"{run}: {text}" if len(runs) > 1 else text for text in done[run].unadapted.warnings]
    if len(runs) == 1:
        return Comparison(runs, warnings, [table], files)
    of_runs: list[Run] = [run_of_results(run, json_values(one.unadapted)) for run, one in done.items()]
    named, kinds = told_apart(of_runs)
    kept, repeats = distinct(named)
    rows = {run: one.rows(SOURCE if one.unadapted.target_domain is None else TARGET) for run, one in done.items()}
    first = done[runs[0]]
    tables = adapted_tables(kept, rows, rule=first.rule, mark=table.note)
    whole = Comparison([run.path for run in kept], [*warnings, *kinds, *repeats], tables, {})
    place = (output or Path("adaptation")) / first.rule
    with folder_aside(place) as aside:
        told = {**json_values(whole), "rule": first.rule, "uses": _USES, "settings": first.settings}
        whole.files.update(_placed(aside, place, tables, told))
    return whole


def _check_alike(adapt: Mapping[Path, AdaptSettings]) -> None:
    """Refuse runs whose settings of adaptation differ, before hours go into the first of them."""
    (first, wanted), *others = adapt.items()
    for run, settings in others:
        if differ := [f"adapt.{name}" for name, value in settings if value != getattr(wanted, name)]:
            raise RunError(
                f"{run} and {first} say other things of their adaptation ({', '.join(differ)}): one table is of one.",
                "Give them here, with --rule or --set adapt.NAME=VALUE.",
            )


def _placed(aside: Path, place: Path, tables: Sequence[Table], told: Mapping[str, object]) -> dict[str, Path]:
    """Write tables (CSV, Markdown) and adaptation.json with their checksums, in place of an earlier adaptation's."""
    texts = {f"{table.name}.csv": comma_separated(table) for table in tables}
    texts["adaptation.md"] = "\n".join(map(markdown, tables))
    sums = {name: of_file(write_text(aside / name, text)) for name, text in texts.items()}
    write_json(aside / _RESULTS, {**told, "files": sums})
    give_place(aside, place, [*texts, _RESULTS], earlier=place.glob("*.csv"))
    return {name: place / name for name in (*texts, _RESULTS)}
