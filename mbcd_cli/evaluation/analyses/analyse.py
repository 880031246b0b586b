"""What is measured beyond accuracy, of the deployed model: figures, and the files that show them.

Letters: N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.errors import CheckpointError, MbcdError, lines_of
from mbcd_cli.evaluation.analyses.corruptions import (
    Corrupted,
    corruption_means,
    corruptions,
    how_to_prepare,
    mean_records,
)
from mbcd_cli.evaluation.analyses.embedding import embeddings, spread
from mbcd_cli.evaluation.analyses.robustness import (
    Disturbance,
    Disturbed,
    DisturbedAccuracy,
    disturbed_accuracy,
    gaussian_shift,
    missing_modalities,
)
from mbcd_cli.evaluation.analyses.trust import ForeignClips, out_of_distribution, trust_figures
from mbcd_cli.evaluation.evaluator import Evaluated
from mbcd_cli.evaluation.report import plots
from mbcd_cli.evaluation.report.export import (
    OUTCOMES,
    ClipRow,
    HardestClips,
    hardest_rows,
    prediction_rows,
    write_hdf5,
)
from mbcd_cli.evaluation.report.results import Results
from mbcd_cli.files import write_rows
from mbcd_cli.model import MultiModalModel
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import TARGET
from mbcd_cli.scoring.predictions import Predictions, predict
from mbcd_cli.settings import Settings

_OWN = (
    *(f"plots/{kind}-*.png" for kind in ("confusion", "classes", "missing", "reliability", "risk-coverage", "tsne")),
    *(f"plots/{name}.png" for name in ("shift", "corruptions")),
    *("evaluation/predictions-*.csv", "evaluation/embeddings-*.h5", "evaluation/tsne.csv"),
    *(OUTCOMES, "report.html"),
)


@dataclass(slots=True)
class Analysis:
    """The deployed model under analysis, and what was found so far.

    Attributes:
        evaluated: the deployed model on each set of clips, the target first where there is one.
        results: gets the figures of every analysis.
        say: told how far it is.
        pictures: whether to draw plots.
        output: folder under which `plots/` and `evaluation/` are written.
        files: name -> path of everything written.
    """

    settings: Settings
    dataset: Dataset
    model: MultiModalModel
    evaluated: Sequence[Evaluated]
    results: Results
    device: torch.device
    output: Path
    say: Say = SILENT
    pictures: bool = True
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def main(self) -> Evaluated:
        """The set of clips that matters most: the target, without one the source."""
        return self.evaluated[0]

    @property
    def sets(self) -> dict[str, Predictions]:
        """Set of clips -> predictions."""
        return {on_set.clip_set.name: on_set.predictions for on_set in self.evaluated}

    def name(self, on_set: Evaluated) -> str:
        """`target (street)`."""
        return f"{on_set.clip_set.name} ({', '.join(on_set.clip_set.domains)})"

    def batches(self, clips: np.ndarray, label: str, dataset: Dataset | None = None) -> Iterable[Batch]:
        """The test view of `clips` [N], by default of the dataset evaluated on, with their progress."""
        size = self.settings.evaluation.batch_size
        batches = (dataset or self.dataset).batches(clips, batch_size=size, training=False)
        return self.say.over(batches, f"{label}, batches")

    def predict(self, batches: Iterable[Batch], *, features: bool = False) -> Predictions:
        """What the model says of `batches`, with its features where they are asked for."""
        precision = self.settings.runtime.precision
        return predict(self.model, batches, device=self.device, precision=precision, features=features)

    def plot(self, file: str) -> Path:
        """Path of a plot."""
        return self.output / "plots" / file

    def draw(self, name: str, plot: Callable[..., Path], *what: object, **how: object) -> None:
        """Make the plot `name`, unless there are to be none; one that fails is a warning, and costs no figures."""
        if not self.pictures:
            return
        try:
            self.files[name] = plot(*what, **how)
        except (MbcdError, OSError):
            raise
        except Exception as error:  # whatever a name or a value provokes in matplotlib
            self.results.warnings.append(f"The plot of {name} could not be drawn ({type(error).__name__}: {error}).")


def earlier(output: Path) -> list[Path]:
    """The plots and exports of an earlier evaluation in `output`."""
    return [path for pattern in _OWN for path in output.glob(pattern)]


def analyse(analysis: Analysis, *, ood: Dataset | None = None) -> None:
    """Run the analyses that `settings.evaluation.analyses` names, and the exports, into `analysis`.

    Args:
        ood: another prepared dataset with the same modalities, whose clips the model should not trust itself on.

    Raises:
        CheckpointError: the model cannot read `ood`.
        FileError: an export cannot be written.
    """
    steps: dict[str, Callable[[Analysis], None]] = {
        "missing": _missing,
        "shift": _shift,
        "corruptions": _corruptions,
        "trust": _trust,
        "insight": _insight,
    }
    for name, step in steps.items():
        if name in analysis.settings.evaluation.analyses:
            step(analysis)
    if ood is not None:
        _ood(analysis, ood)
    _export(analysis)


def _missing(a: Analysis) -> None:
    by_set = {}
    for on_set in a.evaluated:
        if not on_set.predictions.variants:
            continue
        name = on_set.clip_set.name
        figures = by_set[name] = missing_modalities(on_set.predictions)
        title = f"Missing modalities: {a.name(on_set)}"
        a.draw(f"missing modalities on {name}", plots.plot_subsets, figures, a.plot(f"missing-{name}.png"), title=title)
    a.results.missing = by_set or None


def _disturbed(
    a: Analysis,
    disturbances: list[Disturbance],
    key: str,
    *,
    title: str,
    xlabel: str,
    summary: Callable[[list[DisturbedAccuracy]], list[DisturbedAccuracy]] = lambda records: [],
) -> Disturbed:
    """Accuracy under some disturbances, and its plot, with the `summary` of the records."""
    name = a.main.clip_set.name
    if not disturbances:
        return Disturbed(name, [])
    batches, precision = a.batches(a.main.clip_set.clips, key), a.settings.runtime.precision
    records = disturbed_accuracy(a.model, batches, disturbances, device=a.device, precision=precision)
    title = f"{title}: {a.name(a.main)}"
    a.draw(key, plots.plot_disturbed, [*records, *summary(records)], a.plot(f"{key}.png"), title=title, xlabel=xlabel)
    return Disturbed(name, records)


def _shift(a: Analysis) -> None:
    evaluation = a.settings.evaluation
    shifts = [gaussian_shift(m, s, seed=evaluation.seed) for m in a.model.modalities for s in evaluation.shift]
    if shifts:
        xlabel = "standard deviation of the noise, in units of the input's own"
        a.results.shift = _disturbed(a, shifts, "shift", title="Gaussian shift of one modality", xlabel=xlabel)


def _corruptions(a: Analysis) -> None:
    there = {name: corruptions(name, a.dataset, a.model) for name in a.model.modalities}
    every = [disturbance for disturbances in there.values() for disturbance in disturbances]
    texts = {"title": "Corruption of one modality", "xlabel": "severity"}
    measured = _disturbed(a, every, "corruptions", summary=mean_records, **texts)
    lacking = [name for name, some in there.items() if not some and a.dataset.modalities[name].corruptions]
    if lacking:
        command = how_to_prepare(lacking[0], a.dataset)
        a.results.warnings.append(f"No corrupted views of {', '.join(lacking)} are prepared: `{command}` makes them.")
    means = corruption_means(measured.records)
    a.results.corruptions = Corrupted(measured.clips, measured.records, means, lacking)


def _trust(a: Analysis) -> None:
    trust = a.results.trust = trust_figures(a.sets, bins=a.settings.evaluation.bins)
    for on_set in a.evaluated:
        name, heads = on_set.clip_set.name, trust.sets[on_set.clip_set.name]
        tables = {"as trained": heads["fused"].reliability}
        if trust.temperature_fitted:
            tables[f"temperature {trust.temperature['fused']:.2f}"] = heads["fused"].reliability_scaled
        a.draw(
            f"reliability on {name}",
            plots.plot_reliability,
            tables,
            a.plot(f"reliability-{name}.png"),
            title=f"Reliability, fused: {a.name(on_set)}",
        )
        a.draw(
            f"risk and coverage on {name}",
            plots.plot_risk,
            {f"{head} (AURC {100 * figures.aurc:.1f} %)": figures.risk for head, figures in heads.items()},
            a.plot(f"risk-coverage-{name}.png"),
            title=f"Risk and coverage: {a.name(on_set)}",
        )


def _names(a: Analysis) -> dict[str, Sequence[str]]:
    """What clips, labels and domains are called, as exports take it."""
    return {"ids": a.dataset.clips.ids, "label_names": a.dataset.label_names, "domain_names": a.dataset.domains}


def _rows(a: Analysis, on_set: Evaluated) -> Iterator[ClipRow]:
    return prediction_rows(on_set.predictions, **_names(a))


def _insight(a: Analysis) -> None:
    evaluation = a.settings.evaluation
    if evaluation.hardest:
        a.results.hardest = HardestClips(a.main.clip_set.name, hardest_rows(_rows(a, a.main), evaluation.hardest))
    clips = spread(np.concatenate([on_set.clip_set.clips for on_set in a.evaluated]), evaluation.tsne_clips)
    sample = a.predict(a.batches(np.sort(clips), "embeddings"), features=True)
    maps = embeddings(sample, seed=evaluation.seed)
    target = [on_set.clip_set.domains for on_set in a.evaluated if on_set.clip_set.name == TARGET]
    names = [f"{d} (target)" if (d,) in target else d for d in a.dataset.domains]
    for space, points in maps.items():
        groups = {"class": (sample.labels, list(a.dataset.label_names)), "domain": (sample.domains, names)}
        path, title = a.plot(f"tsne-{space}.png"), f"t-SNE of the {space} embeddings"
        a.draw(f"t-SNE, {space}", plots.plot_map, points, groups, path, title=title)
    if maps:
        rows = _map_rows(a, sample, maps)
        a.files["t-SNE points"] = write_rows(a.output / "evaluation" / "tsne.csv", rows)


def _map_rows(a: Analysis, sample: Predictions, maps: Mapping[str, np.ndarray]) -> Iterator[ClipRow]:
    """A row per clip of `sample`: what it is, and its place in every map [N, 2]."""
    columns = (sample.clips.tolist(), sample.domains.tolist(), sample.labels.tolist())
    for n, (clip, domain, label) in enumerate(zip(*columns, strict=True)):
        row: ClipRow = {
            "id": a.dataset.clips.ids[clip],
            "domain": a.dataset.domains[domain],
            "label": a.dataset.label_names[label],
        }
        for space, points in maps.items():
            row |= {f"{space}_x": float(points[n, 0]), f"{space}_y": float(points[n, 1])}
        yield row


def _ood(a: Analysis, other: Dataset) -> None:
    name = other.name
    missing = [m for m in a.model.modalities if m not in other.modalities]
    if missing:
        raise CheckpointError(
            f"The out-of-distribution dataset {name} has no {', '.join(missing)}, which the model reads.",
            "Prepare it with the same modalities.",
        )
    clips = other.select(domains=other.domains, splits=("test",))
    try:
        foreign = a.predict(a.batches(clips, "out of distribution", other))
    except RuntimeError as error:
        raise CheckpointError(
            f"The model cannot read the out-of-distribution dataset {name}: {lines_of(error)[0]}",
            "Prepare it with the settings of the run (same geometry, spectrogram and cut).",
        ) from error
    against = {clip_set: out_of_distribution(predictions, foreign) for clip_set, predictions in a.sets.items()}
    a.results.ood = ForeignClips(name, len(foreign), against)


def _export(a: Analysis) -> None:
    wanted = a.settings.evaluation.export
    for on_set in a.evaluated:
        name, folder = on_set.clip_set.name, a.output / "evaluation"
        if "csv" in wanted:
            path = folder / f"predictions-{name}.csv"
            a.files[f"predictions on {name}"] = write_rows(path, _rows(a, on_set))
        if "hdf5" in wanted:
            featured = a.predict(a.batches(on_set.clip_set.clips, "export"), features=True)
            path = folder / f"embeddings-{name}.h5"
            a.files[f"embeddings on {name}"] = write_hdf5(featured, path, **_names(a))
