"""A training step written plainly, in float64, for the references of the methods: networks, Adam, average.

A reference of a method says its loss only (`Plain.loss`), from features and logits that are computed here with
elementary operations; gradients come from torch.autograd on that scalar. It shares no code with the package. Dropout is
drawn from torch's global generator in the order of the calls; other draws are those that the step recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from small import Recorder, named

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.staged import Tail
from mbcd_cli.methods import method_class, over_defaults
from mbcd_cli.model import MultiModalModel
from mbcd_cli.resolved import validate
from mbcd_cli.training.assemble import train_with

NAMES, WIDTHS, CLASSES = ("video", "audio", "flow", "extra"), (6, 4, 8, 5), 3
CLOSE = {"rtol": 0, "atol": 1e-10}


class Scaled(torch.autograd.Function):
    """x forward, its gradient times `factor` backward."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class Tanh(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


def tail(k: int, *, frozen: bool = False) -> Tail:
    """The second modality's is of images, through a convolution; the others' of vectors, through a linear layer."""
    if k == 1:
        stages = {"layer": nn.Sequential(nn.Conv2d(2, WIDTHS[k], 2), Tanh()), "pool": Mean()}
    else:
        stages = {"layer": nn.Sequential(nn.Linear(7, WIDTHS[k]), Tanh()), "pool": nn.Identity()}
    return Tail(stages, dim=WIDTHS[k], noise_before=("layer", "pool"), frozen=stages if frozen else ())


class Plain:
    """The student is `values["student.*"]`, own modules `values["method.*"]`; `step` changes them.

    A reference overrides `loss`, which gives every term by name (value, weight) in the step's order.
    """

    def __init__(self, training, settings):
        self.names = list(training.step.model.modalities)
        self.settings, self.norm, self.average = settings.method, settings.model.norm, settings.average
        self.joint = settings.method.unimodal == "joint"
        self.linear = settings.model.unimodal_head == "linear"
        self.linear_fused = settings.model.fused_head == "linear"
        parts = {"student": training.step.model, "method": training.step.method}
        trained = {f"{p}.{n}": v for p, m in parts.items() for n, v in m.named_parameters() if v.requires_grad}
        self.values = {n: v.detach().clone().requires_grad_() for n, v in trained.items()}
        self.buffers = {f"{p}.{n}": v.clone() for p, m in parts.items() for n, v in m.named_buffers()}
        self.teacher = {n: v.detach().clone() for n, v in self.values.items()}
        self.teacher_buffers = {n: v.clone() for n, v in self.buffers.items()}
        self.moments = {n: (torch.zeros_like(v), torch.zeros_like(v)) for n, v in self.values.items()}
        self.time, self.epoch, self.gradients = 0, 0, {}
        self.factors = {}

    # ---- networks

    def affine(self, x, prefix, values=None):
        values = values or self.values
        return x @ values[f"{prefix}.weight"].T + values[f"{prefix}.bias"]

    def pooled(self, k, x, values=None):
        values, prefix = values or self.values, f"student.tails.{self.names[k]}.layer.0"
        if k == 1:
            patches = torch.stack([x[:, :, i : i + 3, j : j + 3] for i in (0, 1) for j in (0, 1)], dim=2)
            weight = values[f"{prefix}.weight"].flatten(2)
            out = torch.einsum("bcpxy,ocp->boxy", patches, weight) + values[f"{prefix}.bias"][:, None, None]
            return torch.tanh(out).mean(dim=(2, 3))
        return torch.tanh(self.affine(x, prefix, values))

    def normalised(self, h):
        if self.norm == "none":
            return h
        centred = h - h.mean(dim=1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5)

    def head(self, h, prefix, values=None):
        if self.linear_fused if "fused" in prefix else self.linear:
            return self.affine(h, prefix, values)
        return self.affine(torch.relu(self.affine(h, f"{prefix}.0", values)), f"{prefix}.3", values)

    def batch_norm(self, x, prefix, training=True, values=None, buffers=None):
        values, buffers = values or self.values, self.buffers if buffers is None else buffers
        mean, var = buffers[f"{prefix}.running_mean"], buffers[f"{prefix}.running_var"]
        if training:
            mean, var = x.mean(dim=0), ((x - x.mean(dim=0)) ** 2).mean(dim=0)
            with torch.no_grad():
                unbiased = var * len(x) / (len(x) - 1)
                for key, new in (("running_mean", mean), ("running_var", unbiased)):
                    buffers[f"{prefix}.{key}"] = 0.9 * buffers[f"{prefix}.{key}"] + 0.1 * new
                buffers[f"{prefix}.num_batches_tracked"] = buffers[f"{prefix}.num_batches_tracked"] + 1
        return (x - mean) / torch.sqrt(var + 1e-5) * values[f"{prefix}.weight"] + values[f"{prefix}.bias"]

    # ---- losses

    @staticmethod
    def probabilities(logits):
        e = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
        return e / e.sum(dim=1, keepdim=True)

    def ce_rows(self, logits, labels):
        return torch.stack([-torch.log(self.probabilities(logits))[i, int(y)] for i, y in enumerate(labels)])

    def ce(self, logits, labels):
        return self.ce_rows(logits, labels).sum() / len(labels)

    def erm(self, s):
        """ERM's two terms."""
        uni = torch.stack([self.ce(logits, s.labels) for logits in s.unimodal])
        return {"ce_fused": (self.ce(s.fused, s.labels), 1.0), "ce": (uni, 1.0)}

    def loss(self, s):
        return self.erm(s)

    def alone(self, s):
        """Logits of each modality's own features: its share of a linear fused head, else its head's."""
        if not self.linear_fused:
            return s.unimodal
        weight, bias, at, each = self.values["student.fused_head.weight"], self.values["student.fused_head.bias"], 0, []
        for h in s.h:
            each.append(h @ weight[:, at : at + h.shape[1]].T + bias / len(s.h))
            at += h.shape[1]
        return each

    def fused(self, h):
        return self.head(torch.cat(h, dim=1), "student.fused_head")

    def changed(self, gradients, s):
        """Gradients by name, as the optimizer takes them."""
        return gradients

    def modulated(self, gradients, factors):
        """Gradients by name; of every encoder times its factor, unless that is for the update."""
        factors = dict(zip(self.names, map(float, factors), strict=True))
        if self.settings.modulate == "update":
            self.factors = factors
            return gradients
        of = {name: factors[name.split(".")[2]] for name in gradients if name.startswith("student.tails.")}
        return {name: of.get(name, 1.0) * g for name, g in gradients.items()}

    def decay(self, name):
        """Weight decay of one tensor."""
        return 1e-2

    # ---- the step

    def step(self, batch, draws):
        class Seen:
            """What a loss reads."""

        s = Seen()
        s.inputs, s.labels, s.domains, s.draws = batch.inputs, batch.labels, batch.domains, draws
        s.pooled = [self.pooled(k, s.inputs[n][0]) for k, n in enumerate(self.names)]
        s.h = [self.normalised(h) for h in s.pooled]
        seen = s.h if self.joint else [h.detach() for h in s.h]
        s.unimodal = [self.head(h, f"student.heads.{n}") for h, n in zip(seen, self.names, strict=True)]
        s.fused = self.fused(s.h)
        self.time += 1
        terms = self.loss(s)
        total = sum((weight * value).sum() for value, weight in terms.values())
        keys = list(self.values)
        found = torch.autograd.grad(total, [self.values[k] for k in keys], allow_unused=True, retain_graph=True)
        self.gradients = self.changed({k: g for k, g in zip(keys, found, strict=True) if g is not None}, s)
        with torch.no_grad():
            for key, gradient in self.gradients.items():
                g, (m, v) = gradient + self.decay(key) * self.values[key], self.moments[key]
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g * g)
                step = (m / (1 - 0.9**self.time)) / (torch.sqrt(v / (1 - 0.999**self.time)) + 1e-8)
                tail = key.split(".")[2] if key.startswith("student.tails.") else None
                self.values[key] -= self.factors.get(key, self.factors.get(tail, 1.0)) * 1e-2 * step
            self.follow()
        assert not draws, "draws of the step that the reference did not use"
        return {"total": total, **{name: value for name, (value, _) in terms.items()}}

    def follow(self):
        """The weight average; uni-modal heads are the student's."""
        after = max(self.time - self.average.start, 0)
        weight = 1 / (after + 1) if self.average.kind == "sma" else 1 - self.average.beta
        for mine, theirs in ((self.teacher, self.values), (self.teacher_buffers, self.buffers)):
            for name, value in theirs.items():
                copied = ".heads." in name or not value.is_floating_point()
                mine[name] = value.detach().clone() if copied else mine[name] + weight * (value.detach() - mine[name])


def make(method, told=None, *, modalities=2, sources=2, average=None, **model):
    """A training of a small float64 model with a method, and its settings."""
    names, over = NAMES[:modalities], over_defaults(method)
    kind = method_class(method)
    tree = {
        "modalities": {n: {"kind": "array", "dimension": 7} for n in names},
        "model": {"hidden": 5, "dropout": 0.0, "modalities": names, **over["model"], **model},
        "method": {**over["method"], **(told or {})},
        "average": {**over["average"], **(average or {})},
        "optimizer": {"lr": 1e-2, "weight_decay": 1e-2},
        "runtime": {"device": "cpu", "precision": "float32", "channels_last": "off"},
    }
    settings = validate(tree)
    torch.manual_seed(3)
    tails = {n: tail(k, frozen=settings.model.tails == "frozen") for k, n in enumerate(names)}
    built = MultiModalModel(tails, settings=settings.model, classes=CLASSES).double()
    return train_with(kind, built, settings, sources=[4, 2][:sources]), settings


def small_batch(seed, modalities=2, sources=2, size=6, views=1):
    """Clips of two domains (4 and 2 of the dataset's list), or of one; their views after one another."""
    g, rows = torch.Generator().manual_seed(seed), size * views
    shapes = [(2, 4, 4) if k == 1 else (7,) for k in range(modalities)]
    return Batch(
        inputs={NAMES[k]: (torch.randn(rows, *s, generator=g, dtype=torch.float64),) for k, s in enumerate(shapes)},
        labels=torch.randint(0, CLASSES, (size,), generator=g).repeat_interleave(views),
        domains=torch.tensor([4, 2][:sources])[torch.randint(0, sources, (size,), generator=g)].repeat_interleave(
            views
        ),
        clips=torch.arange(size).repeat_interleave(views),
    )


def compare(reference, method, told=None, *, modalities=2, sources=2, steps=5, epoch=0, begin=None, **more):
    """The method's step against its reference: figures, every gradient, and after all steps weights and average.

    `begin` is called with the step before the reference copies what it holds.
    """
    torch.set_num_threads(1)
    training, settings = make(method, told, modalities=modalities, sources=sources, **more)
    step, recorder = training.step, training.randomness
    if begin is not None:
        begin(step)
    plain = reference(training, settings)
    recorder.__class__, recorder.draws = Recorder, []  # in its place: parts of a method may hold it too
    step.context.epoch.fill_(epoch)
    plain.epoch = epoch
    for index in range(steps):
        batch = small_batch(index, modalities, sources, views=step.method.views)
        torch.manual_seed(index)
        figures = named(step, step(batch))
        torch.manual_seed(index)
        expected = plain.step(batch, [draw.double() for draw in recorder.draws])
        recorder.draws.clear()
        for name, value in expected.items():
            torch.testing.assert_close(figures[name].double(), value.detach(), **CLOSE, msg=f"{name}, step {index}")
        parts = {"student": step.model, "method": step.method}
        own = {f"{p}.{n}": v for p, m in parts.items() for n, v in m.named_parameters() if v.requires_grad}
        assert {n for n, v in own.items() if v.grad is not None} == set(plain.gradients)
        for name, gradient in plain.gradients.items():
            torch.testing.assert_close(own[name].grad, gradient, **CLOSE, msg=f"gradient of {name}, step {index}")
    for name, value in own.items():
        torch.testing.assert_close(value.data, plain.values[name].data, **CLOSE, msg=name)
    for part, module in parts.items():
        for name, value in module.named_buffers():
            if f"{part}.{name}" in plain.buffers:
                torch.testing.assert_close(value, plain.buffers[f"{part}.{name}"], **CLOSE, msg=name)
    if step.average is not None:
        for name, value in step.average.model_for_evaluation().named_parameters():
            torch.testing.assert_close(value, plain.teacher[f"student.{name}"], **CLOSE, msg=f"average of {name}")
    return step, plain


# ---- inputs of the pinned numbers: B = 6 clips, C = 3 classes

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def pinned_features(k):
    """H_k[i, c] = 1.5 + k + sin(1 + 3i + 7c + 11k), with 8, 4 and 6 columns."""
    i, c = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange((8, 4, 6)[k], dtype=torch.float64)[None]
    return 1.5 + k + torch.sin(1 + 3 * i + 7 * c + 11 * k)


def pinned_logits(k, classes=3):
    """L_k[i, c] = 2 cos(2 + 5i + 3c + 13k)."""
    i, c = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange(classes, dtype=torch.float64)[None]
    return 2 * torch.cos(2 + 5 * i + 3 * c + 13 * k)


def pinned_rows(k):
    """Z_k: the first four columns of H_k as unit rows."""
    return F.normalize(pinned_features(k)[:, :4], dim=1)
