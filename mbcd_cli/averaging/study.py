"""What averages after the fact are worth over many runs: target accuracy and flatness, by method.

What is measured is kept line by line in `study.jsonl`: the same command goes on where it was killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mbcd_cli import checksums
from mbcd_cli.averaging.average_runs import (
    Mixed,
    Opened,
    StatisticsSource,
    Valley,
    WantedAverage,
    check_several,
    of_epochs,
    soup,
    soups_of,
    trained_runs,
)
from mbcd_cli.averaging.recipes import kept_epochs_of
from mbcd_cli.averaging.soups import SoupRule, check_alike
from mbcd_cli.averaging.study_plot import plot_study
from mbcd_cli.averaging.weights import Bank
from mbcd_cli.averaging.worth import TRAINED, Worth, study_table, summarised
from mbcd_cli.errors import MbcdError, RunError
from mbcd_cli.evaluation.report.comparison import Comparison
from mbcd_cli.evaluation.report.evaluated import Run, distinct, grouped, told_apart
from mbcd_cli.evaluation.report.results import weights_settings
from mbcd_cli.evaluation.report.tables import comma_separated, markdown
from mbcd_cli.files import append_record, make_folder, read_records, write_json, write_text
from mbcd_cli.json_values import json_values
from mbcd_cli.landscape.bench import Bench
from mbcd_cli.landscape.directions import move
from mbcd_cli.landscape.sharpness import worst_case
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import ALONE
from mbcd_cli.resolved import load_settings, method_label
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.runs.folder import DONE, SETTINGS
from mbcd_cli.runs.names import run_checkpoints
from mbcd_cli.runtime import float32_products
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import TARGET, ClipSet, clip_sets
from mbcd_cli.scoring.deployed import build_models, deployed_of
from mbcd_cli.scoring.metrics import top1
from mbcd_cli.scoring.predictions import predict

PROFILES = (0.05, 0.1, 0.15, 0.2)
"""Relative widths that are compared."""
LAST = "student, last epoch"
_SOUPS: tuple[SoupRule, ...] = ("uniform", "greedy", "restricted")
_WORTH = TypeAdapter(Worth)
_LOG, _RESULTS = "study.jsonl", "study.json"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An average to measure: its name, the runs it is of, the bank of the first, and how its model comes about."""

    average: str
    runs: Sequence[Path]
    bank: Bank
    make: Callable[[], tuple[MultiModalModel, float | None]]
    seed: int | None = None


def study_averages(
    paths: Sequence[Path],
    *,
    statistics: StatisticsSource = "averaged",
    output: Path | None = None,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> Comparison:
    """Measure every average of every run, and the soups of those that began alike; tables, one figure and study.json.

    Args:
        paths: run folders, folders of runs, or of a sweep's tables.
        statistics: of batch norms, of what is averaged here.
        output: folder for what is written; None: `averages`.
        config, sets, flags: settings over those of the training, as `opening.load_checkpoints` takes them.

    Raises:
        MbcdError: a run without target or snapshots, one that is sealed, and what `average` raises.
    """
    output = output or Path("averages")
    make_folder(output)
    opened = Opened(config=config, sets=sets, flags=flags, say=say)
    names, warnings = kinds_of(trained_runs(paths))
    runs = [*names]
    told: Counter[str] = Counter()
    candidates = [one for run in runs for one in _of_run(run, opened, statistics, told)]
    warnings += [f"{text} ({count} of {len(runs)} runs)" for text, count in told.items()]
    candidates += _soups(runs, opened, statistics, warnings)
    known = dict(filter(None, map(_known, read_records(output / _LOG))))
    found = []
    for one in say.over(candidates, "measuring averages"):
        key = _key(one, statistics)
        if key not in known:
            known[key] = _measured(one, output, say)
            append_record(output / _LOG, {"key": key, "worth": json_values(known[key])})
        found.append(replace(known[key], method=names[one.runs[0]]))
    rows = summarised(found)
    table = study_table(rows)
    files = {
        "figure": plot_study(rows, output / "study.png"),
        "study.csv": write_text(output / "study.csv", comma_separated(table)),
        "table": write_text(output / "study.md", markdown(table)),
    }
    sums = {path.relative_to(output).as_posix(): checksums.of_file(path) for path in files.values()}
    results = {"runs": [str(run) for run in runs], "worth": json_values(found), "warnings": warnings, "files": sums}
    files["results"] = write_json(output / _RESULTS, results)
    return Comparison(runs, warnings, [table], files)


def kinds_of(runs: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """Run -> what its method is called, without runs that repeat another; and warnings.

    Runs of several datasets, sets of modalities or settings have these in their names; those of other hyper-parameters,
    which a soup may be of, are averaged, and told of.
    """
    plain = [_as_run(run) for run in runs]
    labels = {run.path: run.method for run in plain}
    kept, warnings = distinct(told_apart(plain)[0])
    groups = grouped(kept, lambda run: (run.dataset, "+".join(run.modalities), run.setting))
    names: dict[Path, str] = {}
    kinds: dict[str, set[str]] = {}
    for about, group in groups:
        for run in group:
            label = labels[run.path]
            names[run.path] = f"{label} ({', '.join(about)})" if len(groups) > 1 else label
            kinds.setdefault(names[run.path], set()).add(run.method)
    for name, several in kinds.items():
        if len(several) > 1:
            warnings.append(f"{name}: means are over runs of {len(several)} kinds ({'; '.join(sorted(several))}).")
    return names, warnings


def _as_run(path: Path) -> Run:
    """A run, by its settings alone."""
    settings = load_settings(path / SETTINGS)
    training = settings.training
    return Run(
        path=path,
        dataset=str(settings.dataset.name),
        modalities=settings.model.modalities,
        method=method_label(settings),
        target=training.target_domain,
        sources=training.source_domains,
        seed=training.seed,
        heads={"fused": 0.0},
        in_domain=None,
        settings=weights_settings(settings),
    )


def _known(record: Mapping[str, Any]) -> tuple[str, Worth] | None:
    """A measurement of before, with its key; None of a line that holds none."""
    try:
        return str(record["key"]), _WORTH.validate_python(record["worth"])
    except (KeyError, ValidationError):
        return None


def _key(one: _Candidate, statistics: StatisticsSource) -> str:
    """What a measurement depends on: the runs' files, the average, and how it is measured."""
    settings = one.bank.settings
    how = [settings.landscape.model_dump_json(), settings.dataset.target_split, settings.runtime.precision]
    parts = [one.average, statistics, *how, *map(":".join, sorted(one.bank.dataset.fingerprints.items()))]
    return checksums.of_text("\n".join([*parts, *(checksums.of_file(run / DONE) for run in one.runs)]))


def _of_run(run: Path, opened: Opened, statistics: StatisticsSource, told: Counter[str]) -> Iterator[_Candidate]:
    """As trained, the last student, and every average of its epochs; what recipes warn of is counted in `told`."""
    checkpoint, bank = opened.run(run, statistics=statistics)
    _target(run, bank)
    kept, seed = kept_epochs_of(run), checkpoint.settings.training.seed

    def plain(name: str, wanted: str) -> tuple[MultiModalModel, None]:
        weights = load_checkpoint(run_checkpoints(run)[name])
        models = build_models(bank.settings, bank.dataset, weights, device=bank.device, source=name)
        return models[wanted or deployed_of(models)], None

    yield _Candidate(TRAINED, [run], bank, lambda: plain("best", ""), seed)
    yield _Candidate(LAST, [run], bank, lambda: plain("last", "student"), seed)
    wanted = [WantedAverage(profile=sigma, statistics=statistics) for sigma in PROFILES]
    last = len(kept)
    firsts = dict.fromkeys(last - size + 1 for size in (-(-last // 4), -(-last // 2)))
    wanted += [WantedAverage(window=(first, last), statistics=statistics) for first in firsts]
    wanted += [WantedAverage(valley=Valley(published=how), statistics=statistics) for how in (False, True)]
    for one in wanted:
        recipe = one.recipe(kept, checkpoint.settings)
        if recipe.fit is None:  # how well profiles are met is a column
            told.update(f"{one.called[1]}: {text}" for text in recipe.warnings)
        yield _Candidate(one.called[1], [run], bank, partial(_model, partial(of_epochs, run, opened, one)), seed)


def _soups(
    runs: Sequence[Path], opened: Opened, statistics: StatisticsSource, warnings: list[str]
) -> Iterator[_Candidate]:
    """Those of runs that began alike; others are told of."""
    for group in soups_of(runs):
        try:
            check_several(group)
            pairs = {run: opened.run(run, statistics=statistics) for run in group}
            check_alike({run: checkpoint for run, (checkpoint, _) in pairs.items()})
        except RunError as error:
            warnings.append(f"No soup: {error.message}")
            continue
        bank = pairs[group[0]][1]
        for rule in _SOUPS:
            wanted = WantedAverage(soup=rule, statistics=statistics)
            yield _Candidate(wanted.called[1], group, bank, partial(_model, partial(soup, group, opened, wanted)))


def _model(mix: Callable[[], Mixed]) -> tuple[MultiModalModel, float | None]:
    mixed = mix()
    fit = None if mixed.recipe is None else mixed.recipe.fit
    return mixed.bank.model(mixed.checkpoint, mixed.state)[0], None if fit is None else fit.distance


def _target(run: Path, bank: Bank) -> ClipSet:
    """The clips of a run's target.

    Raises:
        MbcdError: it has none, or a sealed one.
    """
    target = next((found for found in clip_sets(bank.settings, bank.dataset) if found.name == TARGET), None)
    if target is None:
        raise MbcdError(f"{run} has no target domain to measure on.", "Name runs that have one.")
    if target.sealed:
        raise MbcdError(
            f"The target of {run} is sealed (dataset.seal_target), and accuracy on it would be a look.",
            f"Open it with `mbcd reveal {run}` first.",
        )
    return target


def _measured(one: _Candidate, output: Path, say: Say) -> Worth:
    """Accuracies and loss increases of a candidate."""
    bank = one.bank
    settings, dataset = bank.settings, bank.dataset
    model, distance = one.make()
    batches = dataset.batches(
        _target(one.runs[0], bank).clips, batch_size=settings.evaluation.batch_size, training=False
    )
    said = predict(model, batches, device=bank.device, precision=settings.runtime.precision)
    increase, worst = loss_increases(Bench(settings, dataset, output, bank.device, False, ALONE, say), model)
    return Worth(
        average=one.average,
        method=method_label(settings),
        domain=str(settings.training.target_domain),
        seed=one.seed,
        target=100 * top1(said.fused, said.labels),
        source=100 * bank.validated(model).accuracy,
        increase=increase,
        worst=worst,
        distance=distance,
    )


@float32_products()
def loss_increases(bench: Bench, model: MultiModalModel) -> tuple[float, float]:
    """(mean over random directions at the largest of `landscape.radii`, at worst at the smallest but 0), in nats."""
    study = bench.study("average", model)
    chosen, (centre, _) = study.settings, study.centre()
    radii = [radius for radius in sorted(chosen.radii) if radius > 0]
    if not radii:
        raise MbcdError("landscape.radii: flatness needs a radius above 0.", "Give one, such as 0.5.")
    sphere, loss = study.sphere, study.loss
    directions = (sphere.sample(seed=chosen.seed, index=index) for index in range(chosen.directions))
    losses = [float(loss.measure(move(loss.start, [one], [radii[-1]]))[0]) for one in directions]
    worst, _ = worst_case(loss, sphere, radius=radii[0], steps=chosen.ascent_steps, seed=chosen.seed)
    return float(np.mean(losses)) - centre, worst - centre
