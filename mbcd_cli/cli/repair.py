"""`mbcd repair`: flags, one library call, what it returned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command


@command(
    *("dataset.root", "dataset.reader.manifest", "cache.workers", "cache.weights_dir"),
    *("runtime.device", "runtime.threads"),
    layered=False,
    examples=("mbcd repair cache", "mbcd repair cache/av-digits --root /data/av-digits"),
)
def repair(
    asked: Asked,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A cache's folder, a dataset's, or the one of all.")],
) -> Reply:
    """Compute what is damaged or missing of caches anew from the media, only that, bit for bit as it was.

    Where the media have changed nothing is touched.
    """
    from mbcd_cli.preparation.repair import repair

    done = repair(path, flags=asked.flags, say=console.terminal)
    result = {
        "caches": [{"folder": str(c.folder), "repaired": c.files, "root_checksum": c.root_checksum} for c in done]
    }
    rows = [(str(c.folder), ", ".join(c.files) or "nothing: it was whole", c.root_checksum) for c in done]
    return result, partial(console.table, "Repaired", ("cache", "computed anew", "root"), rows)
