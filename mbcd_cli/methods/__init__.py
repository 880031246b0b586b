"""The registry of methods: one line each, classes imported when they are used.

A variant is a method with settings laid over its class's defaults: an ablation is never a class of its own.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.errors import MbcdError, SettingsError
from mbcd_cli.plugins import load_plugin, plugins
from mbcd_cli.settings import MethodSettings

if TYPE_CHECKING:
    from mbcd_cli.methods.base import Method

GROUP = "mbcd.methods"
DEFAULT = "mbcd"


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One method of the registry.

    Attributes:
        where: `module:Class` in this package.
        summary: what it is, in a line.
        settings: what is laid over the class's defaults, as in the tree's group `method`.
        average: kind of its weight average, where it is not the class's.
    """

    where: str
    summary: str
    settings: Mapping[str, object] = field(default_factory=dict)
    average: str | None = None


_NO_AMD = {"dropout": {"strategy": "none"}}
_NO_GCC = {"consistency": {"order": "off"}}
_NO_DL = {"distillation": {"enabled": False}}
_JAT_BENCHMARK = {
    "unimodal_weight": 3.0,
    "weights_sum": "one",
    "single_source": "class",
    "dropout": 0.0,
    "feature_noise": {"enabled": False},
    "fused_hidden": 512,
}
METHODS: dict[str, MethodEntry] = {
    "erm": MethodEntry("base:Method", "joint training of the fused head; uni-modal heads only probe"),
    "ema": MethodEntry("base:Method", "ERM whose deployed model is the average of its weights", average="ema"),
    "mbcd": MethodEntry("mbcd:MBCD", "modality-balanced collaborative distillation (AAAI 2026)"),
    # The paper's ablation: MBCD with only one of its three parts beside the weight average.
    "ema+amd": MethodEntry("mbcd:MBCD", "MBCD with adaptive modality dropout only", _NO_GCC | _NO_DL),
    "ema+gcc": MethodEntry("mbcd:MBCD", "MBCD with gradient consistency only", _NO_AMD | _NO_DL),
    "ema+dl": MethodEntry("mbcd:MBCD", "MBCD with distillation only", _NO_AMD | _NO_GCC),
    # The paper's comparison of dropout strategies.
    "mbcd-no-dropout": MethodEntry("mbcd:MBCD", "MBCD without modality dropout", _NO_AMD),
    "mbcd-fixed-dropout": MethodEntry("mbcd:MBCD", "MBCD with a fixed drop rate", {"dropout": {"strategy": "fixed"}}),
    # Beyond the paper: s_k from the true class's probability.
    "mbcd-true-class": MethodEntry(
        "mbcd:MBCD", "MBCD whose s_k sums the true class's probability", {"dropout": {"score": "true_class"}}
    ),
    # From domain generalization with one modality, on fused and per-modality features (docs/methods.md).
    "mixup": MethodEntry("mixup:Mixup", "convex combinations of clips and labels (ICLR 2018)"),
    "mixup-domains": MethodEntry("mixup:Mixup", "Mixup of clips of different source domains", {"partner": "domain"}),
    "coral": MethodEntry("coral:CORAL", "means and covariances of source domains aligned (ECCV Workshops 2016)"),
    "mmd": MethodEntry("mmd:MMD", "mean embeddings of source domains aligned (CVPR 2018)"),
    "dann": MethodEntry("dann:DANN", "features that a domain discriminator cannot tell apart (JMLR 2016)"),
    "sam": MethodEntry("sam:SAM", "gradients from the worst point nearby, for flat minima (ICLR 2021)"),
    "miro": MethodEntry("miro:MIRO", "pooled features that still tell the pretrained ones (ECCV 2022)"),
    "swad": MethodEntry(
        "base:Method", "ERM averaged densely over the valley of its validation loss (NeurIPS 2021)", average="swad"
    ),
    # Its rivals (docs/methods.md).
    "rna-net": MethodEntry("rna:RNANet", "relative norm alignment (WACV 2022)"),
    "ogm-ge": MethodEntry("ogm:OGMGE", "gradients of the dominant encoder scaled down, and noised (CVPR 2022)"),
    "ogm": MethodEntry("ogm:OGMGE", "OGM-GE without its noise", {"noise": False}),
    "opm": MethodEntry("opm:OPM", "dropout of the dominant modality at the rate of its dominance (T-PAMI 2024)"),
    "mer-dg": MethodEntry("mer_dg:MERDG", "an entropy term that keeps each encoder's features apart (ICML 2026)"),
    "agm": MethodEntry("agm:AGM", "gradients of Shapley parts scaled by their pace (ICCV 2023)"),
    "mmpareto": MethodEntry("mmpareto:MMPareto", "fused and uni-modal gradients at their Pareto point (ICML 2024)"),
    "simmmdg": MethodEntry("simmmdg:SimMMDG", "contrast of shared halves, translation, halves apart (NeurIPS 2023)"),
    "moosa": MethodEntry("moosa:MOOSA", "SimMMDG with entropy-weighted heads, masks and a jigsaw (ECCV 2024)"),
    "cmrf": MethodEntry("cmrf:CMRF", "cross-modal representation flattening by a simple weight average (NeurIPS 2024)"),
    "gmp": MethodEntry("gmp:GMP", "class and domain gradients modulated and projected per modality (AAAI 2026)"),
    "jat": MethodEntry("jat:JAT", "three adversaries, uni-modal losses weighted by domain confusion (ACM MM 2025)"),
    "jat-benchmark": MethodEntry("jat:JAT", "JAT as the public benchmark trains it", _JAT_BENCHMARK, average="none"),
    "nel": MethodEntry("nel:NEL", "two views agree after mean shifts, fused spectrum flat (Neurocomputing 2025)"),
}


def method_names() -> list[str]:
    """Names of all methods: ours, then those of installed packages."""
    return [*METHODS, *(name for name in plugins(GROUP) if name not in METHODS)]


def short_name(name: str) -> str:
    """How a method is called in tables and run folders: a class in a file by its own name."""
    return name.rpartition(":")[2]


@cache
def method_class(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: of the registry, of an installed package's entry point, or `path/to/file.py:Class`.

    Raises:
        SettingsError: there is none, it cannot be imported, or it lacks a part (which is named).
    """
    if name in METHODS:
        module, _, attribute = METHODS[name].where.partition(":")
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    installed = plugins(GROUP)
    if name in installed:
        return checked(load_plugin(installed[name]), name)
    if ".py:" in name:
        return checked(_from_file(name), name)
    close = difflib.get_close_matches(name, method_names(), n=1)
    raise SettingsError(
        f"There is no method {name!r}.",
        (f"Did you mean {close[0]}? " if close else "")
        + "`mbcd list methods` shows them; a class of your own is named my_method.py:MyMethod.",
    )


def same_class(one: str, other: str) -> bool:
    """Whether two methods are one class with other settings; classes are not imported for that."""
    places = [METHODS[name].where if name in METHODS else name for name in (one, other)]
    return places[0] == places[1]


def _from_file(name: str) -> object:
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise SettingsError(f"There is no file {path} with a method.", "Write path/to/file.py:ClassName.")
    spec = importlib.util.spec_from_file_location(f"mbcd_method_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file raises
        raise SettingsError(f"{path} cannot be imported: {type(error).__name__}: {error}", "Mend the file.") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise SettingsError(f"{path} has no class {attribute!r}.", "Write path/to/file.py:ClassName.")
    return found


def checked(found: object, name: str) -> type[Method]:
    """`found`, if it is a whole method.

    Raises:
        SettingsError: it is no `Method`, or one of its parts is missing or of the wrong kind.
    """
    from mbcd_cli.methods.base import Method

    problem = None
    if not (isinstance(found, type) and issubclass(found, Method)):
        problem = "it is no subclass of mbcd_cli.methods.base.Method"
    elif not (isinstance(found.Settings, type) and issubclass(found.Settings, MethodSettings)):
        problem = "its Settings are no subclass of mbcd_cli.settings.MethodSettings"
    elif found.average not in ("none", "ema", "sma", "swad"):
        problem = f"its average is {found.average!r}, not none, ema, sma or swad"
    elif found.views not in (1, 2):
        problem = f"its views are {found.views!r}, not 1 or 2"
    else:
        bare = [f for f, info in found.Settings.model_fields.items() if info.is_required()]
        if bare:
            problem = f"its setting {bare[0]} has no default"
    if problem is not None:
        raise SettingsError(f"Method {name!r} is not whole: {problem}.", "docs/extending.md shows what a method has.")
    return found


def over_defaults(name: str) -> dict[str, dict[str, object]]:
    """What choosing the method sets, as groups of the tree: its name, a variant's settings, its average's kind."""
    entry = METHODS.get(name)
    kind = method_class(name)
    average: dict[str, object] = {"kind": (entry.average if entry else None) or kind.average}
    if kind.average_start:
        average["start"] = kind.average_start
    return {"method": {**(entry.settings if entry else {}), "name": name}, "average": average}


def method_summaries() -> list[tuple[str, str]]:
    """(name, one line) of every method; a plug-in that cannot be imported says why."""
    lines = [(name, entry.summary) for name, entry in METHODS.items()]
    for name in method_names()[len(lines) :]:
        try:
            lines.append((name, (method_class(name).__doc__ or "").strip().partition("\n")[0]))
        except MbcdError as error:
            lines.append((name, f"error: {error.message}"))
    return lines
