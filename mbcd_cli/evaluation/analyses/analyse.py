"""What is measured beyond accuracy, of the deployed model: figures, and the files that show them.

Letters: N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch, Clip
from mbcd_cli.errors import CheckpointError, MbcdError, MediaError
from mbcd_cli.evaluation.analyses.corruptions import SPECTROGRAM_NOISE, corruptions
from mbcd_cli.evaluation.analyses.embedding import embeddings, spread
from mbcd_cli.evaluation.analyses.robustness import (
    Disturbance,
    disturbed_accuracy,
    gaussian_shift,
    missing_modalities,
    shapley,
)
from mbcd_cli.evaluation.analyses.trust import out_of_distribution, trust
from mbcd_cli.evaluation.analyses.waveform import sound_corruptions
from mbcd_cli.evaluation.evaluator import Evaluated
from mbcd_cli.evaluation.report import plots
from mbcd_cli.evaluation.report.export import hardest_rows, prediction_rows, write_hdf5
from mbcd_cli.files import remove, rename, write_rows
from mbcd_cli.model import MultiModalModel
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import TARGET
from mbcd_cli.scoring.predictions import Predictions, predict
from mbcd_cli.settings import DatasetSettings, Settings

_OWN = (
    *(f"plots/{kind}-*.png" for kind in ("confusion", "classes", "missing", "reliability", "risk-coverage", "tsne")),
    *(f"plots/{name}.png" for name in ("shift", "corruptions")),
    *("evaluation/predictions-*.csv", "evaluation/embeddings-*.h5", "evaluation/tsne.csv", "report.html"),
)


@dataclass(slots=True)
class Analysis:
    """The deployed model under analysis, and what was found so far.

    Attributes:
        results: the deployed model on each set of clips, the target first where there is one.
        clips: the dataset's clip table with its media, and the limits on bad media; None where they are not at hand.
        clips_missing: why `clips` is None.
        say: told how far it is.
        pictures: whether to draw plots.
        output: folder under which `plots/` and `evaluation/` are written.
        figures: JSON-able, by name of the analysis.
        files: name -> path of everything written.
        warnings: plots that could not be drawn.
    """

    settings: Settings
    dataset: Dataset
    model: MultiModalModel
    results: Sequence[Evaluated]
    device: torch.device
    output: Path
    clips: tuple[Sequence[Clip], DatasetSettings] | None = None
    clips_missing: str = "the dataset's media were not looked for"
    say: Say = SILENT
    pictures: bool = True
    figures: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def main(self) -> Evaluated:
        """The set of clips that matters most: the target, without one the source."""
        return self.results[0]

    @property
    def sets(self) -> dict[str, Predictions]:
        """Set of clips -> predictions."""
        return {one.clip_set.name: one.predictions for one in self.results}

    def name(self, one: Evaluated) -> str:
        """`target (street)`."""
        return f"{one.clip_set.name} ({', '.join(one.clip_set.domains)})"

    def batches(self, clips: np.ndarray, label: str) -> Iterable[Batch]:
        """The test view of `clips`, with their progress."""
        size = self.settings.evaluation.batch_size
        return self.say.over(self.dataset.batches(clips, batch_size=size, training=False), f"{label}, batches")

    def plot(self, file: str) -> Path:
        """Path of a plot."""
        return self.output / "plots" / file

    def draw(self, name: str, plot: Callable[..., Path], *what: Any, **how: Any) -> None:
        """Make the plot `name`, unless there are to be none; one that fails is a warning, and costs no figures."""
        if not self.pictures:
            return
        try:
            self.files[name] = plot(*what, **how)
        except (MbcdError, OSError):
            raise
        except Exception as error:  # whatever a name or a value provokes in matplotlib
            self.warnings.append(f"The plot of {name} could not be drawn ({type(error).__name__}: {error}).")


def earlier(output: Path) -> list[Path]:
    """The plots and exports of an earlier evaluation in `output`."""
    return [path for pattern in _OWN for path in output.glob(pattern)]


def give_place(aside: Path, output: Path, files: Sequence[Path]) -> None:
    """Move `files` (relative) and results.json from `aside` to `output`, in place of an earlier evaluation's.

    The earlier results go first and the new ones come last, on the disk too: what is there always fits results.json,
    or there is none.
    """
    results = "results.json"
    remove(output / results, *earlier(output))
    rename({aside / file: output / file for file in files})
    rename({aside / results: output / results})


def analyse(analysis: Analysis, *, ood: Dataset | None = None) -> None:
    """Run the analyses that `settings.evaluation.analyses` names, and the exports, into `analysis`.

    Args:
        ood: another prepared dataset with the same modalities, whose clips the model should not trust itself on.
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
    found: dict[str, Any] = {}
    for one in a.results:
        if not one.predictions.variants:
            continue
        values = missing_modalities(one.predictions)
        shares = shapley(values, a.model.modalities)
        found[one.clip_set.name] = {"top1": values, "shapley": shares}
        path = a.plot(f"missing-{one.clip_set.name}.png")
        title = f"Missing modalities: {a.name(one)}"
        a.draw(f"missing modalities on {one.clip_set.name}", plots.plot_subsets, values, shares, path, title=title)
    if found:
        a.figures["missing"] = found


def _disturbed(a: Analysis, disturbances: list[Disturbance], key: str, *, title: str, xlabel: str) -> None:
    if not disturbances:
        return
    records = disturbed_accuracy(
        a.model,
        a.batches(a.main.clip_set.clips, key),
        disturbances,
        device=a.device,
        precision=a.settings.runtime.precision,
    )
    a.figures[key] = {"clips": a.main.clip_set.name, "records": records}
    title = f"{title}: {a.name(a.main)}"
    a.draw(key, plots.plot_disturbed, records, a.plot(f"{key}.png"), title=title, xlabel=xlabel)


def _shift(a: Analysis) -> None:
    evaluation = a.settings.evaluation
    shifts = [gaussian_shift(m, s, seed=evaluation.seed) for m in a.model.modalities for s in evaluation.shift]
    xlabel = "standard deviation of the noise, in units of the input's own"
    _disturbed(a, shifts, "shift", title="Gaussian shift of one modality", xlabel=xlabel)


def _corruptions(a: Analysis) -> None:
    seed, modalities = a.settings.evaluation.seed, a.dataset.modalities
    found = [c for name in a.model.modalities for c in corruptions(name, modalities[name], seed=seed)]
    heard = [n for n in a.model.modalities if modalities[n].kind == "audio" and modalities[n].cut == "input"]
    if heard and a.clips is not None:
        source, dataset = a.clips
        sounds = [c for n in heard for c in sound_corruptions(n, modalities[n], source, dataset=dataset, seed=seed)]
        # Noise on the sound itself takes the place of noise on its picture.
        better = [c for c in found if not (c.modality in heard and c.kind == SPECTROGRAM_NOISE)]
        try:
            _disturbed(a, [*better, *sounds], "corruptions", title="Corruption of one modality", xlabel="severity")
            heard = []
        except MediaError as error:
            a.clips_missing = f"{error.file}: {error.cause}"
    if heard or "corruptions" not in a.figures:
        _disturbed(a, found, "corruptions", title="Corruption of one modality", xlabel="severity")
    about = a.figures.setdefault("corruptions", {})
    if heard:
        about["without_sound"] = {"modalities": heard, "why": a.clips_missing}
    left_out = [name for name in a.model.modalities if modalities[name].cut != "input"]
    if left_out:
        about["left_out"] = left_out


def _trust(a: Analysis) -> None:
    found = trust(a.sets, bins=a.settings.evaluation.bins)
    a.figures["trust"] = found
    for one in a.results:
        name, heads = one.clip_set.name, found["sets"][one.clip_set.name]
        tables = {"as trained": heads["fused"]["reliability"]}
        if found["temperature_fitted"]:
            scaled = f"temperature {found['temperature']['fused']:.2f}"
            tables[scaled] = heads["fused"]["reliability_scaled"]
        a.draw(
            f"reliability on {name}",
            plots.plot_reliability,
            tables,
            a.plot(f"reliability-{name}.png"),
            title=f"Reliability, fused: {a.name(one)}",
        )
        a.draw(
            f"risk and coverage on {name}",
            plots.plot_risk,
            {f"{head} (AURC {100 * f['aurc']:.1f} %)": f["risk"] for head, f in heads.items()},
            a.plot(f"risk-coverage-{name}.png"),
            title=f"Risk and coverage: {a.name(one)}",
        )


def _rows(a: Analysis, one: Evaluated) -> Iterator[dict[str, Any]]:
    return prediction_rows(
        one.predictions,
        ids=a.dataset.clips.ids,
        label_names=list(a.dataset.label_names),
        domain_names=list(a.dataset.domains),
    )


def _insight(a: Analysis) -> None:
    evaluation = a.settings.evaluation
    if evaluation.hardest:
        a.figures["hardest"] = {
            "clips": a.main.clip_set.name,
            "rows": hardest_rows(_rows(a, a.main), evaluation.hardest),
        }
    clips = spread(np.concatenate([one.clip_set.clips for one in a.results]), evaluation.tsne_clips)
    sample = predict(
        a.model,
        a.batches(np.sort(clips), "embeddings"),
        device=a.device,
        precision=a.settings.runtime.precision,
        features=True,
    )
    maps = embeddings(sample, seed=evaluation.seed)
    target = [one.clip_set.domains for one in a.results if one.clip_set.name == TARGET]
    names = [f"{d} (target)" if (d,) in target else d for d in a.dataset.domains]
    for space, points in maps.items():
        groups = {"class": (sample.labels, list(a.dataset.label_names)), "domain": (sample.domains, names)}
        path, title = a.plot(f"tsne-{space}.png"), f"t-SNE of the {space} embeddings"
        a.draw(f"t-SNE, {space}", plots.plot_map, points, groups, path, title=title)
    if maps:
        rows = [
            {
                "id": a.dataset.clips.ids[clip],
                "domain": a.dataset.domains[domain],
                "label": a.dataset.label_names[label],
                **{
                    f"{space}_{axis}": float(points[n, i])
                    for space, points in maps.items()
                    for i, axis in enumerate("xy")
                },
            }
            for n, (clip, domain, label) in enumerate(
                zip(sample.clips.tolist(), sample.domains.tolist(), sample.labels.tolist(), strict=True)
            )
        ]
        a.files["t-SNE points"] = write_rows(a.output / "evaluation" / "tsne.csv", rows)


def _ood(a: Analysis, other: Dataset) -> None:
    name = other.name
    missing = [m for m in a.model.modalities if m not in other.modalities]
    if missing:
        raise CheckpointError(
            f"The out-of-distribution dataset {name} has no {', '.join(missing)}, which the model reads.",
            "Prepare it with the same modalities.",
        )
    clips = other.select(domains=other.domains, splits=("test",))
    size = a.settings.evaluation.batch_size
    batches = a.say.over(other.batches(clips, batch_size=size, training=False), "out of distribution, batches")
    try:
        foreign = predict(a.model, batches, device=a.device, precision=a.settings.runtime.precision)
    except RuntimeError as error:
        raise CheckpointError(
            f"The model cannot read the out-of-distribution dataset {name}: {str(error).splitlines()[0]}",
            "Prepare it with the settings of the run (same geometry, spectrogram and cut).",
        ) from error
    a.figures["ood"] = {
        "dataset": name,
        "clips": len(foreign),
        "against": {s: out_of_distribution(predictions, foreign) for s, predictions in a.sets.items()},
    }


def _export(a: Analysis) -> None:
    wanted = a.settings.evaluation.export
    names: Mapping[str, Any] = {
        "ids": a.dataset.clips.ids,
        "label_names": list(a.dataset.label_names),
        "domain_names": list(a.dataset.domains),
    }
    for one in a.results:
        name, folder = one.clip_set.name, a.output / "evaluation"
        if "csv" in wanted:
            path = folder / f"predictions-{name}.csv"
            a.files[f"predictions on {name}"] = write_rows(path, _rows(a, one))
        if "hdf5" in wanted:
            full = predict(
                a.model,
                a.batches(one.clip_set.clips, "export"),
                device=a.device,
                precision=a.settings.runtime.precision,
                features=True,
            )
            path = folder / f"embeddings-{name}.h5"
            a.files[f"embeddings on {name}"] = write_hdf5(full, path, **names)
