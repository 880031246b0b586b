"""How a command is made of a function and the flags of some settings (`settings.flags`).

A flag's help, type and choices are those of its setting; a value that is not given leaves the layers below as they are.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, get_args, get_origin

import typer
from typer.models import CommandInfo

from mbcd_cli import console
from mbcd_cli.cli.help import command_with
from mbcd_cli.cli.outcome import finish, outcome
from mbcd_cli.errors import UsageError
from mbcd_cli.files import make_folder
from mbcd_cli.naming import name_faults
from mbcd_cli.settings import FLAGS, CacheSettings, ManifestSettings, MethodSettings, Settings

COMMON = ("cache.dir", "runtime.device", "runtime.threads")
"""Settings whose flags every layered command has."""
_SETTINGS, _RUNTIME, _OUTPUT = "Settings", "Runtime", "Output"
_PANELS = {
    "model.modalities": _SETTINGS,
    "cache.dir": _SETTINGS,
    "runtime.device": _RUNTIME,
    "runtime.threads": _RUNTIME,
}
Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Preset by name or path; `none` for the bare defaults.", rich_help_panel=_SETTINGS),
]
Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file laid over the preset.", rich_help_panel=_SETTINGS)
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, as part.field=value; repeatable.", rich_help_panel=_SETTINGS),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, messages on stderr.", rich_help_panel=_OUTPUT)
]
Csv = Annotated[
    Path | None,
    typer.Option("--csv", help="Folder for the printed tables, as CSV files too.", rich_help_panel=_OUTPUT),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=_OUTPUT)]
ShowSettings = Annotated[
    bool,
    typer.Option("--show-settings", help="Print the resolved settings as TOML and stop.", rich_help_panel=_SETTINGS),
]
RunPath = Annotated[Path | None, typer.Option("--run", "--run-dir", help="Run folder.")]
RunPatterns = Annotated[list[str] | None, typer.Option("--runs", help="Evaluated run folders (a pattern; repeatable).")]
MoreRuns = Annotated[
    list[str] | None, typer.Argument(metavar="RUN", help="More for --runs: what a shell makes of a bare pattern.")
]
RunsOrFolders = Annotated[
    list[Path], typer.Argument(metavar="PATH", help="Runs, folders of runs, or a sweep's folder of tables.")
]
Targets = Annotated[str | None, typer.Option("--targets", help="Unseen domains: all, or names.")]
MethodNames = Annotated[str | None, typer.Option("--methods", help="Methods, e.g. erm,ema,mbcd (mbcd list methods).")]
Seeds = Annotated[str, typer.Option("--seeds", help="How many seeds, or the seeds: 3 or 0,4,7 (7, for one).")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of all runs.")]
_CHECKPOINT = typer.Option("--checkpoint", help="Checkpoint file; `mbcd landscape` compares several.")
CheckpointPath = Annotated[Path | None, _CHECKPOINT]
CheckpointPaths = Annotated[list[Path], _CHECKPOINT]
Output = Annotated[Path | None, typer.Option("--output", help="Folder for what is written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew, in place of what is there.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Processes at a time, one GPU each where there are GPUs.")]
Launcher = Annotated[str, typer.Option("--launcher", help="local processes, slurm (by submitit) or ray.")]
SlurmOptions = Annotated[
    list[str] | None, typer.Option("--slurm", help="submitit parameter, e.g. timeout_min=240; repeatable.")
]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="auto, or host:port; default: a cluster of this machine.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it takes, then stop.")]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says about the settings.

    Attributes:
        flags: setting -> value, of the flags that were given.
        preset, config, sets: as they were given.
        as_json: whether one JSON object is wanted.
    """

    flags: Mapping[str, object]
    preset: str | None = None
    config: Path | None = None
    sets: Sequence[str] = ()
    as_json: bool = False

    def resolve(self, preset: str | None, *, named: bool = False) -> Settings:
        """The settings of all layers, `preset` being the lowest; `named`: it names a dataset without a name."""
        from mbcd_cli.resolved import (  # late: it needs the kinds of modality, help does not
            named_dataset,
            resolve,
        )

        settings = resolve(**self._sources(preset))
        return named_dataset(settings, preset) if named else settings

    def _sources(self, preset: str | None) -> dict[str, object]:
        flags = dict(self.flags)
        method = flags.pop("method.name", None)
        return {
            "preset": preset,
            "config": self.config,
            "environ": os.environ,
            "sets": self.sets,
            "method": method,
            "flags": flags,
        }

    def look_up(self, preset: str | None) -> None:
        """Refuse a dataset that is not prepared, and domains that it lacks, before anything slow is imported.

        Raises:
            CacheError, SettingsError: it is not, or lacks one.
        """
        from mbcd_cli.data.prepared import check_dataset, check_domains, stored_domains
        from mbcd_cli.resolved import layers_of, stated

        layers = layers_of(**self._sources(preset))
        name = stated(layers, "dataset.name") or (preset and Path(preset).stem)
        folder = stated(layers, "cache.dir") or CacheSettings().dir
        if not isinstance(name, str) or not isinstance(folder, str | Path) or name_faults("dataset", name):
            return  # who reads all settings says what is wrong
        cache = Path(folder).expanduser()
        check_dataset(cache, name)
        target, domains = stated(layers, "training.target_domain"), stored_domains(cache, name)
        if domains and isinstance(target, str) and target != "none":
            check_domains(name, domains, [target])


_HANDED = ("asked", "show_settings")
"""Parameters of a command that are no options of its own."""
Reply = tuple[object, Callable[[], None]]
"""A command's result (what `json_values` takes), and what shows it to a person; its `exit_code` is the command's."""


def with_more(runs: list[str] | None, more: list[str] | None) -> list[str] | None:
    """What `--runs` names, and what a shell makes of a pattern that is not quoted: words after the first.

    Raises:
        UsageError: such words without `--runs`.
    """
    if more and runs is None:
        raise UsageError(f"{more[0]}: there is no option before it.", "Write --runs before the runs to compare.")
    return None if runs is None else [*runs, *(more or ())]


def command(
    *flags: str,
    examples: Sequence[str],
    layered: bool = True,
    preset: bool = False,
    show_settings: bool = False,
    panels: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Callable[..., Reply | None]], CommandInfo]:
    """Make a command of a function: its parameters, and the options of some settings.

    The function gets `asked` and its own parameters; it returns what is to be emitted and shown, or None.

    Args:
        flags: settings whose flags the command has (`FLAGS`).
        examples: lines that a user can type.
        layered: --config, --set and `COMMON` too. preset: --preset.
        show_settings: --show-settings, handed to the function.
        panels: setting -> heading of its flag in the help.
    """
    headings = {**_PANELS, **panels}

    def make(function: Callable[..., Reply | None]) -> CommandInfo:
        names = {path.replace(".", "__"): path for path in (*flags, *(COMMON if layered else ()))}
        options = {name: _option(path, headings.get(path)) for name, path in names.items()}
        last = {name: option for name, option in options.items() if names[name] in headings}
        common: dict[str, object] = {"preset": Preset} if preset else {}
        common |= {"config": Config, "set_": Sets} if layered else {}
        switches = ({"show_settings": ShowSettings} if show_settings else {}) | {"as_json": Json, "debug": Debug}

        @wraps(function)
        def run(**given: object) -> None:
            given = {name: _at_home(value) for name, value in given.items()}
            debug = given.pop("debug")
            asked = Asked(
                flags={path: value for name, path in names.items() if (value := given.pop(name)) is not None},
                preset=given.pop("preset", None),
                config=given.pop("config", None),
                sets=given.pop("set_", None) or (),
                as_json=given.pop("as_json"),
            )
            console.tables_folder = given.pop("csv_")
            with outcome(as_json=asked.as_json, debug=debug):
                if console.tables_folder is not None:
                    make_folder(console.tables_folder, place="--csv")
                shown = function(asked, **given)
                if shown is not None:
                    finish(*shown, as_json=asked.as_json)

        def parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
            return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

        needed = inspect.Parameter.empty
        declared = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name not in _HANDED]
        parameters = [
            *(
                parameter(n, o, None if FLAGS[names[n]].startswith("-") else needed)
                for n, o in options.items()
                if n not in last
            ),
            *(parameter(p.name, p.annotation, p.default) for p in declared),
            *(parameter(name, option, None) for name, option in (common | last | {"csv_": Csv}).items()),
            *(parameter(name, option, False) for name, option in switches.items()),
        ]
        parameters.sort(key=lambda p: p.default is not needed)
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        help_names = {"help_option_names": ["-h", "--help"]}
        name = function.__name__.replace("_", "-")
        return CommandInfo(name, cls=command_with(examples), callback=run, context_settings=help_names)

    return make


def _at_home(value: object) -> object:
    """`~` at the beginning of a path; the shell leaves it as it is in --output=~/x."""
    if isinstance(value, list):
        return [_at_home(element) for element in value]
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value  # noqa: PTH111


def _option(path: str, panel: str | None) -> object:
    """The annotated type of a setting's flag, with its docstring and choices as the help."""
    group, _, name = path.rpartition(".")
    group_class = {"method": MethodSettings, "dataset.reader": ManifestSettings}.get(group)
    field = (group_class or Settings.model_fields[group].annotation).model_fields[name]
    plain, choices = _plain(field.annotation)
    text = (field.description or "") + (f" One of: {', '.join(choices)}." if choices else "")
    if not FLAGS[path].startswith("-"):
        return Annotated[plain, typer.Argument(metavar=FLAGS[path], help=text)]
    return Annotated[plain | None, typer.Option(*FLAGS[path].split(), help=text, rich_help_panel=panel)]


def _plain(annotation: object) -> tuple[type, tuple[str, ...]]:
    """The type that the command line reads, and the choices; what is neither number, path nor switch is text."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str, inner
    if annotation in (int, float, bool, Path):
        return annotation, ()
    if origin is tuple or not inner:
        return str, _plain(inner[0])[1] if inner else ()
    return _plain(inner[0])


def listed(path: str, text: str) -> tuple[str, ...]:
    """`a,b` -> (a, b) of a setting with choices; `all` is every one of them."""
    group, name = path.split(".")
    choices = _plain(Settings.model_fields[group].annotation.model_fields[name].annotation)[1]
    return choices if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())


def preset_of(asked: Asked, *names: str) -> str | None:
    """The preset asked for, else the first of `names` that is one's; None for bare defaults."""
    from mbcd_cli.settings.sources import preset_names

    if asked.preset is not None:
        return None if asked.preset == "none" else asked.preset
    return next((name for name in names if name in preset_names()), None)


def preset_for_reader(asked: Asked) -> str | None:
    """The preset asked for, else (with no --config) the one named like the reader, else like the root folder."""
    root = asked.flags.get("dataset.root")
    named = (asked.flags["dataset.reader"], root.resolve().name if root is not None else "")
    return preset_of(asked, *(named if asked.config is None else ()))


def dataset_preset(asked: Asked) -> str | None:
    """The preset asked for, else the one named like the dataset, else (with nothing named) the paper's first."""
    from mbcd_cli.paper.published import PAPER_DATASETS

    unnamed = () if asked.config is not None else PAPER_DATASETS[:1]
    return preset_of(asked, *([asked.flags["dataset.name"]] if "dataset.name" in asked.flags else unnamed))


def emit_settings(settings: Settings, *, as_json: bool) -> None:
    """The resolved tree on stdout, as TOML or as one JSON object."""
    if as_json:
        console.emit_json(settings.model_dump(mode="json", exclude_none=True))
        return
    from mbcd_cli.settings.sources import to_toml

    typer.echo(to_toml(settings), nl=False)
