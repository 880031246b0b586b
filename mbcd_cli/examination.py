"""`mbcd check`: what is tried of a method, an encoder or a reader, whoever wrote it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from mbcd_cli import encoders
from mbcd_cli.data import readers
from mbcd_cli.data.modalities import asked_modalities
from mbcd_cli.data.readers.places import root_of
from mbcd_cli.data.readers.reader_checks import READER_CHECKS, reader_checks
from mbcd_cli.encoders.encoder_checks import ENCODER_CHECKS, encoder_checks
from mbcd_cli.errors import MbcdError, SettingsError
from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.methods import method_class
from mbcd_cli.naming import did_you_mean
from mbcd_cli.plugins import entry_of
from mbcd_cli.preparation.identity import with_encoder
from mbcd_cli.promises import Promise, tried
from mbcd_cli.resolved import resolve
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings
from mbcd_cli.training.contract import CHECKS, Cost, method_checks, method_cost


@dataclass(frozen=True, slots=True)
class _Subject:
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


def check_part(
    part: str,
    name: str,
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> Examined:
    """Try all that is asked of every method, encoder or reader.

    Args:
        part: method, encoder or reader. name: of it, as its setting has it.
        config, sets, flags: the settings that it is tried with.

    Raises:
        MbcdError: there is no such part, or none of that name; settings that it lacks, or a folder.
    """
    subjects = {"method": _method, "encoder": _encoder, "reader": _reader}
    if part not in subjects:
        raise SettingsError(
            f"There is nothing called {part!r} to check.",
            f"{did_you_mean(part, subjects)}Use one of {', '.join(subjects)}.",
        )
    of = subjects[part](name, partial(resolve, config=config, environ=os.environ, sets=sets), flags)
    told = {one: (check.__doc__ or "").strip().partition("\n")[0] for one, check in of.declared.items()}
    result = Examined(part, name)
    with say.progress(name, len(of.checks)) as ticker:
        for promise in tried(of.checks, of=of.of, told=told):
            result.promises.append(promise)
            ticker.advance()
    if of.cost is not None and result.promises[0].holds:
        with suppress(MbcdError):  # one that refuses two modalities: told of by other checks
            result.cost = of.cost()
    result.exit_code = int(not all(promise.holds for promise in result.promises))
    return result


def _method(name: str, resolved: Callable[..., Settings], flags: Mapping[str, object]) -> _Subject:
    torch.set_num_threads(1)  # the models are tiny
    kind = method_class(name)
    settings = resolved(method=name, flags=flags).method.model_dump(mode="json", exclude={"name"}, exclude_unset=True)
    return _Subject(CHECKS, dict(method_checks(kind, settings)), kind, partial(method_cost, kind, settings))


def _encoder(name: str, resolved: Callable[..., Settings], flags: Mapping[str, object]) -> _Subject:
    settings = resolved(flags=flags)
    named = encoders.described_encoders(settings.model_copy(update={"modalities": with_encoder(settings, name)}))
    kind, modality = next(iter(named.modalities.items()))
    if modality.kind == "array" and modality.dimension is None:
        modality = modality.model_copy(update={"dimension": 7})
    encoders.build_encoder(kind, modality)  # says what settings it lacks
    entry = entry_of(name, encoders.GROUP, encoders.ENCODERS, encoders.EncoderEntry)
    of = entry.build if entry is not None else encoders.build_encoder
    return _Subject(ENCODER_CHECKS, encoder_checks(modality), of)


def _reader(name: str, resolved: Callable[..., Settings], flags: Mapping[str, object]) -> _Subject:
    settings = resolved(flags={**flags, "dataset.reader": name})
    entry = entry_of(name, readers.GROUP, readers.READERS, readers.ReaderEntry)
    if entry is None or not entry.generates:
        root_of(settings.dataset)
    checks = reader_checks(settings.dataset, asked_modalities(settings))
    return _Subject(READER_CHECKS, checks, entry.read if entry is not None else name)
