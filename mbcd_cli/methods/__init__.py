"""The registry of methods: one line each, classes imported when they are used.

A variant is a method with settings laid over its class's defaults: an ablation is never a class of its own.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.errors import MbcdError, SettingsError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.plugins import FILE_MODULE, importing, load_plugin, plugins
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
        summary: what it adds to ERM (a variant: to its method), in a line.
        paper: where it was published, and `year`; "" and None for what is nobody's paper.
        settings: what is laid over the class's defaults, as in the tree's group `method`.
        model: what is laid over the tree's group `model`.
        average: kind of its weight average, where it is not the class's.
        published: its authors' own chassis, as `Method.published` says; None where none is known.
    """

    where: str
    summary: str
    paper: str = ""
    year: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)
    average: str | None = None
    published: Mapping[str, object] | None = None


_NO_AMD = {"dropout": {"strategy": "none"}}
_NO_GCC = {"consistency": {"order": "off"}}
_NO_DL = {"distillation": {"enabled": False}}
_PROBE = {"tails": "frozen", "unimodal_head": "linear", "fused_head": "linear"}
_JAT_BENCHMARK = {
    "unimodal_weight": 3.0,
    "weights_sum": "one",
    "single_source": "class",
    "dropout": 0.0,
    "feature_noise": {"enabled": False},
    "fused_hidden": 512,
}

# Chassis of the field: what of each one's setup is a setting here. docs/methods.md says what is not.
_ADAM = {
    "optimizer.name": "adam",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 1e-4,
    "optimizer.momentum": 0.9,
    "optimizer.schedule": "constant",
    "training.epochs": 20,
    "training.batch_size": 16,
    "training.batch_norm": "tracked",
    "evaluation.checkpoints": ("best", "last"),
}
_SGD = _ADAM | {"optimizer.name": "sgd", "optimizer.lr": 1e-3, "training.batch_size": 64}
_HEADS = {"model.fused_head": "mlp", "model.hidden": 512, "model.dropout": 0.5}
_BARE = _HEADS | {  # features as the video and flow encoders' own heads leave them
    "model.norm": "none",
    "model.feature_dropout": 0.5,
    "model.feature_dropout_on": ("video", "flow"),
    "model.unimodal_head": "linear",
}
_NORMED = _HEADS | {"model.norm": "layer", "model.feature_dropout": 0.0, "model.unimodal_head": "mlp"}
_PLAIN = {
    "model.fused_head": "linear",
    "model.norm": "none",
    "model.feature_dropout": 0.0,
    "model.unimodal_head": "linear",
}
_LAST = {"optimizer.weight_decay": 0.0, "training.epochs": 15, "evaluation.checkpoints": ("last",)}
_BENCHMARK = _BARE | _ADAM
_MBCD = _NORMED | _ADAM | {"average.kind": "ema", "average.beta": 0.999, "average.start": 0}
_OGM = (
    _PLAIN
    | _SGD
    | {
        "optimizer.schedule": "step",
        "optimizer.drops": (70,),
        "training.epochs": 100,
    }
)

_VARIANT = {"paper": "AAAI", "year": 2026, "published": _MBCD}
METHODS: dict[str, MethodEntry] = {
    "erm": MethodEntry("base:Method", "fused head alone; uni-modal heads probe", published=_BENCHMARK),
    "probe": MethodEntry("base:Method", "linear heads on frozen features", model=_PROBE),
    "ema": MethodEntry("base:Method", "exponential weight average", average="ema", published=_MBCD),
    "mbcd": MethodEntry("mbcd:MBCD", "balance, gradient consistency, distillation", **_VARIANT),
    # The paper's ablation: MBCD with only one of its three parts beside the weight average.
    "ema+amd": MethodEntry("mbcd:MBCD", "MBCD: adaptive modality dropout only", settings=_NO_GCC | _NO_DL, **_VARIANT),
    "ema+gcc": MethodEntry("mbcd:MBCD", "MBCD: gradient consistency only", settings=_NO_AMD | _NO_DL, **_VARIANT),
    "ema+dl": MethodEntry("mbcd:MBCD", "MBCD: distillation only", settings=_NO_AMD | _NO_GCC, **_VARIANT),
    # The paper's comparison of dropout strategies.
    "mbcd-no-dropout": MethodEntry("mbcd:MBCD", "MBCD without modality dropout", settings=_NO_AMD, **_VARIANT),
    "mbcd-fixed-dropout": MethodEntry(
        "mbcd:MBCD", "MBCD with a fixed drop rate", settings={"dropout": {"strategy": "fixed"}}, **_VARIANT
    ),
    # Beyond the paper: s_k from the true class's probability.
    "mbcd-true-class": MethodEntry(
        "mbcd:MBCD", "MBCD: s_k from the true class", settings={"dropout": {"score": "true_class"}}
    ),
    # Ours: an unreliable modality is not forced.
    "mbcd-reliable": MethodEntry(
        "mbcd:MBCD", "MBCD that forces no broken branch", settings={"reliability": {"by": "left_out"}}
    ),
    "mbcd-arl": MethodEntry("mbcd:MBCD", "the same by ARL's coefficients", settings={"reliability": {"by": "arl"}}),
    "mbcd-agreement": MethodEntry(
        "mbcd:MBCD", "MBCD: dropout where the rest is right", settings={"dropout": {"agreement": True}}
    ),
    "mbcd-conflict": MethodEntry(
        "mbcd:MBCD", "MBCD: the surer head wins conflicts", settings={"conflict": {"weight": 1.0}}
    ),
    "mbcd-reliable-conflict": MethodEntry(
        "mbcd:MBCD",
        "both, by the heads' own loss",
        settings={"reliability": {"by": "validation"}, "conflict": {"weight": 1.0}},
    ),
    # From domain generalization with one modality, on fused and per-modality features (docs/methods.md).
    "mixup": MethodEntry("mixup:Mixup", "mixtures of clips and of labels", "ICLR", 2018),
    "mixup-domains": MethodEntry(
        "mixup:Mixup", "Mixup across source domains", "ICLR", 2018, settings={"partner": "domain"}
    ),
    "coral": MethodEntry("coral:CORAL", "covariances of sources aligned", "ECCV-W", 2016),
    "mmd": MethodEntry("mmd:MMD", "kernel means of sources aligned", "CVPR", 2018),
    "dann": MethodEntry("dann:DANN", "a domain discriminator to be fooled", "JMLR", 2016),
    "sam": MethodEntry("sam:SAM", "gradients from the worst point nearby", "ICLR", 2021),
    "miro": MethodEntry("miro:MIRO", "features that tell the pretrained ones", "ECCV", 2022),
    "swad": MethodEntry("base:Method", "weights averaged over a valley of the loss", "NeurIPS", 2021, average="swad"),
    # Its rivals (docs/methods.md).
    "rna-net": MethodEntry("rna:RNANet", "feature norms aligned", "WACV", 2022, published=_BENCHMARK),
    "ogm-ge": MethodEntry("ogm:OGMGE", "dominant encoder's gradient damped, noised", "CVPR", 2022, published=_OGM),
    "ogm": MethodEntry("ogm:OGMGE", "OGM-GE without noise", "CVPR", 2022, settings={"noise": False}, published=_OGM),
    "opm": MethodEntry(
        "opm:OPM",
        "dominant modality dropped by clip",
        "T-PAMI",
        2024,
        published=_PLAIN
        | _ADAM
        | {
            "optimizer.name": "adamw",
            "optimizer.lr": 5e-5,
            "optimizer.weight_decay": 0.01,
            "training.epochs": 100,
            "training.batch_size": 32,
        },
    ),
    "mer-dg": MethodEntry(
        "mer_dg:MERDG",
        "entropy of each encoder's features",
        "ICML",
        2026,
        published=_BENCHMARK | {"method.on": "feature", "training.epochs": 25, "training.batch_size": 48},
    ),
    "arl": MethodEntry("arl:ARL", "encoders paced by use and reliability", "ICCV", 2025, published=_OGM),
    "pmr": MethodEntry("pmr:PMR", "slower modalities pulled to class prototypes", "CVPR", 2023),
    "d-and-r": MethodEntry(
        "relearning:DiagnosingRelearning",
        "encoders pulled back by their purity gap",
        "ECCV",
        2024,
        published=_PLAIN | _SGD | {"optimizer.lr": 2e-3, "training.epochs": 90, "method.after": (20, 40, 60)},
    ),
    "g-blending": MethodEntry("blending:GradientBlending", "losses weighted by how branches generalise", "CVPR", 2020),
    "cggm": MethodEntry("cggm:CGGM", "encoders paced by their heads' improvement", "NeurIPS", 2024),
    "admmdg": MethodEntry("admmdg:ADMMDG", "contrasts with adversarial pairs, PCGrad", published=_MBCD),
    "agm": MethodEntry("agm:AGM", "gradients of Shapley parts paced", "ICCV", 2023),
    "mmpareto": MethodEntry(
        "mmpareto:MMPareto",
        "fused and uni-modal gradients' Pareto point",
        "ICML",
        2024,
        published=_PLAIN
        | _SGD
        | {"optimizer.lr": 2e-3, "optimizer.schedule": "step", "optimizer.drops": (30,), "training.epochs": 50},
    ),
    "simmmdg": MethodEntry(
        "simmmdg:SimMMDG", "shared halves contrasted, translated", "NeurIPS", 2023, published=_BENCHMARK
    ),
    "moosa": MethodEntry("moosa:MOOSA", "SimMMDG, entropy weights, masks, jigsaw", "ECCV", 2024, published=_BENCHMARK),
    "cmrf": MethodEntry(
        "cmrf:CMRF",
        "representations flattened by a weight average",
        "NeurIPS",
        2024,
        published=_BENCHMARK
        | {"training.epochs": 15, "average.kind": "sma", "average.start": {"epic-kitchens": 400, "default": 100}},
    ),
    "cmrf-benchmark": MethodEntry(
        "cmrf:CMRF",
        "CMRF as the public benchmark trains it",
        "NeurIPS",
        2024,
        settings={"simmmdg": 1.0, "random_projections": ("video", "flow")},
        published=_BENCHMARK | {"training.epochs": 20, "average.kind": "sma", "average.start": 400},
    ),
    "gmp": MethodEntry(
        "gmp:GMP",
        "class and domain gradients projected",
        "AAAI",
        2026,
        published=_BENCHMARK | {"model.hidden": 256, "method.hidden": 256, "optimizer.weight_decay": 0.0},
    ),
    "gmp-benchmark": MethodEntry(
        "gmp:GMP",
        "GMP of uni-modal losses (public benchmark)",
        "AAAI",
        2026,
        settings={"of": "unimodal", "unimodal": "joint", "unimodal_weight": 3.0},
        published=_BENCHMARK | _LAST,
    ),
    "jat": MethodEntry("jat:JAT", "three adversaries, weights by confusion", "ACM MM", 2025, published=_MBCD),
    "jat-benchmark": MethodEntry(
        "jat:JAT",
        "JAT as the public benchmark trains it",
        "ACM MM",
        2025,
        settings=_JAT_BENCHMARK,
        average="none",
        published=_BENCHMARK | _LAST | {"average.kind": "none"},
    ),
    "nel": MethodEntry(
        "nel:NEL",
        "views agree, fused spectrum stays flat",
        "Neurocomp.",
        2025,
        published=_BENCHMARK | {"training.epochs": 15, "optimizer.schedule": "cosine", "optimizer.least_lr": 1e-6},
    ),
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
    raise SettingsError(
        f"There is no method {name!r}.",
        f"{did_you_mean(name, method_names())}`mbcd list methods` shows them; a class of your own is named "
        "my_method.py:MyMethod.",
    )


def code_digest(name: str) -> str:
    """SHA-256 of the code of a method's own file but for comments and layout; empty where it comes from none."""
    if name in METHODS or name in plugins(GROUP) or ".py:" not in name:
        return ""
    return _code_digest(Path(name.rpartition(":")[0]).read_bytes())


@cache
def _code_digest(source: bytes) -> str:
    return hashlib.sha256(ast.unparse(ast.parse(source)).encode()).hexdigest()


def same_class(name: str, other: str) -> bool:
    """Whether two methods are one class with other settings; classes are not imported for that."""
    places = [METHODS[method].where if method in METHODS else method for method in (name, other)]
    return places[0] == places[1]


def _from_file(name: str) -> object:
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise SettingsError(f"There is no file {path} with a method.", "Write path/to/file.py:ClassName.")
    spec = importlib.util.spec_from_file_location(f"{FILE_MODULE}{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    importing(path, partial(spec.loader.exec_module, module))
    named = getattr(module, attribute, None)
    if named is None:
        classes = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == spec.name]
        raise SettingsError(
            f"{path} has no class {attribute!r}.",
            f"{did_you_mean(attribute, classes)}Write path/to/file.py:ClassName.",
        )
    return named


def checked(kind: object, name: str) -> type[Method]:
    """`kind`, if it is a whole method.

    Raises:
        SettingsError: it is no `Method`, or one of its parts is missing or of the wrong kind.
    """
    from mbcd_cli.methods.base import Method

    problem = None
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        problem = "it is no subclass of mbcd_cli.methods.base.Method"
    elif not (isinstance(kind.Settings, type) and issubclass(kind.Settings, MethodSettings)):
        problem = "its Settings are no subclass of mbcd_cli.settings.MethodSettings"
    elif kind.average not in ("none", "ema", "sma", "swad"):
        problem = f"its average is {kind.average!r}, not none, ema, sma or swad"
    elif kind.views not in (1, 2):
        problem = f"its views are {kind.views!r}, not 1 or 2"
    elif not _takes(kind.__init__, "self", "settings", "context"):
        problem = "its __init__ does not take (self, settings, context)"
    elif not _takes(kind.losses, "self", "batch", "out"):
        problem = "its losses do not take (self, batch, out)"
    else:
        bare = [f for f, info in kind.Settings.model_fields.items() if info.is_required()]
        if bare:
            problem = f"its setting {bare[0]} has no default"
    if problem is not None:
        raise SettingsError(f"Method {name!r} is not whole: {problem}.", "docs/extending.md shows what a method has.")
    return kind


def _takes(function: Callable, *arguments: str) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def over_defaults(name: str) -> dict[str, dict[str, object]]:
    """What choosing the method sets, as groups of the tree: its name, a variant's settings, its average's kind, what it
    says of the model: that encoders train, unless it is a probe."""
    entry = METHODS.get(name)
    kind = method_class(name)
    average: dict[str, object] = {"kind": (entry.average if entry else None) or kind.average}
    if kind.average_start:
        average["start"] = kind.average_start
    return {
        "method": {**(entry.settings if entry else {}), "name": name},
        "model": {"tails": "trained", **(entry.model if entry else {})},
        "average": average,
    }


def published_chassis(name: str) -> Mapping[str, object]:
    """A method's own chassis, as `Method.published` says.

    Raises:
        SettingsError: none is known; or there is no such method.
    """
    chassis = METHODS[name].published if name in METHODS else method_class(name).published
    if chassis is None:
        own = "declare `published` in its class" if name not in METHODS else "`mbcd list methods` shows who has one"
        raise SettingsError(
            f"There is no published chassis of method {name}.", f"Use --chassis shared, or leave it out; {own}."
        )
    return chassis


@dataclass(frozen=True, slots=True)
class MethodSummary:
    """A method in one line: what it adds, of which paper, and whether it has a published chassis."""

    method: str
    paper: str
    year: int | None
    what: str
    published: bool


def method_summaries() -> list[MethodSummary]:
    """Every method; a plug-in that cannot be imported says why."""
    rows = [MethodSummary(name, e.paper, e.year, e.summary, e.published is not None) for name, e in METHODS.items()]
    for name in method_names()[len(rows) :]:
        try:
            kind = method_class(name)
            what, published = (kind.__doc__ or "").strip().partition("\n")[0], kind.published is not None
        except MbcdError as error:
            what, published = f"error: {error.message}", False
        rows.append(MethodSummary(name, "", None, what, published))
    return rows
