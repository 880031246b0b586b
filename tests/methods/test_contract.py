"""Every method of the registry, and some that use what the interface offers, through the same checks as anyone's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import typer
from torch import nn

from mbcd_cli import examination
from mbcd_cli.cli.outcome import outcome
from mbcd_cli.errors import SettingsError
from mbcd_cli.launch.unit import read_failure, write_failure
from mbcd_cli.methods import METHODS, checked, method_class, same_class
from mbcd_cli.methods.base import Method, ParameterGroup, Term, total
from mbcd_cli.methods.parts import cross_entropy, full_precision
from mbcd_cli.settings import MethodSettings
from mbcd_cli.training.contract import CHECKS, check_method, check_population
from mbcd_cli.training.subject import Subject

TOLD = {
    "dann": {"hidden": 16, "ramp": 2},
    "opm": {"start": 0},
    "arl": {"start": 0},
    "admmdg": {"hidden": 16},
    "g-blending": {"epochs": 2},
    "simmmdg": {"hidden": 16},
    "moosa": {"hidden": 16, "permutations": 12},
    "cmrf": {"hidden": 16, "beta": 1.0},
    "cmrf-benchmark": {"hidden": 16, "beta": 1.0, "random_projections": ("m0",)},
    "gmp": {"hidden": 16},
    "gmp-benchmark": {"hidden": 16},
    "jat": {"hidden": 16, "fused_hidden": 12},
    "jat-benchmark": {"hidden": 16, "fused_hidden": 12},
    "nel": {"hidden": 16},
}
"""Settings with which a method does in a few steps, and with small modules, all that it does.

CMRF's usual draws leave many rows next to the teacher's own, which at first is the student's: a distance of rounding
has a gradient of rounding, which two processes do not share.
"""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_the_registry(method, check):
    subject = Subject.of(method, TOLD.get(method))
    subject = replace(subject, average={**subject.average, "start": min(subject.kind.average_start, 2)})
    if check != "population":
        CHECKS[check](subject)
        return
    check_population(subject, apart=0.0)
    first = next(name for name in METHODS if same_class(name, method))
    if method == first != "miro":  # torch's softplus of fewer numbers than fill a processor's vector is another one
        # With numbers that are the same: products of two of them round otherwise in float32.
        check_population(subject, apart=0.0, double=False, differing=(1.0, 1.0, 1.0))


COMPARES_SOURCES = ("mixup-domains", "coral", "mmd", "dann")


@pytest.mark.parametrize("method", METHODS)
def test_none_is_passed_over_by_a_check_but_where_that_is_told_here(method):
    """What the checks leave out: refused numbers of modalities and sources, and what a class says that it is not."""
    subject = Subject.of(method, TOLD.get(method))
    for modalities in (1, 2, 3, 4):
        subject.training(modalities=modalities)
        if method not in COMPARES_SOURCES:
            subject.training(modalities=modalities, sources=1)
    assert subject.kind.symmetric == (method not in ("rna-net", "moosa"))
    assert subject.kind.capturable == (method != "nel")
    assert subject.kind.stackable


MODULATED = [name for name in METHODS if "modulate" in method_class(name).Settings.model_fields]


@pytest.mark.parametrize("check", ["neutral", "resume", "order", "precision", "static", "population", "processes"])
@pytest.mark.parametrize("method", MODULATED)
def test_methods_that_multiply_the_update(method, check):
    CHECKS[check](Subject.of(method, {**TOLD.get(method, {}), "modulate": "update"}))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("average", ["none", "ema", "sma", "swad"])
def test_every_method_may_be_averaged(average, check):
    CHECKS[check](Subject(Method, {}, {"kind": average, "start": 0 if average == "swad" else 2}))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Adversary(Method):
    """A domain adversary on every modality, with an optimizer group of its own and a statistic of the whole batch."""

    stackable = False  # `Reversed` has no rule for vmap

    def __init__(self, settings, context):
        super().__init__(settings, context)
        domains = max(len(context.sources), 2)
        self.judges = nn.ModuleDict({n: nn.Linear(d, domains) for n, d in context.model.dims.items()})

    def parameter_groups(self):
        return [ParameterGroup([judge.bias for judge in self.judges.values()], weight_decay=0.0, lr=1e-3)]

    def losses(self, batch, out):
        domains = self.context.source_domains(batch)
        with self.context.autocast():
            judged = [self.judges[n](Reversed.apply(h)) for n, h in out.features.items()]
        norms = torch.stack(self.context.group.average([h.norm(dim=1).mean() for h in out.pooled.values()]))
        return super().losses(batch, out) | {
            "adversary": Term(torch.stack([cross_entropy(logits, domains) for logits in judged]), 0.1),
            "norms": Term(norms.var(correction=0), 0.01),
        }


class TwoViews(Method):
    """Agreement of two views, from the second step on, with an averaged projection as its target."""

    views = 2
    average = "sma"

    def __init__(self, settings, context):
        super().__init__(settings, context)
        self.project = nn.ModuleDict({n: nn.Linear(d, 4) for n, d in context.model.dims.items()})
        self.target = context.average.follow(self.project)

    def losses(self, batch, out):
        gate = (self.context.step > 1).to(out.fused.dtype)
        apart = []
        for name, h in out.features.items():
            first, second = h[0::2], h[1::2]
            with self.context.autocast():
                z, target = self.project[name](first), self.target[name](second).detach()
            apart.append(full_precision(z - target).square().mean())
        return super().losses(batch, out) | {"views": Term(torch.stack(apart), 0.1 * gate)}


class Sharp(Method):
    """SAM: the gradient at the point up the slope."""

    capturable = False
    stackable = False

    @property
    def passes(self):
        return 2

    def gradients(self, batch):
        batch = self.at_cut(batch)
        trained = [p for p in self.context.model.parameters() if p.requires_grad]
        total(self.losses(batch, self(batch))).backward()
        held = [p for p in trained if p.grad is not None]
        self.context.group.average_([p.grad for p in held])
        scale = 0.05 / torch.stack([p.grad.norm() for p in held]).norm()
        steps = [p.grad * scale for p in held]
        with torch.no_grad():
            torch._foreach_add_(held, steps)
        for p in held:
            p.grad = None
        out = self(batch)
        terms = self.losses(batch, out)
        loss = total(terms)
        loss.backward()
        with torch.no_grad():
            torch._foreach_sub_(held, steps)
        return self.figures(batch, out, loss, terms)


class Modulated(Method):
    """Gradients of the tails are scaled by how much their modality dominates, and noised."""

    neutral = None
    stackable = False

    def gradients(self, batch):
        figures = super().gradients(batch)
        names = self.context.model.modalities
        share = self.context.group.average([figures["accuracy"]])[0] + 0.1
        factor = torch.where(share > share.mean(), 0.5, 1.0)
        for k, name in enumerate(names):
            for parameter in self.context.model.tails[name].parameters():
                if parameter.grad is not None:
                    noise = self.context.randomness.normal(*parameter.shape, dtype=parameter.dtype)
                    parameter.grad = parameter.grad * factor[k] + 1e-3 * noise
        return figures | {"factor": factor}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", [Adversary, TwoViews, Sharp, Modulated])
def test_what_other_methods_need(kind, check):
    if check == "neutral" and kind in (Sharp, Modulated):
        pytest.skip("it adds no term")
    CHECKS[check](Subject.of(kind))


class Careless(Method):
    """A statistic of its own rows."""

    def losses(self, batch, out):
        spread = torch.stack([h.mean(dim=0).square().mean() for h in out.pooled.values()])
        return super().losses(batch, out) | {"spread": Term(spread)}


class Noisy(Method):
    """Draws that no checkpoint holds."""

    generator = torch.Generator().manual_seed(0)

    def losses(self, batch, out):
        noise = torch.randn(out.fused.shape, generator=self.generator, dtype=out.fused.dtype)
        return super().losses(batch, out) | {"noise": Term((noise * out.fused).mean())}


class Ordered(Method):
    """A ratio of the first modality's norm to the second's."""

    def losses(self, batch, out):
        first, second, *_ = self.context.group.average([h.norm(dim=1).mean() for h in out.pooled.values()])
        return super().losses(batch, out) | {"norms": Term(first / second)}


class Single(Method):
    """Computes in float32 whatever the weights are."""

    def losses(self, batch, out):
        norms = sum(h.float().norm(dim=1).mean() for h in out.pooled.values())
        return super().losses(batch, out) | {"norms": Term(norms / 7)}


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (Careless, "processes", "two processes against one"),
        (Noisy, "resume", "resumed against whole"),
        (Ordered, "order", "another order of modalities: total, norms differ in step 1, by 4e-01$"),
        (Single, "order", r"norms differ in step 1, by \de-0[78]; so little is float32's rounding: parts.full_prec"),
    ],
)
def test_the_checks_find_what_is_wrong(kind, check, words):
    with pytest.raises(AssertionError, match=words):
        CHECKS[check](Subject.of(kind))


def test_a_class_that_lacks_a_part_is_refused_by_name():
    class NoSettings(Method):
        Settings = dict

    class NoDefault(Method):
        class Settings(MethodSettings):
            weight: float
            """Weight."""

    class Averaged(Method):
        average = "mean"

    class Alone(Method):
        def __init__(self, settings):
            super().__init__(settings, None)

    class Blind(Method):
        def losses(self, out):
            return {}

    for found, words in (
        (nn.Linear, "no subclass"),
        (NoSettings, "Settings"),
        (NoDefault, "setting weight has no default"),
        (Averaged, "average is 'mean'"),
        (Alone, "__init__ does not take"),
        (Blind, "losses do not take"),
    ):
        with pytest.raises(SettingsError, match=words):
            checked(found, "mine")
    with pytest.raises(SettingsError, match="no subclass"):
        check_method(nn.Linear)


def test_a_class_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from mbcd_cli.methods.base import Method\nclass Mine(Method):\n    '''Mine.'''\n")
    assert issubclass(method_class(f"{path}:Mine"), Method)
    for name, words in (
        (f"{path}:Yours", "no class 'Yours'"),
        (f"{path}:mine", "Did you mean Mine"),
        (f"{tmp_path}/none.py:Mine", "no file"),
    ):
        with pytest.raises(SettingsError) as caught:
            method_class(name)
        assert words in str(caught.value)
    for source, words in (
        ("import nowhere_to_be_found", f"No module named 'nowhere_to_be_found' ({path}:1)"),
        ("import sys\nsys.exit(0)", "it ends the program"),
        ("class Others(Method", "mine.py, line 1"),
    ):
        path.write_text(source)
        with pytest.raises(SettingsError) as caught:
            method_class(f"{path}:Others")
        assert words in str(caught.value)


def test_a_method_that_refuses_two_modalities_has_a_report_without_its_cost(tmp_path, monkeypatch):
    path = tmp_path / "three.py"
    path.write_text(
        "from mbcd_cli.errors import SettingsError\nfrom mbcd_cli.methods.base import Method\n\n\n"
        "class Mine(Method):\n    def __init__(self, settings, context):\n"
        "        super().__init__(settings, context)\n        if len(context.model.modalities) < 3:\n"
        "            raise SettingsError('It takes three.', 'Give them.')\n"
    )
    kept = {name: CHECKS[name] for name in ("figures", "deployed")}
    monkeypatch.setattr("mbcd_cli.training.contract.CHECKS", kept)
    done = examination.check_part("method", f"{path}:Mine", flags={})
    assert [(one.name, one.holds) for one in done.promises] == [("figures", True), ("deployed", False)]
    assert done.promises[1].why.startswith("It takes three.")
    assert (done.cost, done.exit_code) == (None, 1)


def test_what_fails_in_somebody_s_file_is_told_with_its_line(tmp_path, capsys):
    path = tmp_path / "failing.py"
    path.write_text(
        "from mbcd_cli.methods.base import Method\n\n\nclass Mine(Method):\n"
        "    def losses(self, batch, out):\n        raise KeyError('own')\n"
    )
    step = Subject.of(f"{path}:Mine").training().step
    with pytest.raises(typer.Exit) as ended, outcome(as_json=False, debug=False):
        step(Subject(Method).batch(0))
    assert ended.value.exit_code == 1
    assert f"error: {path}:6: KeyError: 'own'" in "".join(capsys.readouterr().err.split("\n"))
    write_failure(tmp_path / "cell", ended.value.__cause__)
    assert read_failure(tmp_path / "cell") == f"{path}:6: KeyError: 'own'"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "there is NoneType"),
        ({}, "there is an empty one"),
        ({"own": torch.zeros(())}, "'own', which is Tensor"),
        ({"own": Term(0.5)}, "'own', whose value is float"),
        ({"own": Term(torch.zeros(12, requires_grad=True))}, r"'own' has the shape \[12\], neither \[\] nor \[2\]"),
    ],
)
def test_losses_that_are_no_terms_are_refused_by_name(given, words):
    class Mine(Method):
        def losses(self, batch, out):
            return given

    with pytest.raises(SettingsError, match=words):
        Subject.of(Mine).training().step(Subject(Method).batch(0))
