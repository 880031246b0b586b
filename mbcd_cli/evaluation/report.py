"""The results of an evaluation as tables for a person, on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbcd_cli import console


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, "-" where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain figure, "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def title(results: Mapping[str, Any]) -> str:
    """One line that says which run this is."""
    target = results["target_domain"]
    where = f"target {target}" if target else "in-domain"
    modalities = "+".join(results["modalities"])
    return f"{results['dataset']}, {modalities}, {results['method']}, {where}, seed {results['seed']}"


def clips_name(results: Mapping[str, Any], clip_set: str) -> str:
    """`target (street)` or `source (studio, tilted)`."""
    domains = [results["target_domain"]] if clip_set == "target" else results["source_domains"]
    return f"{clip_set} ({', '.join(domains)})"


def accuracy_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The accuracy table: columns, and a row per checkpoint, model and set of clips, the deployed first."""
    headline = results["headline"]
    modalities = results["modalities"]
    rows = []
    for checkpoint, models in results["models"].items():
        for model, sets in models.items():
            for clip_set, heads in sets.items():
                fused = heads["fused"]
                is_deployed = (checkpoint, model) == (headline["checkpoint"], headline["model"])
                name = f"{checkpoint} {model}{' *' if is_deployed else ''}"
                rows.append(
                    (
                        (not is_deployed, clip_set != "target"),
                        [
                            name,
                            clips_name(results, clip_set),
                            str(fused["clips"]),
                            percent(fused["top1"]),
                            *(percent(heads[m]["top1"]) for m in modalities),
                            percent(fused["mean_class_accuracy"]),
                            percent(fused["top_k"]),
                            number(fused["loss"]),
                        ],
                    )
                )
    k = next(iter(next(iter(next(iter(results["models"].values())).values())).values()))["fused"]["k"]
    columns = ["model", "tested on", "clips", "fused", *modalities, "mean class", f"top-{k}", "loss"]
    return columns, [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def domain_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the deployed model's in-domain accuracy per source domain (empty with fewer than two)."""
    headline = results["headline"]
    heads = results["models"][headline["checkpoint"]][headline["model"]].get("source")
    if not heads or len(heads["fused"]["per_domain"]) < 2:
        return []
    return [
        [
            domain,
            str(figures["clips"]),
            *(percent(heads[h]["per_domain"][domain]["accuracy"]) for h in ("fused", *results["modalities"])),
        ]
        for domain, figures in heads["fused"]["per_domain"].items()
    ]


def print_results(results: Mapping[str, Any], files: Mapping[str, Path] | None = None) -> None:
    """Print the tables of `results` and the paths of `files` on stdout, warnings on stderr."""
    columns, rows = accuracy_rows(results)
    console.table(f"Top-1 accuracy (%): {title(results)}", columns, rows)
    console.out.print("* the deployed model", markup=False)
    per_domain = domain_rows(results)
    if per_domain:
        console.table(
            "In-domain, per source domain (%)",
            ["domain", "clips", "fused", *results["modalities"]],
            per_domain,
        )
    for warning in results.get("warnings", ()):
        console.warn(warning)
    for name, path in (files or {}).items():
        console.out.print(f"{name}: {path}", markup=False)
