"""Evaluated runs: found, read, told apart by what their weights depend on, and grouped."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from mbcd_cli import checksums
from mbcd_cli.errors import FOREIGN, RunError
from mbcd_cli.evaluation.report.results import RESULTS_FORMAT, pretraining_words, read_results
from mbcd_cli.paper.rows import order_methods
from mbcd_cli.runs.names import run_checkpoints, runs_at
from mbcd_cli.scoring.clip_sets import TARGET

_VARIED = ("training.seed", "training.target_domain", "training.source_domains", "dataset.seal_target")
"""Settings in which the runs of one method and table may differ; sealed ones have tables of their own."""
_TESTED = "dataset.target_split"
"""The setting in which no two runs of one table may differ: it says which clips they are tested on."""

ZERO_SHOT = "zero-shot"
"""Stands for the model in results of what nothing was trained for."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluated run.

    Attributes:
        target: unseen domain, or None (trained and tested in-domain).
        sources: domains seen in training.
        domains: all domains of the run, sources and target.
        heads: head -> top-1 (%) on the target, or in-domain without one; empty while the target is sealed.
        in_domain: fused top-1 (%) on the sources' test split, None when not measured.
        provenance: versions, weights and caches behind the figures: what -> value.
        settings: what the weights depend on, dotted name -> value, the cache of every modality, and the checkpoint.
        zero_shot: nothing was trained on the sources.
    """

    path: Path
    dataset: str
    modalities: tuple[str, ...]
    method: str
    target: str | None
    sources: tuple[str, ...]
    seed: int
    heads: Mapping[str, float]
    in_domain: float | None
    provenance: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    zero_shot: bool = False

    @property
    def pretraining(self) -> str:
        """The data that its encoders' weights were trained on, as far as known."""
        return pretraining_words(self.modalities, self.provenance)

    @property
    def sealed(self) -> bool:
        """Whether its target was not looked at yet."""
        return not self.heads

    @property
    def setting(self) -> str:
        """multi-source, single-source or in-domain."""
        if self.target is None:
            return "in-domain"
        return "single-source" if len(self.sources) == 1 else "multi-source"

    @property
    def column(self) -> str:
        """Where it belongs in a table: the target, or `source -> target`."""
        if self.target is None:
            return "+".join(self.sources)
        return f"{self.sources[0]} to {self.target}" if self.setting == "single-source" else self.target


def find_runs(patterns: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Run folders under the patterns (`runs/**` and the like; or folders, as `runs_at` takes them): those with
    results.json, and those without.

    Raises:
        RunError: no run at all.
    """
    patterns = list(patterns)
    folders = {Path(name) for pattern in patterns for name in glob(pattern, recursive=True)}  # noqa: PTH207
    named = [folder for folder in folders & set(map(Path, patterns)) if folder.is_dir()]
    folders |= {run for one in named if not (one / "results.json").is_file() for run in runs_at(one)}
    folders = [f.parent if f.name in ("results.json", "settings.toml") else f for f in folders]
    # What was made of another checkpoint lies inside a run, and is none.
    folders = sorted(f for f in set(folders) if not any((above / "settings.toml").is_file() for above in f.parents))
    done = [f for f in folders if (f / "results.json").is_file()]
    waiting = [f for f in folders if f not in done and (f / "settings.toml").is_file()]
    if not done and not waiting:
        raise RunError(
            f"There is no run at {', '.join(patterns)}.", "Name a folder of runs, or quote a pattern: --runs 'runs/**'."
        )
    return done, waiting


def load_run(folder: Path) -> Run:
    """The run whose results.json lies in `folder`.

    Raises:
        RunError: it cannot be read, or comes from another version.
    """
    results = read_results(folder / "results.json")
    try:
        if results["format"] != RESULTS_FORMAT:
            raise RunError(
                f"{folder / 'results.json'} has format {results['format']}, this mbcd reads {RESULTS_FORMAT}.",
                "Evaluate that run again.",
            )
        _check_current(folder, results["headline"]["checkpoint"], results.get("checkpoints", {}))
        return run_of_results(folder, results)
    except FOREIGN as error:
        raise RunError(
            f"{folder / 'results.json'} is no evaluation of ours ({type(error).__name__}: {error}).",
            "Evaluate that run again.",
        ) from error


def run_of_results(folder: Path, results: Mapping[str, Any]) -> Run:
    """The run in `folder`, by what its results.json holds.

    Raises:
        one of FOREIGN: it is no evaluation of ours.
    """
    headline, names = results["headline"], _texts(results["modalities"])
    sealed = results["target_domain"] is not None and headline["clips"] != TARGET
    in_domain = results["models"][headline["checkpoint"]][headline["model"]].get("source")
    return Run(
        path=folder,
        dataset=str(results["dataset"]),
        modalities=names,
        method=str(results["method"]),
        target=None if results["target_domain"] is None else str(results["target_domain"]),
        sources=_texts(results["source_domains"]),
        seed=int(results["seed"]),
        heads={} if sealed else {head: 100 * float(headline["top1"][head]) for head in ("fused", *names)},
        in_domain=None if in_domain is None else 100 * float(in_domain["fused"]["top1"]),
        provenance=_named_texts(results.get("provenance", {})) | {"checkpoint": headline["checkpoint"]},
        settings=_named_texts(
            {
                **results["settings"],
                **{f"{m} cache": fingerprint for m, fingerprint in results["fingerprints"].items()},
                "checkpoint": headline["checkpoint"],
            }
        ),
        zero_shot=headline["model"] == ZERO_SHOT,
    )


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a list of names is none")
    return tuple(values)


def _named_texts(values: Mapping[str, object]) -> dict[str, str]:
    _texts(list(values.values()))
    return dict(values)


def _check_current(folder: Path, told: str, sums: Mapping[str, str]) -> None:
    """Refuse results of other weights than the run has now.

    Args:
        told: the checkpoint that they call deployed. sums: checksum of every checkpoint then.

    Raises:
        RunError: they are such; or the run's checkpoint is damaged.
    """
    try:
        files = run_checkpoints(folder)
    except RunError:
        return  # results that were copied, or written elsewhere, without the run
    try:
        now = checksums.checksum(files[told]) if told in files else None
    except (OSError, checksums.DamagedError) as error:
        raise RunError(f"{files[told]} cannot be read: {error}.", "`mbcd verify` says what is damaged.") from error
    if now is None or sums.get(told) != now:
        raise RunError(
            f"{folder / 'results.json'} is of other weights than the run's {told} ones now.",
            f"Run `mbcd evaluate --run {shlex.quote(str(folder))}` again.",
        )


def told_apart(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """`runs`, those that are no seeds of one another under names of their own; and a line per method that has several.

    Runs of one method differ where their settings, caches or checkpoints do, runs of one table where they were trained
    without a source of others, or tested on another split. What differs stands in the method's name.
    """
    out: list[Run] = []
    notes = []
    for (dataset, modalities, setting), table in grouped(runs, lambda r: (r.dataset, r.modalities, r.setting)):
        beside = [run for run in runs if (run.dataset, run.setting) == (dataset, setting)]
        if not any(run.zero_shot for run in beside):  # those stand below methods of more modalities too
            beside = table
        splits = {run.settings.get(_TESTED) for run in beside}
        for method, group in grouped(table, lambda r: r.method):
            keys = dict.fromkeys(key for run in group for key in run.settings if key not in (*_VARIED, _TESTED))
            differ = [key for key in keys if len({run.settings.get(key) for run in group}) > 1]
            short = _short(differ + [_TESTED] * (len(splits) > 1))
            names = {}
            alike = [run for run in table if run.zero_shot == group[0].zero_shot]
            domains = dict.fromkeys(name for run in alike for name in (*run.sources, run.target) if name is not None)
            for run in group:
                words = [f"{name} {run.settings.get(key, 'unset')}" for key, name in short.items()]
                if setting == "multi-source":
                    words += [f"without {name}" for name in domains if name not in (*run.sources, run.target)]
                names[run.path] = f"{method} ({', '.join(words)})" if words else method
            out += [replace(run, method=names[run.path]) for run in group]
            if (count := len(set(names.values()))) > 1:
                why = ", ".join(short.values()) or "sources"
                remedy = "" if group[0].zero_shot else " Those of a search stand together with `mbcd sweep --collect`."
                notes.append(
                    f"{dataset}, {'+'.join(modalities)}, {setting}: {len(group)} runs of {method} are of {count} kinds "
                    f"that are not averaged ({why}).{remedy}"
                )
    return sorted(out, key=lambda run: run.path), notes


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Dotted names -> their last part; more of them where two would be one."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: name if last[name := key.rpartition(".")[2]] == 1 else key for key in keys}


def distinct(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """`runs` without those that repeat another's dataset, modalities, method, domains and seed; and warnings."""
    seen: dict[tuple, Run] = {}
    warnings = []
    for run in runs:
        key = (run.dataset, run.modalities, run.method, run.target, tuple(sorted(run.sources)), run.seed, run.sealed)
        if key in seen:
            warnings.append(f"{run.path} repeats {seen[key].path} (same method, domains and seed): left out.")
        else:
            seen[key] = run
    return list(seen.values()), warnings


def by_method(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The runs of each method, in the order of tables."""
    of_method: dict[str, list[Run]] = {}
    for run in runs:
        of_method.setdefault(run.method, []).append(run)
    return [(method, of_method[method]) for method in order_methods(of_method)]


def grouped(runs: Sequence[Run], key: Callable[[Run], Key]) -> list[tuple[Key, list[Run]]]:
    """The runs of each key, in its order."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return sorted(groups.items())
