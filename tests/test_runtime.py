"""Determinism, devices and precision as `runtime` asks for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mbcd_cli import runtime
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


def test_bfloat16_on_a_processor_without_it_is_told(monkeypatch, recwarn):
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    settings = RuntimeSettings(device="cpu", precision="bfloat16", deterministic=before[0])
    monkeypatch.setattr(runtime, "_has_bfloat16", lambda: True)
    runtime.configure(settings)
    assert not recwarn.list
    monkeypatch.setattr(runtime, "_has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match=r"no bfloat16 units.*runtime\.precision=float32"):
        runtime.configure(settings)
