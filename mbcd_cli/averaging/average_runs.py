"""`mbcd average`: checkpoints of averages after the fact, each in a run folder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mbcd_cli import checksums
from mbcd_cli.averaging.recipes import KeptEpoch, Recipe, kept_epochs_of, profile, swad, window
from mbcd_cli.averaging.soups import SoupRule, check_alike, chosen, common_name
from mbcd_cli.averaging.weights import Bank, Statistics, of_snapshots, of_states
from mbcd_cli.data.dataset import CachedDataset
from mbcd_cli.errors import FOREIGN, CheckpointError, RunError
from mbcd_cli.files import clear, rename, sync_all, write_json, write_text
from mbcd_cli.json_values import OPTIONAL, json_values
from mbcd_cli.locks import folder_aside
from mbcd_cli.resolved import load_settings, method_label
from mbcd_cli.runs import opening
from mbcd_cli.runs.checkpoint import Checkpoint, Tensors, save_checkpoint
from mbcd_cli.runs.folder import AVERAGED, DONE, SETTINGS
from mbcd_cli.runs.names import run_checkpoints, trained_at
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.deployed import deployed_of, states_of
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import to_toml
from mbcd_cli.training.validation import HeadRecord

StatisticsSource = Literal["averaged", "recomputed"]


@dataclass(frozen=True, slots=True)
class Valley:
    """SWAD's N_s, N_e and r; None takes those of each run (`average.converge`, `leave`, `tolerance`)."""

    converge: int | None = None
    leave: int | None = None
    tolerance: float | None = None
    published: bool = False

    def constants(self, settings: Settings) -> dict[str, float]:
        """As `recipes.swad` takes them."""
        own = settings.average
        asked = {name: getattr(self, name) for name in ("converge", "leave", "tolerance")}
        return {name: getattr(own, name) if value is None else value for name, value in asked.items()}

    @property
    def called(self) -> tuple[str, str]:
        """As `WantedAverage.called`: with the constants, where they are not each run's."""
        name, label = ("swad-published", "SWAD as published") if self.published else ("swad", "SWAD")
        own = (self.converge, self.leave, self.tolerance)
        if own == (None, None, None):
            return name, label
        told = ["run" if value is None else f"{value:g}" for value in own]
        return "-".join([name, *told]), f"{label}, valley {','.join(told)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedAverage:
    """What is asked for, one of the four.

    Attributes:
        profile: relative width of a power function. window: first and last epoch. valley: SWAD. soup: of several runs.
        statistics: where batch norms' statistics come from.
    """

    profile: float | None = None
    window: tuple[int, int] | None = None
    valley: Valley | None = None
    soup: SoupRule | None = None
    statistics: StatisticsSource = "averaged"

    @property
    def called(self) -> tuple[str, str]:
        """In the name of a folder, and in tables: never a beta, since no average made afterwards has taught anyone."""
        if self.window is not None:
            first, last = self.window
            return f"window-{first}-{last}", f"epochs {first} to {last}"
        if self.valley is not None:
            return self.valley.called
        if self.soup is not None:
            return f"soup-{self.soup}", f"{self.soup} soup"
        return f"profile-{self.profile:g}", f"deployed profile {self.profile:g}"

    def place(self, runs: Sequence[Path]) -> Path:
        """The folder beside the (first) run that its average gets unless another is named."""
        common = common_name(load_settings(runs[0] / SETTINGS)) if self.soup else runs[0].name
        ending = "-recomputed" if self.statistics == "recomputed" else ""
        return runs[0].parent / f"{common}-{self.called[0]}{ending}"

    def recipe(self, kept: Sequence[KeptEpoch], settings: Settings) -> Recipe:
        """That of one run.

        Raises:
            SettingsError: no such window or profile.
        """
        if self.window is not None:
            return window(kept, *self.window)
        if self.valley is not None:
            return swad(kept, **self.valley.constants(settings), published=self.valley.published)
        assert self.profile is not None, "one is asked for"
        return profile(kept, self.profile)


@dataclass(frozen=True, slots=True)
class OfRun:
    """A run that an average is of: its weight in a soup, and its accuracy and loss alone on source validation."""

    run: str
    weight: float
    alone: HeadRecord


@dataclass(slots=True, kw_only=True)
class AverageMade:
    """What average.json holds.

    Attributes:
        run: its folder. label: what is deployed, in words.
        method: of its runs. seed: of the first of them.
        of: the runs. recipe: of one run's epochs: weights, and how well a profile is met.
        tried: of a soup: source-validation accuracy of the mean with each further run, from the best on.
        statistics: batch norms'. validation: on source validation; `trained`: of what the run deploys as it was trained
            (of several, the best).
        warnings: what a reader should know.
    """

    run: str
    label: str
    method: str
    seed: int
    of: list[OfRun]
    recipe: Recipe | None = field(default=None, metadata=OPTIONAL)
    tried: list[float] | None = field(default=None, metadata=OPTIONAL)
    statistics: Statistics
    validation: HeadRecord
    trained: HeadRecord
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class AveragesMade:
    """Every average that was made."""

    averages: list[AverageMade]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Averaged weights, and all that is known of them before they are measured.

    Attributes:
        checkpoint: of the run whose settings, uncounted steps and frozen weights are taken.
        state: the averaged state dict, with averaged statistics.
        bank: of that run. label, of, trained, recipe, tried: as in `AverageMade`.
    """

    checkpoint: Checkpoint
    state: Tensors
    bank: Bank
    label: str
    of: list[OfRun]
    trained: HeadRecord
    recipe: Recipe | None = None
    tried: list[float] | None = None


class Opened:
    """Runs, opened one after another; those of one dataset and cache share it."""

    def __init__(
        self, *, config: Path | None, sets: Sequence[str], flags: Mapping[str, object], say: Say = SILENT
    ) -> None:
        self._layers, self._say = {"config": config, "sets": sets, "flags": flags}, say
        self._datasets: list[tuple[object, CachedDataset]] = []

    def run(self, path: Path, *, statistics: StatisticsSource) -> tuple[Checkpoint, Bank]:
        """What a run deploys (its best epoch's checkpoint), and the bank of its settings.

        Raises:
            RunError: it is not trained to its end; MbcdError: it, or its cache, cannot be read.
        """
        if not (path / DONE).is_file():
            raise RunError(f"{path} is not trained to its end.", "Go on with `mbcd train ... --resume` first.")
        best = run_checkpoints(path).get("best")
        if best is None:
            raise RunError(f"{path} lacks its best checkpoint.", "`mbcd verify` says what is missing.")
        settings, checkpoints = opening.load_checkpoints({"best": best}, **self._layers)
        checkpoint = checkpoints["best"]
        key = settings.dataset, settings.cache, settings.modalities, settings.model.modalities, settings.runtime
        dataset = next((held for known, held in self._datasets if known == key), None)
        if dataset is None:
            dataset = opening.open_for_checkpoint(settings, checkpoint.label_names)
            self._datasets.append((key, dataset))
        device = configure(settings.runtime)
        return checkpoint, Bank(settings, dataset, statistics=statistics, device=device, say=self._say)


def average(
    paths: Sequence[Path],
    wanted: WantedAverage,
    *,
    output: Path | None = None,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> AveragesMade:
    """Make the average that is wanted of every run, or of every group of runs, each a run folder of its own.

    Args:
        paths: run folders, folders of runs, or of a sweep's tables.
        output: the folder of one average, or where those of several go; by default each is beside its (first) run.
        config, sets, flags: settings over those of the training, as `opening.load_checkpoints` takes them.

    Raises:
        RunError: a run that is not trained to its end or has no snapshots; a soup of one run, or of foreign ones; a
            folder that is in the way, or that several averages would have.
        SettingsError: no such window or profile.
    """
    runs = trained_runs(paths)
    opened = Opened(config=config, sets=sets, flags=flags, say=say)
    groups = soups_of(runs) if wanted.soup else [[run] for run in runs]
    for group in groups if wanted.soup else ():
        check_several(group)
    places: dict[Path, list[Path]] = {}
    for group in groups:
        place = wanted.place(group)
        if output is not None:
            place = output if len(groups) == 1 else output / place.name
        _check_free(place, group, places)
        places[place] = group
    made = []
    for place in say.over([*places], "averaging, runs"):
        group = places[place]
        made.append(
            _written(place, soup(group, opened, wanted) if wanted.soup else of_epochs(group[0], opened, wanted))
        )
    return AveragesMade(made)


def _check_free(place: Path, group: Sequence[Path], taken: Mapping[Path, Sequence[Path]]) -> None:
    """Refuse a place of what is no average, of what the average is of, or of another average of this command.

    Raises:
        RunError: it is such.
    """
    if place in taken:
        raise RunError(
            f"The averages of {taken[place][0]} and {group[0]} would both be {place}.",
            "Average them one after the other, each with its own --output.",
        )
    if place.resolve() in {run.resolve() for run in group}:
        raise RunError(f"{place} is in the way: the average is of it.", "Name another folder with --output.")
    if place.exists() and not (place / AVERAGED).is_file() and (place.is_file() or any(place.iterdir())):
        raise RunError(f"{place} is in the way: it holds no average.", "Name another folder with --output.")


def trained_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs at these paths, in order; of folders of runs, those that are no averages themselves.

    Raises:
        RunError: there is none.
    """
    found = [run for run in trained_at(paths) if run in paths or not (run / AVERAGED).is_file()]
    if not found:
        raise RunError(f"{', '.join(map(str, paths))}: all runs here are averages.", "Name what they were made of.")
    return found


def soups_of(runs: Sequence[Path]) -> list[list[Path]]:
    """The runs of each soup: of one dataset, method, modalities and target."""
    groups: dict[object, list[Path]] = {}
    for run in runs:
        settings = load_settings(run / SETTINGS)
        groups.setdefault((settings.dataset.name, common_name(settings)), []).append(run)
    return list(groups.values())


def check_several(group: Sequence[Path]) -> None:
    """Refuse a soup of one run.

    Raises:
        RunError: it is one.
    """
    if len(group) == 1:
        raise RunError(
            f"No other run has the dataset, method, modalities and target of {group[0]}: a soup is of several.",
            "Name more of its runs, of other seeds or hyper-parameters, or leave it out.",
        )


def of_epochs(run: Path, opened: Opened, wanted: WantedAverage) -> Mixed:
    """The average of a run's epochs.

    Raises:
        MbcdError: as `average`.
    """
    if (run / AVERAGED).is_file():
        raise RunError(f"{run} is an average itself.", "Name the run that it was made of.")
    kept = kept_epochs_of(run)
    checkpoint, bank = opened.run(run, statistics=wanted.statistics)
    recipe, alone = wanted.recipe(kept, checkpoint.settings), trained_record(checkpoint)
    return Mixed(
        checkpoint=checkpoint,
        state=of_snapshots(run, recipe.parts, checkpoint.student),
        bank=bank,
        label=wanted.called[1],
        of=[OfRun(str(run), 1.0, alone)],
        trained=alone,
        recipe=recipe,
    )


def soup(runs: Sequence[Path], opened: Opened, wanted: WantedAverage) -> Mixed:
    """The soup of several runs, of what each deploys.

    Raises:
        MbcdError: as `average`.
    """
    assert wanted.soup is not None, "a soup is asked for"
    pairs = {run: opened.run(run, statistics=wanted.statistics) for run in runs}
    check_alike({run: checkpoint for run, (checkpoint, _) in pairs.items()})
    checkpoints, bank = [checkpoint for checkpoint, _ in pairs.values()], pairs[runs[0]][1]
    states = [dict(states_of(one)[deployed_of(states_of(one))]) for one in checkpoints]

    def accuracy(numbers: Sequence[int]) -> float:
        model, _ = bank.model(checkpoints[0], of_states([states[k] for k in numbers]))
        return bank.validated(model).accuracy

    alone = [trained_record(checkpoint) for checkpoint in checkpoints]
    kept, tried = chosen(alone, wanted.soup, accuracy)
    weights = [1 / len(kept) if k in kept else 0.0 for k in range(len(runs))]
    return Mixed(
        checkpoint=checkpoints[kept[0]],
        state=of_states([states[k] for k in kept]),
        bank=bank,
        label=f"{wanted.called[1]} of {len(runs)} runs",  # not how many it keeps: soups of all targets are one row
        of=[OfRun(str(run), weight, one) for run, weight, one in zip(runs, weights, alone, strict=True)],
        trained=alone[kept[0]],
        tried=tried or None,
    )


def trained_record(checkpoint: Checkpoint) -> HeadRecord:
    """What a run's selected epoch is worth on source validation, by its own record."""
    try:
        best = checkpoint.best or {}
        return HeadRecord(float(best["accuracy"]), float(best["loss"]))
    except FOREIGN as error:
        raise CheckpointError(
            "A checkpoint does not say what its epoch is worth on source validation.", "Train that run again."
        ) from error


def _written(place: Path, mixed: Mixed) -> AverageMade:
    """The run folder of an average, whole or not at all, in place of an average that is there; what it holds."""
    checkpoint = mixed.checkpoint
    model, statistics = mixed.bank.model(checkpoint, mixed.state)
    recomputed = statistics.source == "recomputed"
    made = AverageMade(
        run=str(place),
        label=mixed.label + (", statistics recomputed" if recomputed else ""),
        method=method_label(checkpoint.settings),
        seed=checkpoint.settings.training.seed,
        of=mixed.of,
        recipe=mixed.recipe,
        tried=mixed.tried,
        statistics=statistics,
        validation=mixed.bank.validated(model),
        trained=mixed.trained,
        warnings=[] if mixed.recipe is None else list(mixed.recipe.warnings),
    )
    told = json_values(made)
    epoch = checkpoint.epoch if mixed.recipe is None else max(part.epoch for part in mixed.recipe.parts)
    averaged = replace(
        checkpoint,
        epoch=epoch,
        student={name: value.cpu() for name, value in model.state_dict().items()},
        teacher=None,
        history=[],
        best={"epoch": epoch, **json_values(made.validation)},
        warnings=made.warnings,
        training=None,
        averaged=told,
    )
    with folder_aside(place) as aside:
        save_checkpoint(aside / "checkpoints" / "best.pt", averaged)
        write_text(aside / SETTINGS, to_toml(checkpoint.settings, stamped=True))
        write_json(aside / AVERAGED, told)
        write_json(aside / DONE, {"averaged": made.label, "files": checksums.of_files(aside, but=(DONE,))})
        sync_all(aside)
        if place.exists():  # what tells that it is an average goes last: where a kill leaves it, it is replaced again
            clear(place, but=(AVERAGED,))
            clear(place)
        rename({aside: place})
    return made
