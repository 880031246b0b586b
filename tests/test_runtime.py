"""Determinism, devices and precision as `runtime` asks for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mbcd_cli import runtime
from mbcd_cli.errors import SettingsError
from mbcd_cli.settings import RuntimeSettings


def test_determinism_does_not_import_the_compiler():
    code = (
        "import sys, torch; from mbcd_cli.runtime import configure; from mbcd_cli.settings import RuntimeSettings\n"
        "configure(RuntimeSettings(device='cpu'))\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "assert torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "assert not {'torch._inductor', 'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_step_of_the_optimizer_is_torchs_and_does_not_import_the_compiler():
    code = """
import sys, torch
from mbcd_cli.settings import OptimizerSettings
from mbcd_cli.training.optimizer import build_optimizer
torch.manual_seed(0)
gradients = [[torch.randn(33, 7) if (n + step) % 3 else None for n in range(3)] for step in range(5)]
def train(values, optimizer):
    for given in gradients:
        optimizer.zero_grad()
        for value, gradient in zip(values, given):
            value.grad = gradient
        optimizer.step()
    return optimizer.state_dict()
values, kinds = [torch.randn(33, 7) for _ in range(3)], {'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}
sets = {(name, whose): [v.clone().requires_grad_() for v in values] for name in kinds for whose in ('ours', 'theirs')}
settings = {name: OptimizerSettings(name=name, weight_decay=0.1) for name in kinds}
ours = {name: train(sets[name, 'ours'], build_optimizer(sets[name, 'ours'], settings[name])) for name in kinds}
assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)
for name, kind in kinds.items():
    told = {'lr': settings[name].lr, 'betas': (settings[name].momentum, 0.999), 'weight_decay': 0.1, 'fused': True}
    mine, theirs = ours[name]['state'], train(sets[name, 'theirs'], kind(sets[name, 'theirs'], **told))['state']
    assert all(torch.equal(one, other) for one, other in zip(sets[name, 'ours'], sets[name, 'theirs']))
    assert [list(one) for one in mine.values()] == [list(one) for one in theirs.values()]
    for one, other in zip(mine.values(), theirs.values()):
        assert all(torch.equal(one[key], other[key]) for key in one)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_population_does_not_import_sympy_and_its_cross_entropy_is_torchs_to_the_bit():
    code = """
import sys, torch
from torch.func import vmap
from torch.nn import functional as F
from mbcd_cli.methods.parts import cross_entropy
from mbcd_cli.training.subject import Subject
from mbcd_cli.training.population import StackedStep
for name in ("mbcd", "nel"):
    subject = Subject.of(name, {})
    members = [subject.training(seed=seed) for seed in range(2)]
    for member in members:
        member.randomness.own_globals()
    step = StackedStep(members)
    step([subject.batch(seed) for seed in range(2)])
assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)
labels = torch.randint(10, (5, 16))
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    logits = 4 * torch.randn(5, 16, 10, dtype=dtype)
    found = []
    wide = torch.promote_types(dtype, torch.float32)
    for of in (cross_entropy, lambda rows, classes: F.cross_entropy(rows.to(wide), classes)):
        rows = logits.clone().requires_grad_()
        losses = vmap(of)(rows, labels)
        losses.sum().backward()
        found.append((losses, rows.grad))
    assert all(torch.equal(*pair) for pair in zip(*found)), dtype
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_far_more_threads_than_processors_are_refused(monkeypatch):
    monkeypatch.setattr("mbcd_cli.runtime.os.cpu_count", lambda: 2)
    before = torch.get_num_threads()
    with pytest.raises(SettingsError, match="17 threads are too many for 2 processors"):
        runtime.configure(RuntimeSettings(threads=17))
    assert torch.get_num_threads() == before


def test_bfloat16_on_a_processor_without_it_is_told(monkeypatch, recwarn):
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    settings = RuntimeSettings(device="cpu", precision="bfloat16", deterministic=before[0])
    monkeypatch.setattr(runtime, "_has_bfloat16", lambda: True)
    runtime.configure(settings)
    assert not recwarn.list
    monkeypatch.setattr(runtime, "_has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match=r"no bfloat16 units.*runtime\.precision=float32"):
        runtime.configure(settings)


def test_a_gpu_has_its_number(monkeypatch):
    """torch.cuda.set_device takes no other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert runtime.pick_device(RuntimeSettings(device=name)) == torch.device("cuda:0")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.pick_device(RuntimeSettings(device="cuda")) == torch.device("cuda:1")
