"""The results of one evaluation as tables: what is printed and what the report shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mbcd_cli.evaluation.report.tables import Table

Results = Mapping[str, Any]


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, "-" where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain figure, "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def title(results: Results) -> str:
    """One line that says which run this is."""
    target = results["target_domain"]
    where = f"target {target}" if target else "in-domain"
    modalities = "+".join(results["modalities"])
    return f"{results['dataset']}, {modalities}, {results['method']}, {where}, seed {results['seed']}"


def clips_name(results: Results, clip_set: str) -> str:
    """`target (street)` or `source (studio, tilted)`."""
    domains = [results["target_domain"]] if clip_set == "target" else results["source_domains"]
    return f"{clip_set} ({', '.join(domains)})"


def deployed_sets(results: Results) -> dict[str, Any]:
    """The deployed model's figures: set of clips -> head -> figures, the target first."""
    headline = results["headline"]
    sets = results["models"][headline["checkpoint"]][headline["model"]]
    return {name: sets[name] for name in ("target", "source") if name in sets}


def accuracy_table(results: Results) -> Table:
    """A row per checkpoint, model and set of clips, the deployed model first."""
    headline, modalities = results["headline"], results["modalities"]
    models = [(c, m) for c, by_model in results["models"].items() for m in by_model]
    chosen = (headline["checkpoint"], headline["model"])
    rows, k = [], 1
    for checkpoint, model in sorted(models, key=lambda pair: pair != chosen):
        sets = results["models"][checkpoint][model]
        for clip_set in ("target", "source"):
            if clip_set not in sets:
                continue
            heads = sets[clip_set]
            fused = heads["fused"]
            k = fused["k"]
            rows.append(
                [
                    f"{checkpoint} {model}{' *' if (checkpoint, model) == chosen else ''}",
                    clips_name(results, clip_set),
                    str(fused["clips"]),
                    percent(fused["top1"]),
                    *(percent(heads[m]["top1"]) for m in modalities),
                    percent(fused["mean_class_accuracy"]),
                    percent(fused.get("macro_f1")),
                    percent(fused["top_k"]),
                    number(fused["loss"]),
                ]
            )
    oracle = results.get("oracle")
    if oracle:
        blank = ["-"] * (len(modalities) + 4)
        row = [f"oracle {oracle['model']} (epoch {oracle['epoch']})", clips_name(results, "target"), "-"]
        rows.append([*row, percent(oracle["top1"]), *blank])
    columns = ["model", "tested on", "clips", "fused", *modalities, "mean class", "macro F1", f"top-{k}", "loss"]
    note = "* the deployed model."
    if oracle:
        note += " The oracle is selected on the target itself: not a fair figure."
    return Table("accuracy", f"Top-1 accuracy (%): {title(results)}", columns, rows, note)


def domain_table(results: Results) -> Table | None:
    """The deployed model per source domain; None with fewer than two."""
    heads = deployed_sets(results).get("source")
    if not heads or len(heads["fused"]["per_domain"]) < 2:
        return None
    names = ["fused", *results["modalities"]]
    rows = [
        [domain, str(figures["clips"]), *(percent(heads[h]["per_domain"][domain]["accuracy"]) for h in names)]
        for domain, figures in heads["fused"]["per_domain"].items()
    ]
    return Table("domains", "In-domain, per source domain (%)", ["domain", "clips", *names], rows)


def class_table(results: Results) -> Table:
    """The deployed model per class, on the target where there is one."""
    clip_set, heads = next(iter(deployed_sets(results).items()))
    names = ["fused", *results["modalities"]]
    rows = [
        [label, str(figures["clips"]), *(percent(heads[h]["per_class"][label]["accuracy"]) for h in names)]
        for label, figures in heads["fused"]["per_class"].items()
    ]
    title = f"Accuracy per class (%), {clips_name(results, clip_set)}"
    return Table("classes", title, ["class", "clips", *names], rows)


def missing_tables(results: Results) -> list[Table]:
    """Fused accuracy with each subset of modalities, and Shapley values."""
    found = results.get("missing")
    if not found:
        return []
    sets = [name for name in ("target", "source") if name in found]
    columns = [clips_name(results, name) for name in sets]
    subsets = [name for name in reversed(found[sets[0]]["top1"]) if name != "none"]
    rows = [[subset, *(percent(found[s]["top1"][subset]) for s in sets)] for subset in subsets]
    shares = [[m, *(f"{100 * found[s]['shapley'][m]:+.1f}" for s in sets)] for m in results["modalities"]]
    note = "Features of the missing modalities are zero before fusion."
    worth = "Points of fused accuracy above that with every feature zero; they add up."
    return [
        Table("missing", "Missing modalities: fused accuracy (%)", ["present", *columns], rows, note),
        Table("shapley", "Contribution of each modality (Shapley value)", ["modality", *columns], shares, worth),
    ]


def shift_table(results: Results) -> Table | None:
    """Accuracy under a Gaussian shift of one modality."""
    found = results.get("shift")
    if not found:
        return None
    records = found["records"]
    levels = list(dict.fromkeys(r["level"] for r in records))
    at = {(r["modality"], r["level"]): r for r in records}
    rows = [
        [f"{modality}, {words}", *(percent(at[modality, level][head]) for level in levels)]
        for modality in dict.fromkeys(r["modality"] for r in records)
        for head, words in (("fused", "fused head"), ("unimodal", "its own head"))
    ]
    where = clips_name(results, found["clips"])
    note = "Standard deviation of the noise in units of the standard deviation of each clip's own input."
    columns = ["shifted", *(f"{level:g}" for level in levels)]
    return Table("shift", f"Gaussian shift of one modality: accuracy (%), {where}", columns, rows, note)


def corruption_table(results: Results) -> Table | None:
    """Fused accuracy per corruption and severity, and the mean over severities."""
    found = results.get("corruptions", {})
    records = found.get("records")
    if not records:
        return None
    levels = sorted({r["level"] for r in records})
    rows = []
    for modality, kind in dict.fromkeys((r["modality"], r["kind"]) for r in records):
        mine = {r["level"]: r["fused"] for r in records if (r["modality"], r["kind"]) == (modality, kind)}
        values = [mine[level] for level in levels]
        rows.append([f"{modality}: {kind}", *map(percent, values), percent(float(np.mean(values)))])
    notes = []
    if found.get("left_out"):
        notes.append(f"Not for {', '.join(found['left_out'])}: that cache holds features, not decoded media.")
    if found.get("without_sound"):
        names = ", ".join(found["without_sound"]["modalities"])
        notes.append(f"{names} as spectrograms, not as sound: {found['without_sound']['why']}.")
    note = " ".join(notes)
    columns = ["corrupted", *(f"severity {level:g}" for level in levels), "mean"]
    where = clips_name(results, found["clips"])
    return Table("corruptions", f"Corruptions: fused accuracy (%), {where}", columns, rows, note)


def trust_table(results: Results) -> Table | None:
    """Calibration and misclassification detection of every head."""
    found = results.get("trust")
    if not found:
        return None
    rows = []
    for clip_set in ("target", "source"):
        for head, f in found["sets"].get(clip_set, {}).items():
            rows.append(
                [
                    f"{head}, {clips_name(results, clip_set)}",
                    percent(f["ece"]),
                    percent(f["scaled"]["ece"]),
                    number(f["brier"]),
                    percent(f["aurc"]),
                    percent(f["auroc"]),
                    percent(f["fpr95"]),
                ]
            )
    temperatures = ", ".join(f"{head} {t:.2f}" for head, t in found["temperature"].items())
    note = (
        f"Temperatures fitted on the source domains' held-out clips: {temperatures}."
        if found["temperature_fitted"]
        else "No source clips to fit a temperature on."
    )
    perfect = [head for head, f in found["sets"].get("source", {}).items() if f["accuracy"] == 1]
    if perfect and found["temperature_fitted"]:
        note += f" Of {', '.join(perfect)} every held-out clip is right: its temperature only makes it surer."
    columns = ["head", "ECE", "ECE scaled", "Brier", "AURC", "AUROC", "FPR95"]
    return Table("trust", "Trust: calibration and detection of own errors (%)", columns, rows, note)


def ood_table(results: Results) -> Table | None:
    """Out-of-distribution detection per score."""
    found = results.get("ood")
    if not found:
        return None
    rows = [
        [f"{score}, {clips_name(results, s)}", *(percent(figures[key]) for key in ("auroc", "aupr", "fpr95"))]
        for s, scores in found["against"].items()
        for score, figures in scores.items()
    ]
    title = f"Out-of-distribution detection against {found['dataset']} ({found['clips']} clips, %)"
    return Table("ood", title, ["score", "AUROC", "AUPR", "FPR95"], rows)


def hardest_table(results: Results) -> Table | None:
    """The clips whose class got the least probability."""
    found = results.get("hardest")
    if not found or not found["rows"]:
        return None
    names = results["modalities"]
    rows = [
        [
            row["id"],
            row["label"],
            percent(row["label_probability"]),
            f"{row['predicted']} ({percent(row['probability'])})",
            *(f"{row[f'{m}_predicted']} ({percent(row[f'{m}_probability'])})" for m in names),
        ]
        for row in found["rows"]
    ]
    title = f"Hardest clips, {clips_name(results, found['clips'])}: probability in %"
    return Table("hardest", title, ["clip", "class", "its probability", "fused", *names], rows)


def summary_tables(results: Results) -> list[Table]:
    """The tables that are printed."""
    tables = [accuracy_table(results), domain_table(results), *missing_tables(results)]
    tables += [shift_table(results), corruption_table(results), trust_table(results), ood_table(results)]
    return [table for table in tables if table is not None]
