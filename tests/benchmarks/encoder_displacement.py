"""How far an encoder moves when a method multiplies its gradient, or its update: what the factor asks, and gets.

    mbcd prepare manifest --root data/av-digits-vectors --preset av-digits-vectors
    python tests/benchmarks/encoder_displacement.py --figure docs/displacement.png

Every method trains from the same weights on the same batches with its factors left out, on the gradient and on the
update, by Adam (the preset's) and by SGD. `asked` is the mean factor of an encoder over the steps, `moved` the length
of its weights' way from first to last, over the same with the factors left out. Constant factors, and one that falls to
0.3 halfway, are of the first modality alone. No trained model is looked at: no validation, no target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from mbcd_cli.methods.base import Context, Method
from mbcd_cli.methods.parts import ModulatedSettings
from mbcd_cli.plotting import PALETTE, figure, save
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.training.assemble import assemble
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.optimizer import rate_factor, set_rates
from mbcd_cli.training.train import ClipsOfTraining


class ConstantSettings(ModulatedSettings):
    """A factor that no method chose."""

    factor: float = 0.3
    """Of the first modality."""
    after: int = 0
    """Steps before it acts."""


class Constant(Method):
    """ERM whose first encoder takes a constant factor."""

    Settings = ConstantSettings

    def gradients(self, batch):
        """ERM's, and `factor`."""
        figures = super().gradients(batch)
        factors = torch.ones_like(figures["accuracy"])
        factors[0] = torch.where(self.context.step > self.settings.after, self.settings.factor, 1.0)
        self.context.modulate(factors, of=self.settings.modulate)
        return figures | {"factor": factors}


CASES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    # shown as -> (method, figure that is its factor, settings, settings that leave the factors out)
    "constant 0.3": (f"{__file__}:Constant", "factor", (), ("factor=1.0",)),
    "constant 1.7": (f"{__file__}:Constant", "factor", ("factor=1.7",), ("factor=1.0",)),
    "1, then 0.3": (f"{__file__}:Constant", "factor", ("after=HALF",), ("factor=1.0",)),
    "ogm": ("ogm", "kappa", (), ()),
    "agm": ("agm", "kappa", ("alpha=1.0",), ("alpha=0.0",)),
    "arl": ("arl", "factor", ("start=0",), ()),
    "cggm": ("cggm", "balance", (), ()),
    "mmpareto": ("mmpareto", "gamma", (), ()),
}
SCALE = {"cggm": 1.3, "mmpareto": 1.5}  # what that figure is multiplied with; of a figure that there is not, all of it


def way(case: str, modulate: str | None, optimizer: str, args: argparse.Namespace, seed: int) -> tuple[list, list]:
    """(length of each encoder's way, mean factor of each), with the factors left out where `modulate` is None."""
    method, name, told, off = CASES[case]
    rate = args.sgd_rate if optimizer == "sgd" else None
    sets = [f"method.{one}" for one in (told if modulate else (*told, *off))]
    sets += [f"method.modulate={modulate or 'gradient'}", f"training.epochs={args.epochs}", f"training.seed={seed}"]
    sets += [f"optimizer.name={optimizer}", *([f"optimizer.lr={rate}"] if rate else [])]
    settings, dataset = prepared(args, "erm", [f"training.epochs={args.epochs}"])
    steps = len(ClipsOfTraining.of(settings, dataset).training) // settings.training.batch_size * args.epochs
    settings, dataset = prepared(args, method, [one.replace("HALF", str(steps // 2)) for one in sets])
    training = assemble(settings, dataset, device=torch.device("cpu"))
    step, model = training.step, training.step.model
    first = {n: [p.detach().clone() for p in weights.values()] for n, weights in model.theta().items()}
    factors = []
    left_out = patch.object(Context, "modulate", lambda *args, **how: None) if modulate is None else nullcontext()
    with left_out:
        for batch in batches(settings, dataset, step):
            figures = step(batch)
            record = step.layout.unpack(figures.tolist())["modalities"]
            scale = SCALE.get(case, 1.0)
            factors.append([scale * rows.get(name, 1.0) for rows in record.values()])
    moved = []
    for modality, weights in model.theta().items():
        apart = [(p.detach() - q).square().sum() for p, q in zip(weights.values(), first[modality], strict=True)]
        moved.append(float(torch.stack(apart).sum().sqrt()))
    return moved, torch.tensor(factors).mean(dim=0).tolist()


def prepared(args: argparse.Namespace, method: str, sets: list[str]):
    """Settings and dataset of a training."""
    where = [
        f"dataset.name={args.preset}",
        f"cache.dir={args.cache_dir}",
        f"training.target_domain={args.target}",
        "runtime.threads=1",
    ]
    return open_for_training(resolve(preset=args.preset, method=method, sets=[*where, *sets]))


def batches(settings, dataset, step) -> Iterator:
    """Those of all epochs; counters and rates as a training has them."""
    clips, feed = ClipsOfTraining.of(settings, dataset).training, Feed(dataset, device=torch.device("cpu"))
    for epoch in range(settings.training.epochs):
        step.context.epoch.fill_(epoch)
        set_rates(step.optimizer, rate_factor(settings.optimizer, epoch=epoch, epochs=settings.training.epochs))
        told = {"batch_size": settings.training.batch_size, "seed": settings.training.seed, "start": 0}
        for _, batch in feed.training(clips, epoch=epoch, **told):
            yield batch


def draw(rows: list[dict], path: Path) -> None:
    """What was asked against how far it moved: a panel for each optimizer."""
    fig, panels = figure(1, 2, size=(9.8, 4.0), sharex=True, sharey=True)
    for axes, optimizer in zip(panels, ("adam", "sgd"), strict=True):
        most = max(max(row["asked"], row["moved"]) for row in rows)
        axes.plot([0, 1.05 * most], [0, 1.05 * most], color="#999999", linewidth=1, linestyle="--")
        axes.axhline(1, color="#999999", linewidth=1, linestyle=":")
        for k, case in enumerate(CASES):
            for modulate, marker in (("gradient", "o"), ("update", "^")):
                mine = [r for r in rows if (r["case"], r["modulate"], r["optimizer"]) == (case, modulate, optimizer)]
                hollow = "none" if modulate == "gradient" else PALETTE[k]
                label = case if modulate == "update" and optimizer == "adam" else None
                axes.plot(
                    [r["asked"] for r in mine],
                    [r["moved"] for r in mine],
                    marker,
                    color=PALETTE[k],
                    markerfacecolor=hollow,
                    label=label,
                    markersize=6,
                )
        axes.set(title={"adam": "Adam", "sgd": "SGD"}[optimizer], xlabel="mean factor", xlim=0, ylim=0)
    panels[0].set_ylabel("displacement over that without factors")
    panels[0].plot([], [], "o", color="black", markerfacecolor="none", label="on the gradient")
    panels[0].plot([], [], "^", color="black", label="on the update")
    fig.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    save(fig, path)


def main() -> None:
    """Measure, print a line each, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="av-digits-vectors")
    parser.add_argument("--target", default="street")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sgd-rate", type=float, default=1e-2)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for optimizer in ("adam", "sgd"):
        for case in CASES:
            for seed in range(args.seeds):
                without, _ = way(case, None, optimizer, args, seed)
                for modulate in ("gradient", "update"):
                    moved, asked = way(case, modulate, optimizer, args, seed)
                    for k, (one, other, factor) in enumerate(zip(moved, without, asked, strict=True)):
                        if case in ("constant 0.3", "constant 1.7", "1, then 0.3") and k:
                            continue
                        row = {"optimizer": optimizer, "case": case, "modulate": modulate, "seed": seed, "modality": k}
                        rows.append(row | {"asked": factor, "moved": one / other})
                        print(
                            json.dumps(rows[-1] | {"asked": round(factor, 3), "moved": round(one / other, 4)}),
                            flush=True,
                        )
    if args.figure is not None:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
