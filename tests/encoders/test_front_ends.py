"""Front ends of sound run where there is no float64; test_transformers_models.py has that they equal their owners'."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.encoders import build_encoder, described_encoders
from mbcd_cli.encoders.front_ends import FBANK_FFT, KaldiFbank, LogMel, Standardise
from mbcd_cli.settings import CacheSettings, Settings


class NoDoubleOnMPS(TorchDispatchMode):
    """Refuses float64 on MPS, as a Mac does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device.type == "mps" and value.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return out


@pytest.mark.parametrize("kind", ["fbank", "log-mel", "standardise"])
def test_front_ends_run_on_a_device_without_float64(kind):
    with FakeTensorMode(), NoDoubleOnMPS():
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, device="mps").double()
        front = {
            "fbank": lambda: KaldiFbank(np.ones((FBANK_FFT // 2 + 1, 8)), frames=30, mean=1.0, std=2.0),
            "log-mel": lambda: LogMel(np.ones((257, 8)), hop=160),
            "standardise": Standardise,
        }[kind]()
        moved = front._apply(lambda value: torch.empty_like(value, device="mps"))  # `to` asks for a Mac
        out = moved(torch.zeros(2, 1, 3200, device="mps"))
        assert (out.device.type, out.dtype) == ("mps", torch.float32)
        assert out.shape == {"fbank": (2, 1, 30, 8), "log-mel": (2, 1, 21, 8), "standardise": (2, 1, 3200)}[kind]


def test_a_published_front_end_warns_of_nothing(tmp_path):
    """Of AST's 128 bands one is empty, as its owners have it."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ASTConfig(architectures=["ASTModel"], **shape).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.ASTFeatureExtractor().save_pretrained(tmp_path)
    audio = AudioModality(encoder=f"hf:{tmp_path}", cut="adapter")
    settings = described_encoders(Settings(cache=CacheSettings(random_weights=True), modalities={"audio": audio}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = build_encoder("audio", settings.modalities["audio"])
    empty = encoder.stages["input"].filters.sum(0) == 0
    assert int(empty.sum()) == 1
