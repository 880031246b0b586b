"""What runs are called, and where what they left lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mbcd_cli.checksums import TRAINED_WITH
from mbcd_cli.errors import FOREIGN, RunError
from mbcd_cli.files import flatten, read_json
from mbcd_cli.resolved import method_label
from mbcd_cli.settings import Settings, role_of

PROMPTS = "prompts.toml"
"""What a zero-shot row's folder has in place of checkpoints."""
REPEATED = "'"
"""Ends the label of a checkpoint that is named once more."""


def run_name(settings: Settings) -> str:
    """`<method>-<modalities>-<target>-s<seed>`: mbcd-va-street-s0."""
    names = settings.model.modalities
    short = "".join(name[0] for name in names) if set(names) <= {"video", "audio", "flow"} else "+".join(names)
    target = settings.training.target_domain or "in-domain"
    return f"{method_label(settings)}-{short}-{target}-s{settings.training.seed}"


def settings_key(settings: Settings) -> str:
    """Hash of every setting a trained weight may depend on, as `open_run` knows them; 12 hexadecimal digits.

    Defaults are left out, so that a setting added to the tree later changes no key.
    """
    tree = settings.model_dump(mode="json", exclude_defaults=True)
    kinds = {name: {**tree["modalities"][name], "kind": kind.kind} for name, kind in settings.modalities.items()}
    tree["modalities"] = {name: kinds.get(name) for name in settings.model.modalities}
    kept = {key: value for key, value in flatten(tree).items() if role_of(key) in ("weights", "cache")}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_of(checkpoint: Path) -> Path | None:
    """The run folder a checkpoint lies in (RUN/checkpoints/x.pt), or None."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "settings.toml").is_file() else None


def run_checkpoints(run: Path) -> dict[str, Path]:
    """best and last of a run, those that exist.

    Raises:
        RunError: not a run folder, or one without checkpoints.
    """
    if not (run / "settings.toml").is_file():
        raise RunError(
            f"{run} is not a run folder.", "`mbcd train` makes one; it holds settings.toml and checkpoints/."
        )
    places = {name: run / "checkpoints" / f"{name}.pt" for name in ("best", "last")}
    files = {name: path for name, path in places.items() if path.is_file()}
    if is_zero_shot(run):
        raise _untrained(run)
    if not files:
        raise RunError(f"Run {run} has no checkpoint yet.", "Go on with `mbcd train ... --resume`.")
    return files


def is_zero_shot(run: Path) -> bool:
    """Whether a folder is a zero-shot row."""
    return (run / PROMPTS).is_file()


def _untrained(row: Path) -> RunError:
    return RunError(f"{row} is a zero-shot row: nothing of it was trained.", "Name a run of `mbcd train`.")


def trained_at(paths: Sequence[Path]) -> list[Path]:
    """The runs at these paths (`runs_at`), in order, without the zero-shot rows beside them.

    Raises:
        RunError: there is none.
    """
    found = sorted({run for path in paths for run in runs_at(path)})
    if trained := [run for run in found if not is_zero_shot(run)]:
        return trained
    raise _untrained(found[0])


def runs_at(path: Path) -> list[Path]:
    """A run folder itself, the runs of a folder of runs, or those that a sweep's tables (comparison.json) are of.

    Raises:
        RunError: there is none.
    """
    if (path / TRAINED_WITH).is_file():
        return [path]
    if (path / "comparison.json").is_file():
        try:
            return [Path(run) for run in read_json(path / "comparison.json")["runs"]]
        except (OSError, *FOREIGN) as error:
            raise RunError(
                f"{path / 'comparison.json'} cannot be read: {error}.", "Name the runs, or collect the sweep again."
            ) from error
    if runs := [file.parent for file in sorted(path.glob(f"*/{TRAINED_WITH}"))]:
        return runs
    raise RunError(f"There is no run at {path}.", "Name a run folder, a folder of runs, or one of a sweep's tables.")


def label_checkpoints(paths: Sequence[Path]) -> dict[str, Path]:
    """Short distinct names for checkpoints in tables and plots: the run's, the file's, or both."""
    runs = [run_of(path) for path in paths]
    labels: dict[str, Path] = {}
    for path, run in zip(paths, runs, strict=True):
        label = path.stem if run is None or set(runs) == {run} else run.name
        if label in labels and run is not None:
            label = f"{run.name}/{path.stem}"
        while label in labels:
            label += REPEATED
        labels[label] = path
    return labels
