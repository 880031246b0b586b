"""`mbcd zero-shot`: flags, one library call, what it returned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.evaluate import show_comparison
from mbcd_cli.cli.options import Asked, Reply, RunsDir, command, dataset_preset
from mbcd_cli.errors import UsageError


@command(
    "training.target_domain",
    "training.source_domains",
    "model.modalities",
    "dataset.name",
    "dataset.root",
    "cache.weights_dir",
    preset=True,
    examples=(
        "mbcd zero-shot --preset none --config clip.toml --prompts prompts.toml",
        "mbcd zero-shot --preset none --config clip.toml --prompts prompts.toml --over mean",
        "mbcd zero-shot --preset none --config clip-of-epic.toml --root EPIC --prompts narrations",
    ),
)
def zero_shot(
    asked: Asked,
    prompts: Annotated[
        str, typer.Option("--prompts", help="TOML file of prompts, or `narrations` (EPIC-Kitchens: of the sources).")
    ],
    over: Annotated[
        str | None, typer.Option("--over", help="A class's prompts: max or mean; default: the file's, else max.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> Reply:
    """Classify clips by prompts, with an encoder that has a text tower; nothing is trained.

    Every domain is a target by its own, and a row that `mbcd evaluate --runs` shows below the trained ones.

    The dataset is prepared with `hf:FOLDER` before, and the folder is still needed.
    """
    if over not in (None, "max", "mean"):
        raise UsageError(f"--over {over}: there is no such way.", "Use max or mean.")
    preset = dataset_preset(asked)
    asked.look_up(preset)
    settings = asked.resolve(preset, named=True)
    from mbcd_cli.evaluation.zero_shot import zero_shot

    done = zero_shot(settings, prompts=prompts, over=over, runs_dir=runs_dir, say=console.terminal)
    return done, partial(show_comparison, done)
