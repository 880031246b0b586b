"""`mbcd adapt`: flags, one library call, what it returned."""

from __future__ import annotations

from functools import partial

from mbcd_cli import console
from mbcd_cli.cli.evaluate import show_comparison
from mbcd_cli.cli.options import Asked, Output, Reply, RunsOrFolders, command


@command(
    "adapt.rule",
    examples=(
        "mbcd adapt runs/av-digits/mbcd-va-street-s0 --rule tent",
        "mbcd adapt runs/av-digits --rule aeo --output adapted",
        "mbcd adapt RUN --rule read --set adapt.reset=batch",
    ),
)
def adapt(asked: Asked, paths: RunsOrFolders, output: Output = None) -> Reply:
    """Adapt finished runs to the inputs of the clips that they are tested on.

    Accuracy unadapted, before and after each step; the run stays as it is.

    Of several runs there are mean and spread over seeds too.

    Without --output it is written to RUN/adaptation, and of several runs to adaptation too.
    """
    from mbcd_cli.evaluation.adapt import adapt

    done = adapt(paths, output=output, config=asked.config, sets=asked.sets, flags=asked.flags, say=console.terminal)
    return done, partial(show_comparison, done)
