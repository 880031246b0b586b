"""An equal search: as many configurations for every method, target and set of modalities, the best by source
validation trained anew.

Nothing here reads a figure of the target.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mbcd_cli.errors import FOREIGN, FileError, SettingsError
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.files import read_records
from mbcd_cli.launch.unit import read_failure
from mbcd_cli.resolved import validate
from mbcd_cli.runs.names import run_name
from mbcd_cli.scoring.deployed import deployed_checkpoint, deployed_of
from mbcd_cli.settings import Range, Settings
from mbcd_cli.settings.ranges import searched
from mbcd_cli.settings.sources import Layer, merge, nest
from mbcd_cli.sweep.plan import Cell, with_settings
from mbcd_cli.sweep.state import state
from mbcd_cli.training.trainer import better
from mbcd_cli.training.validation import HeadRecord

FORMS = ("equal", "mmdg-bench")
"""Ours, and the public benchmark's: the ranges that it searches, and the chosen trial among the runs reported."""
TRIAL_SEEDS = range(1_000_000, 10_000_000)
"""Seeds of trials; those of reported runs lie below."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration that is tried.

    Attributes:
        base: the cell as it is planned without a search; number: 0 is its own configuration, others are drawn.
        drawn: setting -> value. cell: the training.
    """

    base: Cell
    number: int
    drawn: Mapping[str, float]
    cell: Cell


@dataclass(frozen=True, slots=True)
class Choice:
    """The best trial of a cell, and how good it is on the source domains' held-out clips."""

    trial: Trial
    validation: HeadRecord


@dataclass(frozen=True, slots=True)
class SearchedSetting:
    """A setting that is searched between two bounds, and the rows of the table for which it is."""

    setting: str
    low: float
    high: float
    methods: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is tried for which cells.

    Attributes:
        bases: a cell each for what is searched; their seeds say nothing.
        count: random configurations beside the default one. seeds: of the runs that are reported.
        benchmark: as the public benchmark does it (`FORMS`). fixed: settings that are not searched.
    """

    bases: Sequence[Cell]
    count: int
    seeds: Sequence[int]
    benchmark: bool = False
    fixed: frozenset[str] = frozenset()

    def ranges(self, base: Cell) -> dict[str, tuple[Range, float]]:
        """Setting -> what it is drawn from, and its value without a search."""
        return {
            path: (drawn_from, value)
            for path, drawn_from, value in searched(base.settings)
            if path not in self.fixed
            and path not in dict(base.values)
            and not (self.benchmark and drawn_from.benchmark is None)
        }

    def settings(self) -> list[SearchedSetting]:
        """Everything that is searched, in the order of the tree."""
        rows: dict[tuple[str, float, float], list[str]] = {}
        for base in self.bases:
            for path, (drawn_from, value) in self.ranges(base).items():
                rows.setdefault((path, *drawn_from.bounds(value)), []).append(base.label())
        return [SearchedSetting(*row, list(dict.fromkeys(methods))) for row, methods in rows.items()]

    def trials(self) -> list[Trial]:
        """All of them, each with its own seed.

        A draw depends on nothing but the dataset, the modalities, the domains, its number and the setting, of a
        method's own settings on the method too: trials of a shorter search are a longer one's first, other methods
        change nothing, and trial k has the same learning rate in all of them. `random.Random` promises the same numbers
        on every machine and in every version; run folders that are to be found again need that.
        """
        made = []
        for base in self.bases:
            where = base.settings.dataset.name, base.settings.model.modalities, _domains_of(base)
            first_seed = int(_share(where, "seed", base.method, self.benchmark) * len(TRIAL_SEEDS))
            for number in range(self.count + 1):
                drawn = {}
                for path, (drawn_from, value) in (self.ranges(base) if number else {}).items():
                    share = _share(where, number, path, base.method if path.startswith("method.") else "")
                    drawn[path] = drawn_from.draw(share, value, benchmark=self.benchmark)
                seed = TRIAL_SEEDS[(first_seed + number) % len(TRIAL_SEEDS)]
                settings = _configured(base.settings, drawn, seed)
                if not self.benchmark:  # of a trial that is not reported, its accuracy is all that is wanted
                    short = settings.evaluation.model_copy(update={"analyses": (), "report": False})
                    settings = settings.model_copy(update={"evaluation": short})
                made.append(Trial(base, number, drawn, replace(with_settings(base, settings), trial=number)))
        return made

    def choose(self, trials: Sequence[Trial], *, over: bool) -> tuple[list[Choice], list[str]]:
        """The best trial of every cell by its validation accuracy, then loss; of equal ones the first.

        Args:
            over: whether trials that are not done are lost; else nothing is chosen where one may still come.

        Returns:
            The choices, and what there is to say of trials that failed or are not finished.
        """
        choices, notes = [], []
        for base in self.bases:
            best: Choice | None = None
            own = [trial for trial in trials if trial.base is base]
            waiting = [] if over else [t for t in own if state(t.cell.folder) not in ("done", "failed")]
            for trial in own:
                figures = self._validation(trial)
                if figures is None and trial not in waiting:
                    why = read_failure(trial.cell.folder) or f"no validation in {trial.cell.folder}"
                    notes.append(f"{trial.cell.name} failed and counts as the worst: {why.splitlines()[0]}")
                elif figures is not None and (best is None or better(figures, best.validation)):
                    best = Choice(trial, figures)
            if best is not None and not waiting:
                choices.append(best)
            else:
                why = f"{len(waiting)} of {len(own)} trials are not finished" if waiting else "all trials failed"
                notes.append(f"{base.name.rpartition(',')[0]}: {why}, so that nothing is chosen.")
        return choices, notes

    def _validation(self, trial: Trial) -> HeadRecord | None:
        """Of the deployed checkpoint (the public benchmark: of the best epoch), None where there is none."""
        if state(trial.cell.folder) != "done":
            return None
        try:
            by_epoch = {record["epoch"]: record for record in read_records(trial.cell.folder / "metrics.jsonl")}
            last = by_epoch[max(by_epoch)]
            best = self.benchmark or deployed_checkpoint(trial.cell.settings.evaluation.checkpoints) == "best"
            held_out = by_epoch[last["best_epoch"] if best else last["epoch"]]["validation"]
            fused = held_out[deployed_of(held_out)]["fused"]
            loss = math.inf if fused["loss"] is None else float(fused["loss"])
            return HeadRecord(float(fused["accuracy"]), loss)
        except (FileError, *FOREIGN):
            return None

    def reported(self, choice: Choice) -> list[Cell]:
        """The chosen configuration with fresh seeds; the public benchmark: the chosen trial and one seed less."""
        trial = choice.trial
        cells = self._fresh(trial.base, trial.drawn)
        return [trial.cell, *cells[:-1]] if self.benchmark else cells

    def expected(self, trials: Sequence[Trial]) -> list[Cell]:
        """Runs that follow the trials; where nothing is chosen yet, stand-ins that cost as much."""
        chosen = {choice.trial.base.key: choice for choice in self.choose(trials, over=False)[0]}
        cells = []
        for base in self.bases:
            known = chosen.get(base.key)
            for cell in self.reported(known or Choice(Trial(base, 0, {}, replace(base, trial=0)), HeadRecord(0, 0))):
                name = cell.folder.name if known else f"{run_name(cell.settings)}-chosen"
                key = cell.key if known else f"chosen-{cell.key}"
                cells += [replace(cell, key=key, folder=cell.folder.with_name(name))] if cell.trial is None else []
        return cells

    def _fresh(self, base: Cell, drawn: Mapping[str, float]) -> list[Cell]:
        return [with_settings(base, _configured(base.settings, drawn, seed)) for seed in self.seeds]

    def tables(self, choices: Sequence[Choice]) -> list[Table]:
        """What was chosen: a table per dataset and set of modalities."""
        groups: dict[tuple[str, str], list[list[str | Score]]] = {}
        for choice in choices:
            base, trial = choice.trial.base, choice.trial
            where = str(base.settings.dataset.name), "+".join(base.settings.model.modalities)
            told = ", ".join(f"{path} {value:g}" for path, value in trial.drawn.items())
            figures = [Score(100 * choice.validation.accuracy), f"{choice.validation.loss:.2g}"]
            row = [base.label(), _domains_of(base), str(trial.number), *figures, told or "default"]
            groups.setdefault(where, []).append(row)
        columns = ["method", "domain", "trial", "validation", "loss", "configuration"]
        return [
            Table(
                f"{'-'.join(where).replace('+', '-')}-search",
                f"{', '.join(where)}: configurations chosen by validation on source domains",
                columns,
                rows,
                self.note(),
            )
            for where, rows in groups.items()
        ]

    def note(self) -> str:
        """How the configurations were found, in a sentence or two."""
        tried = f"Trial 0 is the default, {self.count} more are drawn, each with a seed of its own."
        if not self.benchmark:
            return f"{tried} Other tables: what was chosen, trained anew with {len(self.seeds)} fresh seeds."
        return (
            f"{tried} Ranges and report are the public benchmark's (mmdg-bench): other tables hold the chosen trial, "
            f"which luck has helped to be chosen, and {len(self.seeds) - 1} reruns."
        )


def check_search(count: int | None, form: str, seeds: Sequence[int]) -> None:
    """Refuse a search that cannot be.

    Raises:
        SettingsError: no such form, a form without a search, no configuration to draw, or seeds among those of trials.
    """
    if form not in FORMS:
        raise SettingsError(f"There is no search protocol {form!r}.", f"Use one of {', '.join(FORMS)}.")
    if count is None:
        if form != FORMS[0]:
            raise SettingsError(f"--search-protocol {form} is about a search.", "Add --search 10.")
        return
    if count < 1:
        raise SettingsError(f"--search {count}: no configuration is drawn.", "Use --search 10, or leave it out.")
    if max(seeds) >= TRIAL_SEEDS.start:
        raise SettingsError(
            f"--seeds {max(seeds)}: a search's trials may have that seed.", f"Use seeds below {TRIAL_SEEDS.start}."
        )


def _share(*words: object) -> float:
    """A number in 0..1 that these words fix."""
    return random.Random(repr(words)).random()


def _domains_of(base: Cell) -> str:
    training = base.settings.training
    sources = "+".join(training.source_domains)
    if training.target_domain is None:
        return sources
    return f"{sources} to {training.target_domain}" if len(training.source_domains) == 1 else training.target_domain


def _configured(settings: Settings, drawn: Mapping[str, float], seed: int) -> Settings:
    """The settings with what is drawn, and a seed.

    Raises:
        SettingsError: a setting's range leaves what is allowed (a method of somebody's own).
    """
    values: dict[str, object] = settings.model_dump(mode="json", exclude_none=True)
    draws: dict[str, object] = {}
    for path, value in {**drawn, "training.seed": seed}.items():
        draws = merge(draws, nest(path, value))
    return validate(merge(values, draws), [Layer("the range that is searched", draws)])
