"""`mbcd demo`: flags, one library call, what it returned."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command

if TYPE_CHECKING:
    from mbcd_cli.story import Story


@command(
    *["training.target_domain", "training.seed", "training.epochs", "runtime.device", "runtime.threads"],
    layered=False,
    examples=("mbcd demo", "mbcd demo --dir /tmp/mbcd-demo --target-domain workshop", "mbcd demo --json"),
)
def demo(
    asked: Asked,
    directory: Annotated[Path, typer.Option("--dir", help="Folder for the demo's media, cache and runs.")] = Path(
        "mbcd-demo"
    ),
) -> Reply:
    """Run the whole story on an embedded dataset: prepare, train ERM and MBCD, evaluate, landscape."""
    from mbcd_cli import story

    done = story.demo(directory, flags=asked.flags, say=console.terminal)
    return done, partial(show_demo, done)


def show_demo(done: Story) -> None:
    """Print the table, the pictures and the next commands."""
    heads = ["fused", *done.modalities]
    domains = {
        f"target {done.target_domain} (unseen)": done.target_accuracy,
        "sources (held out)": done.source_accuracy,
    }
    rows = [
        (f"{method.upper()}, {where}", *(f"{100 * accuracy[head]:.1f}" for head in heads))
        for where, by_method in domains.items()
        for method, accuracy in by_method.items()
    ]
    console.table("Accuracy in percent", ("method, domain", *heads), rows)
    cache, run = shlex.quote(f"{done.directory}/cache"), done.runs["mbcd"]
    console.show(
        "Reports and pictures:",
        *(f"  {file}" for file in done.files),
        f"\nDone in {sum(done.seconds.values()):.0f} s. Next:",
        f"  mbcd evaluate --run {shlex.quote(str(run))} --cache-dir {cache}",
        f"  mbcd landscape --checkpoint {shlex.quote(f'{run}/checkpoints/best.pt')} --cache-dir {cache}",
        f"  mbcd train --preset demo --cache-dir {cache} --method ema",
        "  mbcd prepare manifest --root YOUR_DATASET      (docs/data.md says what it needs)",
    )
