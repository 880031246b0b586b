"""The command line: flags in, exit codes out. The only place that turns MbcdError into an exit code."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mbcd_cli import __version__, console
from mbcd_cli.errors import MbcdError, RunError

app = typer.Typer(
    name="mbcd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Modality-Balanced Collaborative Distillation for multi-modal domain generalization: "
    "prepare datasets once, train from the cache, evaluate on unseen domains, look at the loss landscape.",
    epilog="Begin with [bold]mbcd demo[/bold], then [bold]mbcd list presets[/bold].",
)

_SETTINGS, _RUNTIME, _OUTPUT, _NEW = "Settings", "Runtime", "Output", "New clips"
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
CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", help="Folder of the caches (default: cache).", rich_help_panel=_SETTINGS)
]
Modalities = Annotated[
    str | None, typer.Option("--modalities", help="Modalities to use, e.g. video,audio.", rich_help_panel=_SETTINGS)
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=_RUNTIME)
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads; 0 leaves it to torch.", rich_help_panel=_RUNTIME)
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, messages on stderr.", rich_help_panel=_OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=_OUTPUT)]
ShowSettings = Annotated[
    bool,
    typer.Option("--show-settings", help="Print the resolved settings as TOML and stop.", rich_help_panel=_SETTINGS),
]


def _examples(*lines: str) -> str:
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


@contextmanager
def _outcome(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Errors become one message and an exit code: 1 the user's to mend, 3 too many rejected clips.

    A scheduler's SIGTERM is answered like Ctrl-C, so that helper processes and shared memory go too.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with warnings.catch_warnings():
            if not debug:  # one line each, as all that is said
                warnings.showwarning = lambda message, *_, **__: console.warn(str(message))
            yield
    except MbcdError as error:
        if debug:
            raise
        _fail(str(error), error.message, error.remedy, as_json=as_json)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        console.say("Interrupted.")
        raise typer.Exit(130) from error
    except BrokenPipeError as error:  # `mbcd ... | head` is no error
        raise typer.Exit(0) from error
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        if debug:
            raise
        message = f"Unexpected {type(error).__name__}: {error}"
        remedy = "Run the command again with --debug and report what it shows."
        _fail(f"{message}\n{remedy}", message, remedy, as_json=as_json)
        raise typer.Exit(1) from error


def _fail(text: str, message: str, remedy: str, *, as_json: bool) -> None:
    rank = os.environ.get("RANK", "0")  # as it stands there: it may be what the error is about
    other = rank.isdecimal() and int(rank) > 0
    console.say(f"error{f' in process {rank}' if other else ''}: {text}")
    if as_json and not other:
        console.emit_json({"error": message, "remedy": remedy})


def _finish(result: dict[str, Any], *, as_json: bool) -> None:

    if as_json:
        console.emit_json(json_safe(result))
    if result.get("exit_code"):
        raise typer.Exit(result["exit_code"])


@app.command(
    epilog=_examples(
        "mbcd prepare manifest --root data/av-digits",
        "mbcd prepare demo --modalities video,audio,flow",
        "mbcd prepare manifest --root data/mine --compute-flow --set cache.views=8",
        "mbcd prepare epic-kitchens --root EPIC --check",
        "torchrun --nproc-per-node 4 -m mbcd_cli prepare epic-kitchens --root EPIC",
    )
)
def prepare(
    dataset: Annotated[str, typer.Argument(help="Reader of the dataset: manifest, demo, epic-kitchens or hac.")],
    root: Annotated[Path | None, typer.Option("--root", help="Folder that holds the dataset.")] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="CSV table of a manifest dataset, relative to the root.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the dataset in the cache.")] = None,
    modalities: Modalities = None,
    compute_flow: Annotated[
        bool | None, typer.Option("--compute-flow/--no-compute-flow", help="Compute flow where there is none.")
    ] = None,
    views: Annotated[int | None, typer.Option("--views", help="Random training views per clip.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes that decode media.")] = None,
    max_bad: Annotated[int | None, typer.Option("--max-bad", help="Rejected clips tolerated.")] = None,
    missing_frames: Annotated[
        str | None, typer.Option("--missing-frames", help="Single missing frames: nearest or reject.")
    ] = None,
    weights_dir: Annotated[Path | None, typer.Option("--weights-dir", help="Folder of pretrained weights.")] = None,
    random_weights: Annotated[
        bool | None, typer.Option("--random-weights", help="Allow a trunk with random weights.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is there, what is missing, how much space and time it takes.")
    ] = False,
    preset: Preset = None,
    config: Config = None,
    set_: Sets = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    threads: Threads = None,
    show_settings: ShowSettings = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decode a dataset once, run the frozen trunks, fill the cache.

    Bad clips are reported and left out. What is prepared already is reused; a killed run resumes.
    """
    from mbcd_cli import layers

    with _outcome(as_json=as_json, debug=debug):
        chosen = _preset_for_prepare(preset, config, dataset, root)
        settings = layers.resolve(
            preset=chosen,
            config=config,
            environ=os.environ,
            sets=set_ or (),
            flags={
                "dataset.reader": dataset,
                "dataset.root": root,
                "dataset.manifest": manifest,
                "dataset.name": name,
                "dataset.compute_flow": compute_flow,
                "dataset.max_bad": max_bad,
                "dataset.missing_frames": missing_frames,
                "model.modalities": modalities,
                "cache.dir": cache_dir,
                "cache.views": views,
                "cache.workers": workers,
                "cache.weights_dir": weights_dir,
                "cache.random_weights": random_weights,
                "runtime.device": device,
                "runtime.threads": threads,
            },
        )
        if show_settings:
            typer.echo(layers.to_toml(settings), nl=False)
            return
        from mbcd_cli.preparation import prepare as command
        from mbcd_cli.runtime import configure

        configure(settings.runtime)
        if check:
            from mbcd_cli.preparation import check as checking

            result = checking.check(settings)
            if not as_json:
                checking.show(result)
            _finish(result, as_json=as_json)
            return
        result = command.prepare(settings)
        if not result:  # rank 0 of several processes tells
            return
        if not as_json:
            asked = {"dataset.name": name, "cache.views": views, "dataset.missing_frames": missing_frames}
            assignments = [*(set_ or ()), *(f"{key}={value}" for key, value in asked.items() if value is not None)]
            command.show(
                result,
                preset=chosen,
                repeat=_repeated(assignments if chosen or config else (), config, modalities, cache_dir),
            )
        _finish(result, as_json=as_json)


def _repeated(sets: Sequence[str], config: Path | None, modalities: str | None, cache_dir: Path | None) -> list[str]:
    """What `train` must be told as `prepare` was, so that it means the same cache."""
    from mbcd_cli.settings import role_of

    words = [] if config is None else ["--config", str(config)]
    words += [] if modalities is None else ["--modalities", modalities]
    words += [] if cache_dir is None else ["--cache-dir", str(cache_dir)]
    parts = ("cache.", "dataset.", "modalities.")
    kept = [one for one in sets if one.startswith(parts) and role_of(one.partition("=")[0]) != "machine"]
    return words + [word for one in kept for word in ("--set", one)]


def _preset_for_prepare(preset: str | None, config: Path | None, reader: str, root: Path | None) -> str | None:
    """The preset asked for, else the one named like the reader or like the dataset's folder."""
    from mbcd_cli import layers

    if preset is not None:
        return None if preset == "none" else preset
    if config is not None:
        return None
    folder = root.resolve().name if root is not None else ""
    for candidate in (reader, folder):
        if candidate in layers.preset_names():
            console.say(f"Using preset {candidate} (--preset none for the bare defaults).")
            return candidate
    return None


@app.command(
    epilog=_examples(
        "mbcd train --preset av-digits --target-domain street",
        "mbcd train --preset av-digits --target-domain street --method erm --seed 1",
        "mbcd train --target-domain D2 --modalities video,audio",
    )
)
def train(
    target_domain: Annotated[
        str | None, typer.Option("--target-domain", help="Unseen domain; the others are the sources.")
    ] = None,
    source_domains: Annotated[
        str | None, typer.Option("--source-domains", help="Domains to train on, e.g. D1,D3.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="erm, ema, mbcd (default), ..., FILE.py:Class.")
    ] = None,
    modalities: Modalities = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Name of a prepared dataset (default: the preset's).")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training clips.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Clips per step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")] = None,
    limit_clips: Annotated[int | None, typer.Option("--limit-clips", help="At most so many training clips.")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Stop after so many steps.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print shapes, sizes and step time, then stop.")] = False,
    run: Annotated[
        Path | None,
        typer.Option("--run", "--run-dir", help="Run folder (default: made from dataset, method, target and seed)."),
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
    preset: Preset = None,
    config: Config = None,
    set_: Sets = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    threads: Threads = None,
    show_settings: ShowSettings = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train on the source domains from the cache; the target is only reported.

    Without --preset, --config or --dataset the preset is epic-kitchens.
    """
    from mbcd_cli import layers

    with _outcome(as_json=as_json, debug=debug):
        if resume and overwrite:
            raise RunError("--resume and --overwrite contradict each other.", "Use one of them.")
        chosen = _preset_for_train(preset, config, dataset)
        settings = layers.resolve(
            preset=chosen,
            config=config,
            environ=os.environ,
            sets=set_ or (),
            method=method,
            flags={
                "dataset.name": dataset,
                "training.target_domain": target_domain,
                "training.source_domains": source_domains,
                "model.modalities": modalities,
                "training.epochs": epochs,
                "training.batch_size": batch_size,
                "optimizer.lr": lr,
                "training.seed": seed,
                "training.limit_clips": limit_clips,
                "training.max_steps": max_steps,
                "cache.dir": cache_dir,
                "runtime.device": device,
                "runtime.threads": threads,
            },
        )
        if settings.dataset.name is None and chosen is not None:
            named = settings.dataset.model_copy(update={"name": Path(chosen).stem})
            settings = settings.model_copy(update={"dataset": named})
        if show_settings:
            typer.echo(layers.to_toml(settings), nl=False)
            return
        from mbcd_cli.runs import names, opening
        from mbcd_cli.runtime import configure
        from mbcd_cli.training import train as command

        configure(settings.runtime)
        settings, data = opening.open_for_training(settings)
        if dry_run:
            from mbcd_cli.training.dry_run import dry_run as trial

            result = trial(settings, data)
            if not as_json:
                command.show_dry_run(result)
        else:
            folder = run or runs_dir / data.name / names.run_name(settings)
            result = command.train(settings, data, run=folder, resume=resume, overwrite=overwrite)
            if not result:  # under torchrun rank 0 alone reports
                return
            if not as_json:
                command.show(result)
        _finish(result, as_json=as_json)


def _preset_for_train(preset: str | None, config: Path | None, dataset: str | None) -> str | None:
    """The preset asked for, else the one named like the dataset, else (with nothing named) epic-kitchens."""
    from mbcd_cli import layers

    if preset is not None:
        return None if preset == "none" else preset
    if dataset is not None:
        return dataset if dataset in layers.preset_names() else None
    return None if config is not None else "epic-kitchens"


@app.command(
    epilog=_examples(
        "mbcd evaluate --run runs/av-digits/mbcd-va-street-s0",
        "mbcd evaluate --run RUN --analyses all --export csv,hdf5",
        "mbcd evaluate --run RUN --data-root new-clips",
        "mbcd evaluate --runs 'runs/av-digits/*' --output comparison",
    )
)
def evaluate(
    run: Annotated[Path | None, typer.Option("--run", help="Run folder; its best and last checkpoints.")] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="One checkpoint file.")] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option("--runs", help="Evaluated run folders (a pattern; repeatable) to compare in tables."),
    ] = None,
    ood: Annotated[
        Path | None,
        typer.Option("--ood", help="Cache folder of another dataset, for out-of-distribution detection."),
    ] = None,
    analyses: Annotated[
        str | None,
        typer.Option("--analyses", help="missing, shift, corruptions, trust, insight; or all (default: the run's)."),
    ] = None,
    export: Annotated[
        str | None, typer.Option("--export", help="csv (predictions), hdf5 (embeddings), or csv,hdf5.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for what is written (default: the run folder).")
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", help="Folder of new clips to predict.", rich_help_panel=_NEW),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            help="CSV table of the new clips (default: manifest.csv in their folder).",
            rich_help_panel=_NEW,
        ),
    ] = None,
    max_bad: Annotated[
        int | None,
        typer.Option("--max-bad", min=0, help="Rejected new clips tolerated (default: 0).", rich_help_panel=_NEW),
    ] = None,
    weights_dir: Annotated[
        Path | None,
        typer.Option("--weights-dir", help="Folder of the trunks' pretrained weights.", rich_help_panel=_NEW),
    ] = None,
    config: Config = None,
    set_: Sets = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a run on its domains, predict new clips with it, or compare runs.

    Accuracy fused and per modality, missing modalities, calibration, t-SNE, an HTML report.

    With --data-root, new clips (labelled or not) are prepared and predicted: predict.csv.
    """

    with _outcome(as_json=as_json, debug=debug):
        if sum(given is not None for given in (run, checkpoint, runs)) != 1:
            raise RunError("Name what to evaluate.", "Use one of --run RUN, --checkpoint FILE and --runs PATTERN.")
        new = data_root is not None or manifest is not None
        if new and (runs is not None or ood is not None):
            raise RunError(
                "New clips are predicted by one model alone.",
                "Leave out --runs and --ood with --data-root or --manifest.",
            )
        if not new and max_bad is not None:
            raise RunError("--max-bad is about new clips.", "Name their folder with --data-root.")
        from mbcd_cli.evaluation import evaluate as command
        from mbcd_cli.runs import names, opening
        from mbcd_cli.runtime import configure

        if runs is not None:
            from mbcd_cli.evaluation.report.comparison import compare_runs

            compared = compare_runs(runs, output=output or Path("comparison"))
            if not as_json:
                command.show_comparison(compared)
            _finish(compared, as_json=as_json)
            return
        files = names.run_checkpoints(run) if run is not None else {checkpoint.stem: checkpoint}
        asked = {
            "config": config,
            "sets": set_ or (),
            "cache_dir": cache_dir,
            "device": device,
            "threads": threads,
            "weights_dir": weights_dir,
            "flags": command.flags(analyses, export),
        }
        if new:
            from mbcd_cli.evaluation import new_data

            settings, checkpoints = opening.load_checkpoints(files, **asked)
            predicted = new_data.predict_new(
                settings,
                checkpoints,
                root=data_root,
                manifest=manifest,
                cache_dir=cache_dir,
                output=output,
                device=configure(settings.runtime),
                max_bad=max_bad or 0,
            )
            if not as_json:
                new_data.show(predicted)
            _finish(predicted, as_json=as_json)
            return
        settings, data, checkpoints = opening.open_checkpoints(files, **asked)
        if run is not None:
            wanted = [name for name in settings.evaluation.checkpoints if name in checkpoints]
            checkpoints = {name: checkpoints[name] for name in wanted}
        folder = run or names.run_of(checkpoint)
        result = command.evaluate(
            settings,
            data,
            checkpoints,
            device=configure(settings.runtime),
            run=folder,
            output=output or folder or checkpoint.parent,
            ood=opening.open_other(settings, ood) if ood is not None else None,
        )
        if not as_json:
            command.show(result)
        _finish(result, as_json=as_json)


@app.command(
    epilog=_examples(
        "mbcd landscape --checkpoint RUN/checkpoints/best.pt",
        "mbcd landscape --checkpoint ERM/checkpoints/best.pt --checkpoint MBCD/checkpoints/best.pt",
        "mbcd landscape --checkpoint ERM/checkpoints/best.pt --to MBCD/checkpoints/best.pt",
    )
)
def landscape(
    checkpoint: Annotated[
        list[Path], typer.Option("--checkpoint", help="Checkpoint file; repeat it to compare several.")
    ],
    to: Annotated[
        list[Path] | None,
        typer.Option("--to", help="Checkpoint at the other end of a path; two of them span a plane."),
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Project the run's kept epochs (training.keep_checkpoints) on a plane.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for HDF5 files and plots (default: RUN/landscape).")
    ] = None,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw the files again, measure nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure anew instead of resuming.")] = False,
    config: Config = None,
    set_: Sets = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where training ended: loss surfaces, flatness and curvature around checkpoints, paths between them."""
    with _outcome(as_json=as_json, debug=debug):
        from mbcd_cli.landscape import measure as command
        from mbcd_cli.runs import names, opening
        from mbcd_cli.runtime import configure

        folder = output or (names.run_of(checkpoint[0]) or checkpoint[0].parent) / "landscape"
        if plot_only:
            result = command.redraw(folder)
            if not as_json:
                command.show(result)
            _finish(result, as_json=as_json)
            return
        named = names.label_checkpoints([*checkpoint, *(to or [])])
        settings, data, checkpoints = opening.open_checkpoints(
            named, config=config, sets=set_ or (), cache_dir=cache_dir, device=device, threads=threads
        )
        pairs = list(checkpoints.items())
        result = command.landscape(
            settings,
            data,
            pairs[: len(checkpoint)],
            towards=pairs[len(checkpoint) :],
            epochs=opening.kept_epochs(checkpoint[0]) if trajectory else (),
            output=folder,
            device=configure(settings.runtime),
            overwrite=overwrite,
        )
        if result.get("rank", 0) == 0:  # under torchrun the others have measured their share and stay silent
            if not as_json:
                command.show(result)
            _finish(result, as_json=as_json)


@app.command(
    epilog=_examples("mbcd demo", "mbcd demo --dir /tmp/mbcd-demo --target-domain workshop", "mbcd demo --json")
)
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Folder for the demo's media, cache and runs.")] = Path(
        "mbcd-demo"
    ),
    target_domain: Annotated[str | None, typer.Option("--target-domain", help="Unseen domain.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the trainings.")] = 0,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training clips.")] = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the whole story on an embedded dataset: prepare, train ERM and MBCD, evaluate, landscape."""
    with _outcome(as_json=as_json, debug=debug):
        from mbcd_cli import story as command

        result = command.demo(
            directory, target_domain=target_domain, seed=seed, epochs=epochs, device=device, threads=threads
        )
        if not as_json:
            command.show(result)
        _finish(result, as_json=as_json)


@app.command(
    epilog=_examples(
        "mbcd sweep --preset av-digits --targets all --methods erm,mbcd --seeds 3",
        "mbcd sweep --preset epic-kitchens --table 1 --dry-run",
        "mbcd sweep --preset av-digits --grid average.beta=0.9,0.99",
    )
)
def sweep(
    table: Annotated[int | None, typer.Option("--table", help="One of the paper's tables, 1 to 5.")] = None,
    targets: Annotated[str | None, typer.Option("--targets", help="Unseen domains: all, or names.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Methods, e.g. erm,ema,mbcd (mbcd list methods).")
    ] = None,
    modality_sets: Annotated[
        str | None, typer.Option("--modality-sets", help="Sets of modalities: va,vf,vaf or video+audio,... .")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="multi-source (default), single-source or in-domain.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="How many seeds, or the seeds: 3 or 0,4,7.")] = "3",
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="One axis over a setting: part.field=v1,v2; repeatable.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Name of a prepared dataset (default: the preset's).")
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder of the dataset: prepare what of it is not prepared yet.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs, time and disk, then stop.")] = False,
    collect: Annotated[bool, typer.Option("--collect", help="Only collect the runs that are done.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed runs again.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", help="Runs at a time, one GPU each where there are GPUs.")] = 1,
    launcher: Annotated[str, typer.Option("--launcher", help="local processes, or slurm (by submitit).")] = "local",
    slurm: Annotated[
        list[str] | None, typer.Option("--slurm", help="submitit parameter, e.g. timeout_min=240; repeatable.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Folder of all runs.")] = Path("runs"),
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the tables (default: sweeps/...).")] = None,
    preset: Preset = None,
    config: Config = None,
    set_: Sets = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the grid of runs behind a table, then collect it: mean and spread over seeds, significance, curves.

    Runs that are done are never repeated, killed ones resume, failed ones are listed.
    """
    with _outcome(as_json=as_json, debug=debug):
        from mbcd_cli.sweep import request as asking
        from mbcd_cli.sweep import sweep as command

        request = asking.Request(
            table=table,
            targets=targets,
            methods=methods,
            modality_sets=modality_sets,
            protocol=protocol,
            seeds=seeds,
            grid=grid or (),
        )
        layers: dict[str, Any] = {
            "preset": _preset_for_train(preset, config, dataset),
            "config": config,
            "sets": set_ or (),
            "flags": {
                "dataset.name": dataset,
                "cache.dir": cache_dir,
                "runtime.device": device,
                "runtime.threads": threads,
            },
        }
        command.check_execution(jobs, launcher)
        if root is not None and not (dry_run or collect):
            command.prepare_first(root, **layers)
        cells = asking.make_plan(request, **layers, runs_dir=runs_dir)
        if dry_run:
            found = command.dry_run(cells, jobs=jobs)
            if not as_json:
                command.show_plan(found)
            found.pop("estimate")
            _finish(found, as_json=as_json)
            return
        done: dict[str, Any] = {"failed": {}}
        if not collect:
            how = {"jobs": jobs, "launcher": launcher, "slurm": slurm or (), "retry_failed": retry_failed}
            done = command.run(cells, **how, root=root)
        failure = command.report_failures(done)
        folder = output or asking.output_of(request, cells)
        if failure is not None and not done["done"]:
            raise failure
        result = command.collect(cells, output=folder, title=asking.title_of(request, cells))
        if not as_json:
            command.show(result)
        elif failure is None:
            _finish({**done, **result}, as_json=True)
        if failure is not None:
            raise failure


@app.command(name="list", epilog=_examples("mbcd list presets", "mbcd list datasets --cache-dir cache"))
def list_(
    what: Annotated[str, typer.Argument(help="presets, datasets, encoders or methods.")],
    cache_dir: CacheDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List what can be chosen."""
    with _outcome(as_json=as_json, debug=debug):
        from mbcd_cli.cli import choices as command

        columns, rows = command.choices(what, cache_dir or Path("cache"))
        if as_json:
            console.emit_json([dict(zip(columns, row, strict=True)) for row in rows])
        else:
            console.table(what, columns, rows)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mbcd {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `mbcd` script."""
    sys.exit(app())


def json_safe(value: Any) -> Any:
    """`value` with everything JSON cannot hold (NaN, infinities) as None."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
