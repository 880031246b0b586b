"""A training step written plainly from the equations, in float64, sharing no code with the package.

The networks are spelled out with elementary operations; gradients come from torch.autograd on the scalar losses.
Random draws are those that the step recorded, consumed in order.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

KINDS = ("conv", "two", "vector", "conv")
"""Network of the first, second, ... modality."""


def softmax(logits):
    shifted = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return shifted / shifted.sum(dim=1, keepdim=True)


def log_softmax(logits):
    top = logits.max(dim=1, keepdim=True).values
    return logits - top - torch.log(torch.exp(logits - top).sum(dim=1, keepdim=True))


class ReferenceStep:
    """The student is `values` and `buffers` by name, the teacher `teacher` by name; `step` changes them."""

    def __init__(self, model, settings, *, lr, weight_decay, beta=0.8, batch_norm="tracked", head_dropout=0.0):
        self.names = list(model.modalities)
        self.settings, self.batch_norm, self.head_dropout = settings, batch_norm, head_dropout
        self.beta = beta  # of the weight average
        self.lr, self.weight_decay, self.beta1 = lr, weight_decay, 0.9
        self.frozen = {k for k, v in model.named_parameters() if not v.requires_grad}
        self.values = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
        self.buffers = {k: v.clone() for k, v in model.named_buffers()}
        self.teacher = {k: v.detach().clone() for k, v in {**self.values, **self.buffers}.items()}
        self.m = {k: torch.zeros_like(v) for k, v in self.values.items()}
        self.v = {k: torch.zeros_like(v) for k, v in self.values.items()}
        self.time = 0
        self.grads = {}

    # ---- the networks

    def norm(self, x, prefix, values, buffers, training):
        """Batch norm; the running statistics of `buffers` follow when training."""
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        if training:
            mean = x.mean(dim=dims)
            var = ((x - mean.reshape(shape)) ** 2).mean(dim=dims)
            count = x.numel() // x.shape[1]
            with torch.no_grad():
                for key, new in (("running_mean", mean), ("running_var", var * count / (count - 1))):
                    buffers[f"{prefix}.{key}"] = 0.9 * buffers[f"{prefix}.{key}"] + 0.1 * new
                buffers[f"{prefix}.num_batches_tracked"] = buffers[f"{prefix}.num_batches_tracked"] + 1
        else:
            mean, var = buffers[f"{prefix}.running_mean"], buffers[f"{prefix}.running_var"]
        x = (x - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + 1e-5)
        return x * values[f"{prefix}.weight"].reshape(shape) + values[f"{prefix}.bias"].reshape(shape)

    def block(self, x, prefix, values, buffers, training):
        weight = values[f"{prefix}.0.weight"]
        x = F.conv1d(x, weight) if weight.dim() == 3 else x @ weight.T + values[f"{prefix}.0.bias"]
        return torch.relu(self.norm(x, f"{prefix}.1", values, buffers, training))

    def feature(self, k, parts, values, buffers, *, training, draws=None):
        """Normalised pooled feature of modality k; `draws` brings noise."""
        name, kind = self.names[k], KINDS[k]
        paths = (".slow", ".fast") if kind == "two" else ("",)

        def layer(prefix, parts, training):
            return [
                self.block(x, prefix + path, values, buffers, training) for x, path in zip(parts, paths, strict=True)
            ]

        if f"trunks.{name}.layer0{paths[0]}.0.weight" in values:
            parts = layer(f"trunks.{name}.layer0", parts, training)
        parts = self.noise(parts, draws)
        parts = layer(f"tails.{name}.layer1", parts, training and self.batch_norm == "tracked")
        parts = self.noise(parts, draws)
        h = torch.cat([p.mean(dim=2) if p.dim() == 3 else p for p in parts], dim=1)
        centred = h - h.mean(dim=1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5)

    def noise(self, parts, draws):
        if draws is None or parts[0].shape[0] == 1:
            return parts
        coin = draws.pop(0).item()
        noised = []
        for x in parts:
            if x.dim() == 2:
                e = draws.pop(0)
                noised.append(x + e * torch.sqrt(x.var(dim=0, unbiased=True) + 1e-6))
                continue
            e_mean, e_std = draws.pop(0), draws.pop(0)
            mu, sigma = x.mean(dim=2), torch.sqrt(x.var(dim=2, unbiased=True) + 1e-6)
            s_mu = torch.sqrt(mu.var(dim=0, unbiased=True) + 1e-6)
            s_sigma = torch.sqrt(sigma.var(dim=0, unbiased=True) + 1e-6)
            plain = (x - mu[:, :, None]) / sigma[:, :, None]
            noised.append(plain * (sigma + e_std * s_sigma)[:, :, None] + (mu + e_mean * s_mu)[:, :, None])
        return noised if coin < self.settings.feature_noise.probability else parts

    def head(self, h, prefix, values, training):
        hidden = torch.relu(h @ values[f"{prefix}.0.weight"].T + values[f"{prefix}.0.bias"])
        hidden = F.dropout(hidden, self.head_dropout, training=training) if self.head_dropout else hidden
        return hidden @ values[f"{prefix}.3.weight"].T + values[f"{prefix}.3.bias"]

    # ---- the losses

    @staticmethod
    def ce(logits, labels):
        rows = log_softmax(logits)
        return -sum(rows[i, int(label)] for i, label in enumerate(labels)) / len(labels)

    @staticmethod
    def kl(teacher, logits):
        """KL(teacher || student), averaged over the batch."""
        return (teacher * (torch.log(teacher) - log_softmax(logits))).sum() / len(teacher)

    # ---- what variants change

    def spared(self, p, first, uni, labels):
        """Drop rates, and what the distillation into each modality is multiplied with."""
        return p, [1.0] * len(p)

    def kept(self, keep, uni, labels):
        return keep

    def own(self, first, uni, labels, draws):
        """Further terms by name: (value, weight)."""
        return {}

    # ---- the step

    def step(self, inputs, labels, draws):
        """inputs: name -> parts. Returns every figure by name; `draws` must end up empty."""
        o, names, batch = self.settings, self.names, len(labels)
        values, buffers = self.values, self.buffers
        count = len(names)
        tail_keys = [k for k in values if k.startswith("tails.")]
        noised = o.feature_noise.enabled
        shared = not noised and o.consistency.order == "off"

        p_teacher = None
        if o.distillation.enabled:
            with torch.no_grad():
                h = [
                    self.feature(k, inputs[n], self.teacher, self.teacher, training=False) for k, n in enumerate(names)
                ]
                logits = self.head(torch.cat(h, dim=1), "fused_head", self.teacher, False)
                p_teacher = torch.clamp(softmax(logits), min=1e-12)

        # First pass: noise, uni-modal heads.
        first = [
            self.feature(k, inputs[n], values, buffers, training=True, draws=draws if noised else None)
            for k, n in enumerate(names)
        ]
        uni = []
        for k, n in enumerate(names):
            h = first[k].detach() if o.unimodal == "probe" else first[k]
            uni.append(self.head(h, f"heads.{n}", values, True))
        ce_uni = [self.ce(logits, labels) for logits in uni]
        kl_uni = [self.kl(p_teacher, logits) if p_teacher is not None else torch.zeros(()) for logits in uni]

        # Eq. 2-4.
        s = []
        for logits in uni:
            rows = softmax(logits.detach())
            if o.dropout.score == "true_class":
                s.append(sum(float(rows[i, int(labels[i])]) for i in range(batch)))
            else:
                s.append(sum(float(rows[i].max()) for i in range(batch)))
        r = [sum(s[k] / s[j] for j in range(count) if j != k) / (count - 1) if count > 1 else 1.0 for k in range(count)]
        if o.dropout.strategy == "none" or count == 1:
            p = [0.0] * count
        elif o.dropout.strategy == "fixed":
            p = [o.dropout.rate] * count
        else:
            p = [math.tanh(max(one - 1, 0)) for one in r]
        p, pull = self.spared(p, first, uni, labels)
        keep = torch.ones(batch, count, dtype=torch.float64)
        if o.dropout.strategy != "none":
            uniform = draws.pop(0)
            for i in range(batch):
                for k in range(count):
                    keep[i, k] = 0.0 if uniform[i, k] < p[k] else 1.0
        keep = self.kept(keep, uni, labels)
        own = self.own(first, uni, labels, draws)

        # Inner step, Eq. 5.
        stepped = dict(values)
        if o.consistency.order != "off":
            for k, n in enumerate(names):
                mine = [key for key in tail_keys if key.startswith(f"tails.{n}.")]
                second = o.consistency.order == "second"
                g = torch.autograd.grad(ce_uni[k], [values[m] for m in mine], retain_graph=True, create_graph=second)
                for key, gradient in zip(mine, g, strict=False):
                    # First order: theta' is a new point, whose gradient is applied to theta.
                    stepped[key] = (
                        values[key] - o.consistency.alpha * gradient
                        if second
                        else (values[key] - o.consistency.alpha * gradient).detach().requires_grad_()
                    )

        # Second pass: no noise, modality dropout.
        if shared:
            h = first
        else:
            h = [self.feature(k, inputs[n], stepped, buffers, training=True) for k, n in enumerate(names)]
        fused = self.head(
            torch.cat([h[k] * keep[:, k : k + 1] for k in range(count)], dim=1), "fused_head", values, True
        )
        ce_mm = self.ce(fused, labels)
        kl_mm = self.kl(p_teacher, fused) if p_teacher is not None else torch.zeros(())
        weight = o.distillation.weight
        total = ce_mm + sum(ce_uni) + weight * (kl_mm + sum(a * b for a, b in zip(pull, kl_uni, strict=True)))
        total = total + sum((w * value).sum() for value, w in own.values())

        keys = [key for key in values if key not in self.frozen]
        found = torch.autograd.grad(total, [values[k] for k in keys], retain_graph=True, allow_unused=True)
        gradient = dict(zip(keys, found, strict=True))
        gradient = {k: torch.zeros_like(values[k]) if g is None else g for k, g in gradient.items()}
        if o.consistency.order == "first":
            at = torch.autograd.grad(total, [stepped[k] for k in tail_keys])
            for key, g in zip(tail_keys, at, strict=False):
                gradient[key] = gradient[key] + g
        self.grads = gradient

        # Adam with coupled weight decay.
        self.time += 1
        with torch.no_grad():
            for key in keys:
                g = gradient[key] + self.weight_decay * values[key]
                self.m[key] = self.beta1 * self.m[key] + (1 - self.beta1) * g
                self.v[key] = 0.999 * self.v[key] + 0.001 * g * g
                m_hat = self.m[key] / (1 - self.beta1**self.time)
                v_hat = self.v[key] / (1 - 0.999**self.time)
                values[key] -= self.lr * m_hat / (torch.sqrt(v_hat) + 1e-8)
            for key, value in {**values, **buffers}.items():
                if key.startswith("heads."):
                    self.teacher[key] = value.detach().clone()
                elif value.is_floating_point():
                    self.teacher[key] = self.beta * self.teacher[key] + (1 - self.beta) * value.detach()
                else:
                    self.teacher[key] = value.clone()

        assert not draws
        return {
            "total": total,
            "ce_fused": ce_mm,
            "ce": torch.stack(ce_uni),
            "kl_fused": kl_mm,
            "kl": torch.stack(kl_uni),
            "s": torch.tensor(s, dtype=torch.float64),
            "r": torch.tensor(r, dtype=torch.float64),
            "p": torch.tensor(p, dtype=torch.float64),
            "dropped": 1 - keep.mean(dim=0),
            "accuracy_fused": (fused.argmax(1) == labels).sum() / batch,
            "accuracy": torch.stack([(logits.argmax(1) == labels).sum() / batch for logits in uni]),
            **{name: value for name, (value, _) in own.items()},
        }
