"""Plots of a run, from its jsonl files only: losses, what the method shows apart from them, accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from mbcd_cli import plotting
from mbcd_cli.errors import MbcdError
from mbcd_cli.files import read_records
from mbcd_cli.methods.base import Panel
from mbcd_cli.scoring.history import CLIPS, MODELS, fused_accuracy

Records = Sequence[Mapping[str, Any]]


def plot_run(run: Path, panels: Sequence[Panel] = (), terms: Collection[str] = ()) -> list[Path]:
    """Write plots/losses.png (the total and `terms`), a picture per panel and accuracy.png of a run folder.

    Returns:
        Those there is data for.
    """
    steps, epochs = read_records(run / "steps.jsonl"), read_records(run / "metrics.jsonl")
    folder = run / "plots"
    plots: list[Callable[[], Path]] = []
    if steps:
        plots.append(lambda: _losses(steps, terms, folder / "losses.png"))
        plots += [partial(_panel, steps, panel, folder / f"{panel.name}.png") for panel in panels]
    if epochs:
        plots.append(lambda: _accuracy(epochs, folder / "accuracy.png"))
    written = []
    for plot in plots:
        try:
            written.append(plot())
        except (MbcdError, OSError):
            raise
        except Exception as error:  # whatever a value provokes in matplotlib: it must not cost the training its end
            warnings.warn(f"A plot could not be drawn ({type(error).__name__}: {error}).", stacklevel=2)
    return written


def _evened(records: Records) -> Records:
    """Records over as many steps each: those that an epoch's end cut short are joined with those that follow."""
    most = max((record.get("steps", 1) for record in records), default=1)
    groups: list[list[Mapping[str, Any]]] = [[]]
    for record in records:
        if sum(joined.get("steps", 1) for joined in groups[-1]) >= most:
            groups.append([])
        groups[-1].append(record)
    return [_mean(group) if len(group) > 1 else group[0] for group in groups if group]


def _mean(group: Records) -> dict[str, Any]:
    """One record of several: means weighted by their steps; the last one's step and epoch."""
    weights = [record["steps"] for record in group]

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    names = [name for name in group[0] if name not in ("step", "epoch", "steps")]
    return {**group[-1], "steps": sum(weights)} | {name: mean([record[name] for record in group]) for name in names}


def _losses(steps: Records, terms: Collection[str], path: Path) -> Path:
    """The total in black; the other terms in one line style per kind (`ce`, `ce_fused`), one colour per head."""
    fig, axes = plotting.figure(size=(8.4, 4.2))
    steps = _evened(steps)
    x = [record["step"] for record in steps]
    axes.plot(x, [r["total"] for r in steps], label="total", color="black", linewidth=1)
    heads = ["fused", *steps[0]["modalities"], ""]  # "": of no head
    colours = dict(zip(heads, cycle(plotting.PALETTE), strict=False))
    styles: dict[str, str] = {}
    lines = {
        (name, "fused" if name.endswith("_fused") else ""): [record[name] for record in steps]
        for name in terms
        if name in steps[0]
    }
    for modality, row in steps[0]["modalities"].items():
        lines |= {(name, modality): _modality(steps, modality, name) for name in terms if name in row}
    for (name, head), values in lines.items():
        kind = name.removesuffix("_fused")
        if not any(values):
            continue
        style = styles.setdefault(kind, ("-", ":", "--", "-.")[len(styles) % 4])
        axes.plot(x, values, style, label=f"{kind} {head}".rstrip(), color=colours[head])
    axes.set(xlabel="step", ylabel="loss (nats)", title="Loss terms")
    if min(min(values) for values in (*lines.values(), [r["total"] for r in steps])) >= 0:
        axes.set_ylim(bottom=0)
    fig.legend(loc="outside right upper")
    return plotting.save(fig, path)


def _panel(steps: Records, panel: Panel, path: Path) -> Path:
    """Axes below each other, one for every kind of axis that the panel's figures have; a colour per modality."""
    steps = _evened(steps)
    kinds = list(dict.fromkeys(shown.axis for shown in panel.figures.values()))
    fig, grid = plotting.figure(len(kinds), 1, size=(8.4, 3.0 * len(kinds)), sharex=True, squeeze=False)
    axes = dict(zip(kinds, grid[:, 0], strict=True))
    x = [record["step"] for record in steps]
    formulas = {*kinds, panel.title}
    for modality, colour in zip(steps[0]["modalities"], cycle(plotting.PALETTE), strict=False):
        for name, shown in panel.figures.items():
            label = plotting.as_formula(f"{modality}: ") + shown.label
            formulas.add(label)
            values = _modality(steps, modality, name)
            axes[shown.axis].plot(x, values, shown.marker, color=colour, label=label, markersize=3)
    for kind, drawn in axes.items():
        drawn.set(ylabel=kind)
        drawn.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside its own axes: lines of both look alike
    grid[0, 0].set(title=panel.title)
    grid[-1, 0].set(xlabel="step")
    return plotting.save(fig, path, formulas=formulas)


def _accuracy(epochs: Records, path: Path) -> Path:
    fig, axes = plotting.figure(size=(8.4, 4.2))
    x = [record["epoch"] for record in epochs]
    lines = {
        f"{clips}, {model}": [fused_accuracy(record, clips, model) for record in epochs]
        for clips in CLIPS
        for model in MODELS
        if model in epochs[0].get(clips, {})
    }
    lines["training, student"] = [record["train"]["accuracy_fused"] for record in epochs]
    for label, accuracies in lines.items():
        axes.plot(x, [None if y is None else 100 * y for y in accuracies], label=label, marker=".")
    best = epochs[-1].get("best_epoch")
    if best is not None:
        axes.axvline(best, color="#999999", linewidth=0.8)
        axes.annotate(" best", (best, 2), color="#666666")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102), title="Fused accuracy per epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    fig.legend(loc="outside right upper")
    return plotting.save(fig, path)


def _modality(steps: Records, name: str, key: str) -> list[float]:
    return [record["modalities"][name][key] for record in steps]
