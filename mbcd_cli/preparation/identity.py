"""Whether an encoder is the one that a passport was made of: beside its weights, or in a cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from mbcd_cli import checksums
from mbcd_cli.data.modalities import KINDS
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders import ENCODERS, GROUP, SCHEMES, EncoderEntry, described_encoders, encoder_names, format_of
from mbcd_cli.encoders.pretrained import PUBLIC
from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.encoders.wants import FULL_SCALE
from mbcd_cli.errors import FOREIGN, CheckpointError, SettingsError
from mbcd_cli.files import open_hdf5, read_json, write_json
from mbcd_cli.json_values import json_values
from mbcd_cli.naming import did_you_mean
from mbcd_cli.plugins import entry_of
from mbcd_cli.preparation.passport import Passport, counted, probe_tensors
from mbcd_cli.preparation.trunk import Frozen, build_trunk
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings

TOLERANCE = 5e-3
"""Of an output's length, by which two of the same encoder may differ: a value is kept with four digits."""
_PASSPORT = TypeAdapter(Passport)


def same_output(before: Passport, now: Passport) -> bool:
    """Whether two outputs are one encoder's, up to rounding."""
    return len(before.output) == len(now.output) and _distance(np.array(now.output), before) <= TOLERANCE


def _distance(output: np.ndarray, before: Passport) -> float:
    told = np.array(before.output)
    return float(np.linalg.norm(output - told) / max(np.linalg.norm(told), 1e-12))


def differences(before: Passport, now: Passport) -> list[str]:
    """What two passports of one encoder say differently, in words; empty where they agree."""
    lines = []
    if before.sha256 != now.sha256:
        then, told = _short(before.sha256), _short(now.sha256)
        lines.append(f"another file under the same name: SHA-256 {then} then, {told} now")
    wanted = json_values(now.wants)
    lines += [
        f"{key}: {then} then, {wanted[key]} now"
        for key, then in json_values(before.wants).items()
        if then != wanted[key]
    ]
    if not same_output(before, now) and not lines:
        lines.append("its output on the probe is another")
    return lines


def _short(sha256: str | None) -> str:
    return "random" if sha256 is None else f"{sha256[:12]}..."


_MIX_UPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "red and blue swapped (BGR)": lambda view: view.flip(1),
    "its axes H and W swapped": lambda view: view.transpose(-1, -2),
    "its frames in the opposite order": lambda view: view.flip(2) if view.dim() == 5 else view,
    "values 255 times as large": lambda view: view * FULL_SCALE,
    "values 255 times as small": lambda view: view / FULL_SCALE,
}


@torch.no_grad()
def mix_up(before: Passport, modality: Modality, encoder: StagedEncoder) -> str | None:
    """How the probe must be mixed up, in words, for the recorded output to come out; None where no way is found."""
    (view, *others) = probe_tensors(modality)
    view = view.float()
    for words, change in _MIX_UPS.items():
        mixed = change(view)
        changed = mixed.shape == view.shape and not torch.equal(mixed, view)
        if changed and _distance(encoder((mixed, *others))[0].numpy(), before) <= TOLERANCE:
            return words
    return None


def refuse_other(
    before: Passport, now: Passport, *, recorded: Path, modality: Modality, encoder: StagedEncoder
) -> None:
    """Refuse an encoder that is not the one a passport was made of.

    Args:
        recorded: where that passport is.

    Raises:
        CheckpointError: naming everything that differs.
    """
    if not (lines := differences(before, now)):
        return
    if lines[0].startswith("its output") and (words := mix_up(before, modality, encoder)):
        lines = [f"{lines[0]}; with {words} it is the recorded one"]
    raise CheckpointError(
        f"{now.encoder} is not as in its passport {recorded}:\n  " + "\n  ".join(lines),
        "Bring back what differs; if it is meant, delete what holds that passport, or name the weights with "
        "modalities.NAME.weights_sha256.",
    )


def passport_file(weights: Path) -> Path:
    """Where a passport stands beside weights: FILE.passport.json, or in their folder."""
    return weights / "passport.json" if weights.is_dir() else weights.with_name(f"{weights.name}.passport.json")


def read_passport(weights: Path) -> Passport | None:
    """The passport beside weights; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    file = passport_file(weights)
    try:
        return _PASSPORT.validate_python(read_json(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no passport: {error}", "Delete it and record it again.") from error


def stored_passport(index: Path) -> Passport | None:
    """The passport in a cache's index; None where there is none, or the index is damaged."""
    with suppress(OSError, *FOREIGN), open_hdf5(index) as file:
        if checksums.is_whole(index) and "passport" in file:
            return _PASSPORT.validate_json(file["passport"].asstr()[()])
    return None


def write_passport(weights: Path, passport: Passport) -> Path:
    """Keep a passport beside the weights that it was made of; where.

    Raises:
        FileError: full disk or missing rights.
    """
    return write_json(passport_file(weights), json_values(passport), place="--weights-dir")


def check_records(frozen: Frozen, modality: Modality, folder: Path | None = None) -> None:
    """Compare an encoder's passport with those that are recorded: beside its weights, and in a cache and those beside.

    Args:
        folder: of the cache.

    Raises:
        CheckpointError: it contradicts one.
    """
    passport = frozen.passport
    if passport is None:
        return
    records: dict[Path, Passport | None] = {}
    if frozen.source is not None:
        records[passport_file(frozen.source.file)] = read_passport(frozen.source.file)
    for index in () if folder is None else sorted(folder.parent.glob(f"{folder.name.rsplit('-', 1)[0]}-*/index.h5")):
        stored = stored_passport(index)
        renewed = stored is not None and (stored.encoder, stored.file) == (passport.encoder, passport.file)
        if index.parent == folder or (renewed and stored.sha256 != passport.sha256 and not modality.weights_sha256):
            records[index] = stored
    for place, record in records.items():
        if record is not None:
            refuse_other(record, passport, recorded=place, modality=modality, encoder=frozen.encoder)


def passports(
    settings: Settings, encoder: str | None = None, *, record: bool = False, say: Say = SILENT
) -> dict[str, Passport]:
    """Passports of the encoders that settings name, or of one; each is checked against the one beside its weights.

    Args:
        encoder: as in a modality's settings; None for all of which `prepare` freezes something.
        record: keep them beside the weights.

    Returns:
        Modality -> passport.

    Raises:
        SettingsError: no such encoder, or none that is frozen. CheckpointError: weights that are missing or damaged,
            settings that contradict what it wants, or another passport beside the weights.
    """
    configure(settings.runtime)
    if encoder is not None:
        settings = settings.model_copy(update={"modalities": with_encoder(settings, encoder)})
    settings = described_encoders(settings)
    found: dict[str, Passport] = {}
    for name, modality in settings.modalities.items():
        frozen = build_trunk(settings, name, modality, say=say)
        if frozen.passport is None:
            continue
        check_records(frozen, modality)
        found[name] = counted(frozen.passport, modality, frozen.encoder)
        if record and frozen.source is not None:
            say(f"{name}: recorded in {write_passport(frozen.source.file, found[name])}")
    if not found:
        raise SettingsError(
            "No encoder of these settings is frozen, so none has a passport.",
            "Name one, or a preset whose modalities are cut later than `input`; `mbcd list encoders` shows them.",
        )
    return found


def with_encoder(settings: Settings, encoder: str) -> dict[str, Modality]:
    """The modalities whose encoder it is; where there are none, one of its kind, called so.

    Raises:
        SettingsError: there is no such encoder.
    """
    if named := {name: m for name, m in settings.modalities.items() if m.encoder == encoder}:
        return named
    scheme = SCHEMES.get(encoder.partition(":")[0]) if ":" in encoder else None
    entry = None if scheme is not None else entry_of(encoder, GROUP, ENCODERS, EncoderEntry)
    if scheme is None and entry is None:
        raise SettingsError(
            f"There is no encoder {encoder!r}.",
            f"{did_you_mean(encoder, encoder_names())}`mbcd list encoders` shows the choices.",
        )
    kinds = (entry.kind,) if scheme is None else scheme.kinds
    kind = next((kind for kind in kinds if kind in settings.modalities), kinds[0])
    public = dict(PUBLIC[encoder].settings) if encoder in PUBLIC else {}
    base = settings.modalities.get(kind) or KINDS[kind](**public)
    wanted = base.model_copy(update={"encoder": encoder, "cut": "adapter"})
    if scheme is not None and len(kinds) > 1 and kind not in settings.modalities:
        form = format_of(wanted)
        described = wanted.model_copy(update={"encoder_config": form.describe(wanted, settings.cache.weights_dir)})
        kind = form.wants(described).kind
        wanted = KINDS[kind](encoder=encoder, cut="adapter")
    return {kind: wanted}
