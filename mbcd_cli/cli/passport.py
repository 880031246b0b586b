"""`mbcd passport`: flags, one library call, what it returned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command, preset_of

if TYPE_CHECKING:
    from mbcd_cli.preparation.passport import Passport


@command(
    *("cache.weights_dir", "cache.random_weights"),
    preset=True,
    examples=(
        "mbcd passport efficientnet-lite0 --weights-dir weights",
        "mbcd passport onnx:model.onnx --record",
        "mbcd passport --preset epic-kitchens --json",
    ),
)
def passport(
    asked: Asked,
    encoder: Annotated[
        str | None,
        typer.Argument(
            metavar="[ENCODER]", help="Encoder, as in modalities.NAME.encoder; default: those of the settings."
        ),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the passport beside the weights: from then on it must hold.")
    ] = False,
) -> Reply:
    """Tell what an encoder wants and gives, and check it against the passport beside its weights.

    Runs the encoder once, on a fixed probe.
    """
    from mbcd_cli.preparation.identity import passports

    found = passports(asked.resolve(preset_of(asked)), encoder, record=record, say=console.terminal)
    return found, partial(show_passports, found)


def show_passports(found: Mapping[str, Passport]) -> None:
    """Print what `passports` returned, a table each."""
    for name, held in found.items():
        wants = held.wants
        rows = [
            (key, _text(getattr(wants, key))) for key in wants.__slots__ if getattr(wants, key) not in (None, (), False)
        ]
        rows += [
            ("weights", held.file or "random"),
            ("SHA-256", held.sha256 or "-"),
            ("parameters", "-" if held.parameters is None else f"{held.parameters:,}"),
            ("GFLOP", "not counted" if held.gflop is None else f"{held.gflop:g}"),
            ("output", f"{held.digest}, of length {math.hypot(*held.output):.4g}"),
        ]
        console.table(f"{name}: {held.encoder}", ("", "passport"), rows)
        for doubt in held.doubts:
            console.warn(f"{name}: {doubt}")


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{part[0]} {part[1]}" if isinstance(part, tuple) else str(part) for part in value)
    return str(value)
