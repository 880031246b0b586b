"""Plots of a run, from its jsonl files only: losses, accuracy, r_k and drop rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbcd_cli import plotting
from mbcd_cli.files import read_records

Records = Sequence[Mapping[str, Any]]


def plot_run(run: Path) -> list[Path]:
    """Write plots/losses.png, accuracy.png and balance.png of a run folder; returns those that there is data for."""
    steps, epochs = read_records(run / "steps.jsonl"), read_records(run / "metrics.jsonl")
    written = []
    if steps:
        written.append(_losses(steps, run / "plots" / "losses.png"))
        written.append(_balance(steps, run / "plots" / "balance.png"))
    if epochs:
        written.append(_accuracy(epochs, run / "plots" / "accuracy.png"))
    return written


def _losses(steps: Records, path: Path) -> Path:
    fig, axes = plotting.figure(size=(8.4, 4.2))
    x = [record["step"] for record in steps]
    axes.plot(x, [r["total"] for r in steps], label="total (Eq. 9)", color="black", linewidth=1)
    (line,) = axes.plot(x, [r["ce_fused"] for r in steps], label="CE fused")
    if any(r["kl_fused"] for r in steps):
        axes.plot(x, [r["kl_fused"] for r in steps], label="KL fused", linestyle=":", color=line.get_color())
    for name in steps[0]["modalities"]:
        (line,) = axes.plot(x, _modality(steps, name, "ce"), label=f"CE {name}")
        if any(_modality(steps, name, "kl")):
            axes.plot(x, _modality(steps, name, "kl"), label=f"KL {name}", linestyle=":", color=line.get_color())
    axes.set(xlabel="step", ylabel="loss (nats)", title="Loss terms")
    axes.set_ylim(bottom=0)
    fig.legend(loc="outside right upper")
    return plotting.save(fig, path)


def _balance(steps: Records, path: Path) -> Path:
    fig, (top, bottom) = plotting.figure(2, 1, size=(8.4, 6.0), sharex=True)
    x = [record["step"] for record in steps]
    for name in steps[0]["modalities"]:
        (line,) = top.plot(x, _modality(steps, name, "r"), label=name)
        bottom.plot(x, _modality(steps, name, "p"), color=line.get_color(), label=f"{name}: $p_k$")
        bottom.plot(
            x,
            _modality(steps, name, "dropped"),
            ".",
            color=line.get_color(),
            label=f"{name}: dropped",
            markersize=3,
        )
    top.axhline(1, color="#999999", linewidth=0.8)
    top.set(ylabel="$r_k$", title="Modality balance (Eq. 3) and dropout (Eq. 4)")
    bottom.set(xlabel="step", ylabel="fraction of clips", ylim=(-0.02, 1.02))
    fig.legend(handles=[*top.lines[: len(steps[0]["modalities"])], *bottom.lines], loc="outside right upper")
    return plotting.save(fig, path)


def _accuracy(epochs: Records, path: Path) -> Path:
    fig, axes = plotting.figure(size=(8.4, 4.2))
    x = [record["epoch"] for record in epochs]
    lines: list[tuple[str, Callable[[Mapping[str, Any]], float | None]]] = []
    for where in ("validation", "target"):
        for model in ("teacher", "student"):
            if model in epochs[0].get(where, {}):
                lines.append(
                    (
                        f"{where}, {model}",
                        lambda r, w=where, m=model: r.get(w, {}).get(m, {}).get("fused", {}).get("accuracy"),
                    )
                )
    lines.append(("training, student", lambda r: r["train"]["accuracy_fused"]))
    for label, value in lines:
        ys = [value(record) for record in epochs]
        axes.plot(x, [None if y is None else 100 * y for y in ys], label=label, marker=".")
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
