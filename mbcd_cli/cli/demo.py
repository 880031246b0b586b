"""`mbcd demo`: flags, one library call, what it returned."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command


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

    result = story.demo(directory, flags=asked.flags, say=console.terminal)
    return result, partial(show_demo, result, story.COMPARED)


def show_demo(result: dict[str, Any], methods: tuple[str, ...]) -> None:
    """Print the table, the pictures and the next commands."""
    heads = ["fused", *result["modalities"]]
    rows = []
    for where, key in ((f"target {result['target_domain']} (unseen)", "target"), ("sources (held out)", "source")):
        for method in methods:
            accuracy = result[f"{key}_accuracy"][method]
            rows.append((f"{method.upper()}, {where}", *(f"{100 * accuracy[head]:.1f}" for head in heads)))
    console.table("Accuracy in percent", ("method, domain", *heads), rows)
    console.out.print("Reports and pictures:")
    for file in result["files"]:
        console.out.print(f"  {file}", markup=False)
    total = sum(result["seconds"].values())
    cache, run = shlex.quote(f"{result['directory']}/cache"), result["runs"]["mbcd"]
    console.out.print(f"\nDone in {total:.0f} s. Next:")
    for line in (
        f"mbcd evaluate --run {shlex.quote(run)} --cache-dir {cache}",
        f"mbcd landscape --checkpoint {shlex.quote(f'{run}/checkpoints/best.pt')} --cache-dir {cache}",
        f"mbcd train --preset demo --cache-dir {cache} --method ema",
        "mbcd prepare manifest --root YOUR_DATASET      (docs/data.md says what it needs)",
    ):
        console.out.print(f"  {line}", markup=False)
