"""The results of one evaluation as tables: what is printed and what the report shows."""

from __future__ import annotations

import numpy as np

from mbcd_cli.evaluation.analyses.corruptions import MEAN, mean_records
from mbcd_cli.evaluation.report.results import Results
from mbcd_cli.evaluation.report.tables import Table


def percent(value: float | None) -> str:
    """A fraction in percent, "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    """A plain figure, "-" where there is none."""
    return "-" if value is None else f"{value:.3f}"


def accuracy_table(results: Results) -> Table:
    """A row per checkpoint, model and set of clips, the deployed model first."""
    headline, modalities = results.headline, results.modalities
    models = [(c, m) for c, by_model in results.models.items() for m in by_model]
    chosen = (headline.checkpoint, headline.model)
    rows, k = [], 1
    for checkpoint, model in sorted(models, key=lambda pair: pair != chosen):
        sets = results.models[checkpoint][model]
        for clip_set in ("target", "source"):
            if clip_set not in sets:
                continue
            heads = sets[clip_set]
            fused = heads["fused"]
            k = fused.k
            rows.append(
                [
                    f"{checkpoint} {model}{' *' if (checkpoint, model) == chosen else ''}",
                    results.clips_name(clip_set),
                    str(fused.clips),
                    percent(fused.top1),
                    *(percent(heads[m].top1) for m in modalities),
                    percent(fused.mean_class_accuracy),
                    percent(fused.macro_f1),
                    percent(fused.top_k),
                    number(fused.loss),
                ]
            )
    oracle = results.oracle
    if oracle:
        blank = ["-"] * (len(modalities) + 4)
        row = [f"oracle {oracle.model} (epoch {oracle.epoch})", results.clips_name("target"), "-"]
        rows.append([*row, percent(oracle.top1), *blank])
    columns = ["model", "tested on", "clips", "fused", *modalities, "mean class", "macro F1", f"top-{k}", "loss"]
    note = "* the deployed model."
    if oracle:
        note += " The oracle is selected on the target itself: not a fair figure."
    return Table("accuracy", f"Top-1 accuracy (%): {results.title}", columns, rows, note)


def domain_table(results: Results) -> Table | None:
    """The deployed model per source domain; None with fewer than two."""
    heads = results.deployed_sets.get("source")
    if not heads or len(heads["fused"].per_domain) < 2:
        return None
    names = ["fused", *results.modalities]
    rows = [
        [domain, str(figures.clips), *(percent(heads[head].per_domain[domain].accuracy) for head in names)]
        for domain, figures in heads["fused"].per_domain.items()
    ]
    return Table("domains", "In-domain, per source domain (%)", ["domain", "clips", *names], rows)


def class_table(results: Results) -> Table:
    """The deployed model per class, on the target where there is one."""
    clip_set, heads = next(iter(results.deployed_sets.items()))
    names = ["fused", *results.modalities]
    rows = [
        [label, str(figures.clips), *(percent(heads[head].per_class[label].accuracy) for head in names)]
        for label, figures in heads["fused"].per_class.items()
    ]
    title = f"Accuracy per class (%), {results.clips_name(clip_set)}"
    return Table("classes", title, ["class", "clips", *names], rows)


def missing_tables(results: Results) -> list[Table]:
    """Fused accuracy with each subset of modalities, and Shapley values."""
    missing = results.missing
    if not missing:
        return []
    sets = [name for name in ("target", "source") if name in missing]
    columns = [results.clips_name(name) for name in sets]
    subsets = [name for name in reversed(missing[sets[0]].top1) if name != "none"]
    rows = [[subset, *(percent(missing[s].top1[subset]) for s in sets)] for subset in subsets]
    shares = [[m, *(f"{100 * missing[s].shapley[m]:+.1f}" for s in sets)] for m in results.modalities]
    note = "Features of the missing modalities are zero before fusion."
    worth = "Points of fused accuracy above that with every feature zero; they add up."
    return [
        Table("missing", "Missing modalities: fused accuracy (%)", ["present", *columns], rows, note),
        Table("shapley", "Contribution of each modality (Shapley value)", ["modality", *columns], shares, worth),
    ]


def shift_table(results: Results) -> Table | None:
    """Accuracy under a Gaussian shift of one modality."""
    shift = results.shift
    if not shift:
        return None
    levels = list(dict.fromkeys(record.level for record in shift.records))
    by_shift = {(record.modality, record.level): record for record in shift.records}
    rows = []
    for modality in dict.fromkeys(record.modality for record in shift.records):
        at_levels = [by_shift[modality, level] for level in levels]
        rows.append([f"{modality}, fused head", *(percent(record.fused) for record in at_levels)])
        rows.append([f"{modality}, its own head", *(percent(record.unimodal) for record in at_levels)])
    note = "Standard deviation of the noise in units of the standard deviation of each clip's own input."
    columns = ["shifted", *(f"{level:g}" for level in levels)]
    title = f"Gaussian shift of one modality: accuracy (%), {results.clips_name(shift.clips)}"
    return Table("shift", title, columns, rows, note)


def corruption_table(results: Results) -> Table | None:
    """Fused accuracy per corruption and severity, and the mean over severities."""
    corrupted = results.corruptions
    if corrupted is None or not corrupted.records:
        return None
    records = [*corrupted.records, *mean_records(corrupted.records)]
    levels = sorted({record.level for record in records})
    rows = []
    for modality, kind in dict.fromkeys((r.modality, r.kind) for r in records):
        fused = {r.level: r.fused for r in records if (r.modality, r.kind) == (modality, kind)}
        name = f"mean of {corrupted.means[modality].kinds}" if kind == MEAN else kind
        mean = float(np.mean(list(fused.values())))
        rows.append([f"{modality}: {name}", *(percent(fused.get(level)) for level in levels), percent(mean)])
    clean = percent(results.headline.top1["fused"])
    notes = [f"Uncorrupted: {clean}. 100 less the last mean is the mean corruption error."]
    if corrupted.lacking:
        notes.append(f"Not prepared of {', '.join(corrupted.lacking)}.")
    columns = ["corrupted", *(f"severity {level:g}" for level in levels), "mean"]
    title = f"Corruptions: fused accuracy (%), {results.clips_name(corrupted.clips)}"
    return Table("corruptions", title, columns, rows, " ".join(notes))


def trust_table(results: Results) -> Table | None:
    """Calibration and misclassification detection of every head."""
    trust = results.trust
    if not trust:
        return None
    rows = [
        [
            f"{head}, {results.clips_name(clip_set)}",
            percent(figures.ece),
            percent(figures.scaled.ece),
            number(figures.brier),
            percent(figures.aurc),
            percent(figures.auroc),
            percent(figures.fpr95),
        ]
        for clip_set in ("target", "source")
        for head, figures in trust.sets.get(clip_set, {}).items()
    ]
    temperatures = ", ".join(f"{head} {t:.2f}" for head, t in trust.temperature.items())
    note = (
        f"Temperatures fitted on the source domains' held-out clips: {temperatures}."
        if trust.temperature_fitted
        else "No source clips to fit a temperature on."
    )
    perfect = [head for head, figures in trust.sets.get("source", {}).items() if figures.accuracy == 1]
    if perfect and trust.temperature_fitted:
        note += f" Of {', '.join(perfect)} every held-out clip is right: its temperature only makes it surer."
    columns = ["head", "ECE", "ECE scaled", "Brier", "AURC", "AUROC", "FPR95"]
    return Table("trust", "Trust: calibration and detection of own errors (%; Brier from 0 to 2)", columns, rows, note)


def ood_table(results: Results) -> Table | None:
    """Out-of-distribution detection per score."""
    foreign = results.ood
    if not foreign:
        return None
    rows = [
        [f"{score}, {results.clips_name(s)}", *map(percent, (figures.auroc, figures.aupr, figures.fpr95))]
        for s, scores in foreign.against.items()
        for score, figures in scores.items()
    ]
    title = f"Out-of-distribution detection against {foreign.dataset} ({foreign.clips} clips, %)"
    return Table("ood", title, ["score", "AUROC", "AUPR", "FPR95"], rows)


def hardest_table(results: Results) -> Table | None:
    """The clips whose class got the least probability."""
    hardest = results.hardest
    if not hardest or not hardest.rows:
        return None
    names = results.modalities
    rows = [
        [
            str(row["id"]),
            str(row["label"]),
            percent(row["label_probability"]),
            f"{row['predicted']} ({percent(row['probability'])})",
            *(f"{row[f'{m}_predicted']} ({percent(row[f'{m}_probability'])})" for m in names),
        ]
        for row in hardest.rows
    ]
    title = f"Hardest clips, {results.clips_name(hardest.clips)}: probability in %"
    return Table("hardest", title, ["clip", "class", "its probability", "fused", *names], rows)


def summary_tables(results: Results) -> list[Table]:
    """The tables that are printed."""
    tables = [accuracy_table(results), domain_table(results), *missing_tables(results)]
    tables += [shift_table(results), corruption_table(results), trust_table(results), ood_table(results)]
    return [table for table in tables if table is not None]
