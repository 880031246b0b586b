"""`mbcd check`: flags, one library call, what it returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command
from mbcd_cli.errors import SettingsError
from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.naming import did_you_mean
from mbcd_cli.promises import Promise, tried

if TYPE_CHECKING:
    from mbcd_cli.settings import Settings
    from mbcd_cli.training.contract import Cost

_PARTS = ("method", "encoder", "reader")


@dataclass(frozen=True, slots=True)
class _Asked:
    """The checks as they are declared and as they are run, what they are of, and what tells its cost."""

    declared: Mapping[str, Callable]
    checks: Mapping[str, Callable[[], None]]
    of: object
    cost: Callable[[], Cost] | None = None


@dataclass(slots=True)
class Examined:
    """What was tried of a method, encoder or reader; 1 where a promise is not kept."""

    part: str
    name: str
    promises: list[Promise] = field(default_factory=list)
    cost: Cost | None = field(default=None, metadata=OPTIONAL)
    exit_code: int = 0


@command(
    *("dataset.root", "cache.weights_dir"),
    examples=(
        "mbcd check method my_method.py:MyMethod --set method.weight=0.2",
        "mbcd check encoder my-encoder --set modalities.video.frames=8",
        "mbcd check encoder hf:models/clip",
        "mbcd check reader my-reader --root data/mine",
    ),
)
def check(
    asked: Asked,
    part: Annotated[str, typer.Argument(help="method, encoder or reader.")],
    name: Annotated[str, typer.Argument(help="Of the registry, of an installed package; a method also FILE.py:CLASS.")],
) -> Reply:
    """Try whether a method, encoder or reader, yours or ours, does what is asked of every one.

    Methods train tiny models in memory; readers need a dataset (--root). Exit code 1 where something does not hold.
    """
    if part not in _PARTS:
        raise SettingsError(
            f"There is nothing called {part!r} to check.",
            f"{did_you_mean(part, _PARTS)}Use one of {', '.join(_PARTS)}.",
        )
    of = {"method": _method, "encoder": _encoder, "reader": _reader}[part](asked, name)
    told = {one: (check.__doc__ or "").strip().partition("\n")[0] for one, check in of.declared.items()}
    result = Examined(part, name)
    with console.terminal.progress(name, len(of.checks)) as ticker:
        for promise in tried(of.checks, of=of.of, told=told):
            result.promises.append(promise)
            ticker.advance()
    if of.cost is not None and result.promises[0].holds:
        result.cost = of.cost()
    result.exit_code = int(not all(promise.holds for promise in result.promises))
    return result, partial(show_examined, result)


def _method(asked: Asked, name: str) -> _Asked:
    import torch

    from mbcd_cli.methods import method_class
    from mbcd_cli.training.contract import CHECKS, method_checks, method_cost

    torch.set_num_threads(1)  # the models are tiny
    kind = method_class(name)
    settings = _resolved(asked, {"method.name": name}).method.model_dump(
        mode="json", exclude={"name"}, exclude_unset=True
    )
    return _Asked(CHECKS, dict(method_checks(kind, settings)), kind, partial(method_cost, kind, settings))


def _encoder(asked: Asked, name: str) -> _Asked:
    from mbcd_cli.encoders import ENCODERS, GROUP, EncoderEntry, build_encoder, described_encoders
    from mbcd_cli.encoders.encoder_checks import ENCODER_CHECKS, encoder_checks
    from mbcd_cli.plugins import entry_of
    from mbcd_cli.preparation.identity import with_encoder

    settings = _resolved(asked, {})
    named = described_encoders(settings.model_copy(update={"modalities": with_encoder(settings, name)}))
    kind, modality = next(iter(named.modalities.items()))
    if modality.kind == "array" and modality.dimension is None:
        modality = modality.model_copy(update={"dimension": 7})
    build_encoder(kind, modality)  # says what settings it lacks
    entry = entry_of(name, GROUP, ENCODERS, EncoderEntry)
    return _Asked(ENCODER_CHECKS, encoder_checks(modality), entry.build if entry is not None else build_encoder)


def _reader(asked: Asked, name: str) -> _Asked:
    from mbcd_cli.data.modalities import asked_modalities
    from mbcd_cli.data.readers import GROUP, READERS, ReaderEntry
    from mbcd_cli.data.readers.places import root_of
    from mbcd_cli.data.readers.reader_checks import READER_CHECKS, reader_checks
    from mbcd_cli.plugins import entry_of

    settings = _resolved(asked, {"dataset.reader": name})
    entry = entry_of(name, GROUP, READERS, ReaderEntry)
    if entry is None or not entry.generates:
        root_of(settings.dataset)
    checks = reader_checks(settings.dataset, asked_modalities(settings))
    return _Asked(READER_CHECKS, checks, entry.read if entry is not None else name)


def _resolved(asked: Asked, named: Mapping[str, object]) -> Settings:
    return Asked({**asked.flags, **named}, config=asked.config, sets=asked.sets).resolve(None)


def show_examined(result: Examined) -> None:
    """Print what `check` found."""
    rows = [(one.name, "yes" if one.holds else "NO", f"{one.seconds:.1f}", one.promise) for one in result.promises]
    console.table(f"{result.part} {result.name}", ("check", "holds", "seconds", "what is asked"), rows)
    if result.cost is not None:
        cost = result.cost
        console.show(
            f"A step takes {cost.step:g} times ERM's on these tiny models; {cost.parameters} parameters of its own."
        )
    for one in result.promises:
        if not one.holds:
            console.say(f"{one.name}: {one.why} ({one.where})")
    if result.exit_code:
        console.say(
            f"error: the {result.part} does not do all that is asked of one; docs/extending.md tells what that is."
        )
