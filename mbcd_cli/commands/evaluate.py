"""`mbcd evaluate`: measure a run's checkpoints on a prepared dataset, write results.json, plots and a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from mbcd_cli import console
from mbcd_cli.commands.prepare import read_listing
from mbcd_cli.data.cache import listing_digest
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.readers import reader_settings
from mbcd_cli.data.records import Batch, Clip
from mbcd_cli.errors import MbcdError, RunError
from mbcd_cli.evaluation import plots
from mbcd_cli.evaluation.analyses import Analysis, analyse, clear
from mbcd_cli.evaluation.compare import Run, compare, distinct, find_runs, load_run, main_tables
from mbcd_cli.evaluation.evaluator import TARGET, deployed, evaluate_models
from mbcd_cli.evaluation.history import accuracy_history
from mbcd_cli.evaluation.html import runs_html, write_comparison, write_report
from mbcd_cli.evaluation.report import print_comparison, print_results
from mbcd_cli.evaluation.results import collect, describe, provenance, warnings
from mbcd_cli.evaluation.robustness import subset_variants
from mbcd_cli.evaluation.tables import Table, as_values, comma_separated, from_values, latex, markdown
from mbcd_cli.files import read_records, write_json, write_text
from mbcd_cli.layers import method_label, to_toml
from mbcd_cli.settings import DatasetSettings, EvaluationSettings, Settings


def evaluate(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Mapping[str, Any],
    *,
    device: torch.device,
    run: Path | None,
    output: Path,
    ood: Dataset | None = None,
) -> dict[str, Any]:
    """Evaluate `checkpoints` (best / last -> checkpoint) and write everything under `output`.

    Args:
        settings: the run's, with the evaluation slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: those of `settings.evaluation.checkpoints` that exist.
        device: where to compute.
        run: the run folder, for its accuracy per epoch; None takes what the checkpoint remembers.
        output: folder for results.json, report.html, plots/ and evaluation/ (usually the run folder).
        ood: another prepared dataset, for out-of-distribution detection.

    Returns:
        What results.json holds, and `files`: name -> path of everything written.
    """
    results, model = evaluate_models(
        settings,
        dataset,
        checkpoints,
        device=device,
        watch=_watch,
        variants=subset_variants if "missing" in settings.evaluation.analyses else lambda model: {},
    )
    chosen = deployed(checkpoints)
    about = {**describe(settings, dataset, checkpoints), "method": method_label(settings)}
    figures = collect(about, results, chosen)
    figures["warnings"] = warnings(figures, checkpoints)
    of_chosen = [one for one in results if (one.checkpoint, one.model) == chosen]
    clips, missing = _media(settings, dataset) if "corruptions" in settings.evaluation.analyses else (None, "")
    analysis = Analysis(
        settings=settings,
        dataset=dataset,
        clips=clips,
        clips_missing=missing,
        model=model,
        results=sorted(of_chosen, key=lambda one: one.clip_set.name != TARGET),
        device=device,
        output=output,
        watch=_watch,
    )
    clear(output)
    _accuracy_plots(analysis)
    _history(figures, analysis, run, checkpoints[chosen[0]])
    analyse(analysis, ood=ood)
    figures |= analysis.figures
    figures["provenance"] = provenance(dataset, checkpoints, device)
    files = {"results": write_json(output / "results.json", figures), **analysis.files}
    if settings.evaluation.report:
        path = output / "report.html"
        text = to_toml(settings)
        files["report"] = write_report(path, figures, files=analysis.files, settings=text, run=run)
    return {**figures, "files": {name: str(path) for name, path in files.items()}}


def _media(settings: Settings, dataset: Dataset) -> tuple[tuple[list[Clip], DatasetSettings] | None, str]:
    """The clips of the dataset with their files, in the order of its clip table; or None, and why."""
    cache = next(iter(dataset.caches.values()), None)
    if cache is None:
        return None, "the dataset has no media"
    root = settings.dataset.root or Path(cache.provenance.get("root", ""))
    if not root.is_dir():
        return None, f"the media are not at {root} (--set dataset.root=DIR says where they are)"
    try:
        reader = settings.dataset.reader
        if reader.name != cache.provenance["reader"]:  # the settings name the prepared dataset only
            reader = reader_settings(cache.provenance["reader"])
        there = settings.dataset.model_copy(update={"root": root, "reader": reader})
        listing = read_listing(settings.model_copy(update={"dataset": there}))
    except MbcdError as error:
        return None, error.message.splitlines()[0].rstrip(".")
    if listing_digest(listing.clips) != cache.listing:
        return None, f"{root} holds other clips than the cache (--set dataset.root=DIR says where they are)"
    return (listing.clips, there), ""


def flags(analyses: str | None, export: str | None) -> dict[str, Any]:
    """The settings that `--analyses` and `--export` stand for; `all` is every analysis."""

    def names(text: str | None) -> tuple[str, ...] | None:
        return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())

    wanted = get_args(get_args(EvaluationSettings.model_fields["analyses"].annotation)[0])
    return {
        "evaluation.analyses": wanted if analyses == "all" else names(analyses),
        "evaluation.export": names(export),
    }


def show(figures: Mapping[str, Any]) -> None:
    """Print what `evaluate` returned: tables and paths on stdout, warnings on stderr."""
    print_results(figures, {name: Path(path) for name, path in figures["files"].items()})


def compare_runs(patterns: Sequence[str], *, output: Path) -> dict[str, Any]:
    """Compare evaluated runs: tables of mean and spread over seeds, beside the paper's figures.

    Args:
        patterns: run folders, or patterns such as `runs/**`.
        output: folder for comparison.{md,html,json} and one .csv and .tex per table, plots.

    Returns:
        runs (their paths), warnings, tables (as plain values) and files.

    Raises:
        RunError: no evaluated run.
    """
    done, waiting = find_runs(patterns)
    notes = [f"{folder} is not evaluated: left out. Run `mbcd evaluate --run {folder}`." for folder in waiting]
    if not done:
        raise RunError(notes[0], "Evaluate the runs first.")
    runs, repeats = distinct([load_run(folder) for folder in done])
    return write_comparison_files(runs, compare(runs), notes=[*notes, *repeats], output=output, title="Runs compared")


def write_comparison_files(
    runs: Sequence[Run],
    tables: Sequence[Table],
    *,
    notes: Sequence[str],
    output: Path,
    title: str,
    pictures: Mapping[str, Path] | None = None,
    sections: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write `tables` of `runs` in every form, with bars of the main ones; what `compare_runs` returns.

    Args:
        notes: warnings to show.
        pictures: more plots, caption -> file.
        sections: more of the page, heading -> HTML.
    """
    bars = {t.title: plots.plot_methods(t, output / f"{t.name}.png") for t in main_tables(runs)}
    bars |= pictures or {}
    report = output / "comparison.html"
    more = {**(sections or {}), "Provenance": runs_html(runs)}
    page = write_comparison(report, tables, title=title, files=bars, warnings=notes, sections=more)
    files = {"report": page} | {path.name: path for path in bars.values()}
    text = {"comparison.md": "\n".join(map(markdown, tables))}
    for table in tables:
        text |= {f"{table.name}.csv": comma_separated(table), f"{table.name}.tex": latex(table)}
    for name, content in text.items():
        files[name] = write_text(output / name, content)
    found = {
        "runs": [str(run.path) for run in runs],
        "warnings": list(notes),
        "tables": [as_values(table) for table in tables],
    }
    files["results"] = write_json(output / "comparison.json", found)
    return {**found, "files": {name: str(path) for name, path in files.items()}}


def show_comparison(found: Mapping[str, Any]) -> None:
    """Print what `compare_runs` returned."""
    files = {name: Path(path) for name, path in found["files"].items() if not name.endswith((".csv", ".tex", ".png"))}
    print_comparison([from_values(table) for table in found["tables"]], files, found["warnings"])


def _watch(batches: Iterable[Batch], label: str = "evaluating") -> Iterator[Batch]:
    with console.progress(f"{label}, batches") as ticker:
        for batch in batches:
            yield batch
            ticker.advance()


def _accuracy_plots(analysis: Analysis) -> None:
    names = list(analysis.dataset.label_names)
    for one in analysis.results:
        key, where = one.clip_set.name, analysis.name(one)
        fused = one.figures["fused"]
        analysis.files[f"confusion on {key}"] = plots.plot_confusion(
            fused["confusion"],
            names,
            analysis.plot(f"confusion-{key}.png"),
            title=f"{where}: {100 * fused['top1']:.1f} % right",
        )
        analysis.files[f"classes on {key}"] = plots.plot_per_class(
            {head: [c["accuracy"] for c in f["per_class"].values()] for head, f in one.figures.items()},
            names,
            analysis.plot(f"classes-{key}.png"),
            title=f"Accuracy per class on {where}",
        )


def _history(figures: dict[str, Any], analysis: Analysis, run: Path | None, checkpoint: Any) -> None:
    records = read_records(run / "metrics.jsonl") if run is not None else []
    history = accuracy_history(records or list(getattr(checkpoint, "history", [])))
    if history is None:
        return
    oracle = history.oracle(figures["headline"]["model"])
    if oracle is not None:
        figures["oracle"] = oracle
    if run is not None and (drawn := run / "plots" / "accuracy.png").is_file():  # by the training
        analysis.files["accuracy per epoch"] = drawn
