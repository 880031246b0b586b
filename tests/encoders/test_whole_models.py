"""Models from one file: what their inputs mean is told beside them, and they run as their owners run them."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mbcd_cli.encoders import described_encoders
from mbcd_cli.encoders.model_files import OnnxModel
from mbcd_cli.errors import CheckpointError, MbcdError, SettingsError
from mbcd_cli.preparation.identity import passports
from mbcd_cli.preparation.trunk import build_trunk
from mbcd_cli.resolved import validate

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
FRAMES = {
    "kind": "video",
    "axes": "BCHW",
    "per_frame": True,
    "size": [8, 8],
    "colour": "RGB",
    "values": [0.0, 1.0],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "pooling": "mean",
    "dim": 4,
}
SOUND = {"kind": "audio", "axes": "BS", "sample_rate": 8000, "samples": 96, "values": [-1, 1], "pooling": "mean"}
WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4) - 5


def onnx_file(path: Path, inputs: dict, nodes: list, constants: dict[str, np.ndarray]) -> Path:
    """An ONNX model: input name -> axes (text where free), nodes (operator, inputs, output, attributes), constants."""
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, into, [out], **attributes) for kind, into, out, attributes in nodes],
        "g",
        [tensor(name, onnx.TensorProto.FLOAT, axes) for name, axes in inputs.items()],
        [tensor(nodes[-1][2], onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(made, path)
    return path


def means(path: Path, axes=("N", 3, 8, 8), over=(2, 3)) -> Path:
    """The mean of every channel, by `WEIGHTS`: [N, 3, 8, 8] -> [N, 4]."""
    nodes = [("ReduceMean", ["x"], "m", {"axes": list(over), "keepdims": 0}), ("MatMul", ["m", "w"], "y", {})]
    return onnx_file(path, {"x": list(axes)}, nodes, {"w": WEIGHTS})


def told(file: Path, wants: dict) -> Path:
    file.with_name(f"{file.name}.toml").write_text(tomli_w.dumps(wants))
    return file


def frozen(file: Path, scheme: str = "onnx", *, kind: str = "video", cut: str = "adapter", **given):
    modality = {"kind": kind, "encoder": f"{scheme}:{file.name}", "cut": cut} | given
    settings = described_encoders(validate({"modalities": {"m": modality}, "cache": {"weights_dir": file.parent}}))
    return build_trunk(settings, "m", settings.modalities["m"]), settings.modalities["m"]


def pixels(frames: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 3, frames, 8, 8)).astype(np.uint8))


def expected(x: torch.Tensor, wants: dict = FRAMES) -> np.ndarray:
    """The means of the normalised frames by `WEIGHTS`, [B, T, 4]."""
    mean, std = (np.array(wants[key]).reshape(1, 3, 1, 1, 1) for key in ("mean", "std"))
    return ((x.numpy() / 255 - mean) / std).mean((3, 4)).transpose(0, 2, 1) @ WEIGHTS


def test_frames_one_by_one_through_onnx(tmp_path):
    made, modality = frozen(told(means(tmp_path / "m.onnx"), FRAMES), frames=3)
    assert (modality.crop, modality.frames) == (8, 3)
    (out,) = made.trunk((pixels(),))
    np.testing.assert_allclose(out.numpy(), expected(pixels()).mean(1), rtol=1e-4, atol=1e-4)
    assert made.passport.wants.dim == 4


@pytest.mark.parametrize(
    ("pooling", "dim", "pool"),
    [
        ("max", 4, lambda rows: rows.max(1)),
        ("mean+max", 8, lambda rows: np.concatenate([rows.mean(1), rows.max(1)], 1)),
    ],
)
def test_pooling_over_frames_and_fixed_batches(tmp_path, pooling, dim, pool):
    file = told(means(tmp_path / "m.onnx", axes=(1, 3, 8, 8)), FRAMES | {"pooling": pooling, "dim": dim})
    made, _ = frozen(file, frames=3)
    np.testing.assert_allclose(made.trunk((pixels(),))[0].numpy(), pool(expected(pixels())), rtol=1e-4, atol=1e-4)


def test_first_token_and_positions(tmp_path):
    # The places of the first row of pixels are tokens: [N, 3, 8, 8] -> [N, 8, 3], features last.
    nodes = [
        ("ReduceMean", ["x"], "m", {"axes": [2], "keepdims": 0}),
        ("Transpose", ["m"], "y", {"perm": [0, 2, 1]}),
    ]
    file = onnx_file(tmp_path / "m.onnx", {"x": ["N", 3, 8, 8]}, nodes, {})
    x = pixels()
    mean, std = (torch.tensor(FRAMES[key]).reshape(1, 3, 1, 1, 1) for key in ("mean", "std"))
    tokens = ((x.double() / 255 - mean) / std).mean(3)
    for pooling, wanted in (("first", tokens[..., 0].mean(2)), ("mean", tokens.mean((2, 3)))):
        made, _ = frozen(told(file, FRAMES | {"gives": "BLD", "pooling": pooling, "dim": 3}), frames=3)
        torch.testing.assert_close(made.trunk((x,))[0].double(), wanted, rtol=1e-4, atol=1e-4)


def test_blue_first_and_channels_last(tmp_path):
    wants = FRAMES | {"axes": "BHWC", "colour": "BGR"}
    made, modality = frozen(told(means(tmp_path / "m.onnx", axes=("N", 8, 8, 3), over=(1, 2)), wants), frames=3)
    assert modality.mean == pytest.approx((0.3 * 255, 0.4 * 255, 0.5 * 255))  # of red, green, blue
    out = made.trunk((pixels(),))[0].numpy()
    np.testing.assert_allclose(out, expected(pixels().flip(1)).mean(1), rtol=1e-4, atol=1e-4)


def test_sound_through_a_front_end_in_windows(tmp_path):
    front = [("Reshape", ["x", "shape"], "y", {})]
    onnx_file(tmp_path / "front.onnx", {"x": ["N", "S"]}, front, {"shape": np.array([0, -1, 3], np.int64)})
    wants = SOUND | {"axes": "BTC", "values": [-10, 10], "dim": 4, "pooling": "max"}
    wants["front_end"] = {"file": "front.onnx", "gives": "BTC", "scale": 2.0, "offset": 1.0, "window": 8, "step": 4}
    made, modality = frozen(told(means(tmp_path / "m.onnx", ("N", 8, 3), over=(1,)), wants), kind="audio")
    assert (modality.front_end, modality.sample_rate, modality.samples) == ("waveform", 8000, 96)
    x = torch.rand(2, 1, 96) * 2 - 1
    steps = x.numpy().reshape(2, 32, 3) * 20 + 1
    windows = np.stack([steps[:, at : at + 8].mean(1) @ WEIGHTS for at in range(0, 25, 4)], 1)
    np.testing.assert_allclose(made.trunk((x,))[0].numpy(), windows.max(1), rtol=1e-4, atol=1e-4)
    assert made.source.file.name == "m.onnx"
    alone = made.source.sha256
    front = [("Reshape", ["x", "shape"], "z", {}), ("Neg", ["z"], "y", {})]  # it is part of the weights
    onnx_file(tmp_path / "front.onnx", {"x": ["N", "S"]}, front, {"shape": np.array([0, -1, 3], np.int64)})
    assert frozen(tmp_path / "m.onnx", kind="audio")[0].source.sha256 != alone


class Clip(nn.Module):
    """[N, 3, 2, 8, 8] -> [N, 5]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv3d(3, 5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x).mean((2, 3, 4))


CLIP = {key: value for key, value in FRAMES.items() if key != "per_frame"} | {"axes": "BCTHW", "frames": 2, "dim": 5}


@pytest.mark.parametrize("form", ["torchscript", "export one", "export any"])
def test_torch_files_run_as_the_module(tmp_path, form):
    model, file = Clip().eval(), tmp_path / "m.pt2"
    if form == "torchscript":
        torch.jit.save(torch.jit.script(model), file)
    else:
        free = {"x": {0: torch.export.Dim("n")}} if form == "export any" else None
        rows = 2 if free else 1
        torch.export.save(torch.export.export(model, (torch.zeros(rows, 3, 2, 8, 8),), dynamic_shapes=free), file)
    made, _ = frozen(told(file, CLIP), form.split()[0])
    mean, std = (torch.tensor(CLIP[key]).reshape(1, 3, 1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = model((pixels(2) / 255 - mean) / std)
    torch.testing.assert_close(made.trunk((pixels(2),))[0], wanted, rtol=1e-4, atol=1e-5)
    assert made.passport.parameters == 3 * 8 * 5 + 5


def refused(file: Path, *words: str, scheme: str = "onnx", error: type[MbcdError] = CheckpointError, **given) -> None:
    with pytest.raises(error) as caught:
        frozen(file, scheme, **given)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy


def test_what_is_not_told_is_asked_for(tmp_path):
    file = means(tmp_path / "m.onnx")
    refused(
        file, "m.onnx.toml", "kind, axes, size, colour, values, mean, std, pooling, dim, frames", "docs/encoders.md"
    )
    refused(told(file, {k: v for k, v in FRAMES.items() if k != "colour"}), "says nothing of colour")
    refused(told(file, FRAMES | {"colours": "RGB"}), "there is no 'colours'", "colour")
    refused(told(file, FRAMES | {"colour": "GBR"}), "colour", "'RGB' or 'BGR'")
    refused(told(file, FRAMES | {"pooling": "median"}), "median", "mean+max")
    for fault, word in (
        ({"kind": ["video"]}, "kind"),
        ({"gives": "BB"}, "an axis stands twice in BB"),
        ({"axes": "CBHW"}, "B comes first in CBHW"),
        ({"gives": "LBD"}, "B comes first in LBD"),
        ({"values": [1.0, 0.0]}, "the smallest comes first"),
        ({"mean": [0.5]}, "mean has 1 values, and video 3"),
        ({"std": [0.2, 0.0, 0.4]}, "std.1"),
        ({"size": [8, -8]}, "size.1"),
        ({"front_end": {"file": "../front.onnx"}}, "file"),
        ({"front_end": {"file": "f.onnx", "windows": 3}}, "there is no 'windows'"),
        ({"front_end": {"file": "f.onnx", "step": 0}}, "step"),
        ({"front_end": {"file": "f.onnx", "gives": "BC"}}, "gives"),
        ({"front_end": {"file": "f.onnx", "scale": float("nan")}}, "scale"),
    ):
        refused(told(file, FRAMES | fault), "m.onnx.toml: ", word)
    file.with_name("m.onnx.toml").write_text("kind = ")
    refused(file, "m.onnx.toml: cannot be read")
    refused(tmp_path / "gone.onnx", "gone.onnx", "not there")


class Forgetful(nn.Module):
    """What depends on train mode: half of the features is dropped, or the batch's statistics are taken."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.linear = part, nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.part(x).relu().mean((2, 3)))


@pytest.mark.parametrize("part", [nn.Dropout(), nn.BatchNorm2d(3)], ids=["dropout", "batch norm"])
def test_what_was_exported_in_train_mode_is_refused(tmp_path, part):
    file = told(tmp_path / "m.pt", FRAMES)
    for train in (False, True):
        made = torch.jit.trace(Forgetful(part).train(train), torch.randn(2, 3, 8, 8), check_trace=False)
        torch.jit.save(made, str(file))
        if train:
            refused(file, "m.pt: ", "train mode", "model.eval()", scheme="torchscript", frames=3)
        else:
            frozen(file, "torchscript", frames=3)


def test_data_beside_an_onnx_file_are_its_weights_whatever_they_are_called(tmp_path):
    file = told(means(tmp_path / "m.onnx"), FRAMES)
    whole = onnx.load(file)
    onnx.save(whole, file, save_as_external_data=True, location="tensors.bin", size_threshold=10)
    before, _ = frozen(file, frames=3)
    (tmp_path / "tensors.bin").write_bytes((WEIGHTS + 1).tobytes())
    after, _ = frozen(file, frames=3)
    assert not torch.equal(before.trunk((pixels(),))[0], after.trunk((pixels(),))[0])
    assert before.source.sha256 != after.source.sha256


def test_pooling_over_frames_is_said_in_the_file_beside_it(tmp_path):
    file = told(means(tmp_path / "m.onnx"), FRAMES)
    refused(file, "frame_pooling", "m.onnx.toml", "pooling", frame_pooling="max", error=SettingsError)


def test_other_inputs_than_promised(tmp_path):
    file = means(tmp_path / "m.onnx")
    refused(told(file, FRAMES | {"size": [16, 16]}), "takes [N, 3, 8, 8], and gets [N, 3, 16, 16]", "m.onnx.toml")
    refused(told(file, FRAMES | {"axes": "BHWC"}), "takes [N, 3, 8, 8], and gets [N, 8, 8, 3]")
    refused(told(file, FRAMES | {"axes": "BCTHW"}), "gets [N, 3, 1, 8, 8]")
    refused(told(file, FRAMES | {"axes": "BHW"}), "m.onnx.toml: axes are said to be BCHW, of which BHW")
    refused(told(file, FRAMES | {"dim": 7}), "makes 4 features a clip", "promises 7", "dim = 4")
    refused(told(file, FRAMES | {"gives": "BDHW"}), "said to be BDHW", "[")
    both = [("Add", ["a", "b"], "y", {})]
    onnx_file(tmp_path / "two.onnx", {"a": ["N", 3], "b": ["N", 3]}, both, {})
    refused(told(tmp_path / "two.onnx", FRAMES), "two.onnx: the model takes a tensor(float)", "b tensor(float)")
    halves = [("Reshape", ["x", "shape"], "y", {})]
    onnx_file(tmp_path / "odd.onnx", {"x": ["N", "S"]}, halves, {"shape": np.array([-1, 1000], np.int64)})
    refused(told(tmp_path / "odd.onnx", SOUND | {"dim": 4}), "odd.onnx: the model cannot take [1, 96]", kind="audio")
    (tmp_path / "text.onnx").write_text("no model")
    refused(told(tmp_path / "text.onnx", FRAMES), "text.onnx: onnxruntime cannot read it")
    refused(told(file, FRAMES), "nothing of a whole model trains", cut="input", error=SettingsError)


def test_settings_that_contradict_it_are_named_together(tmp_path):
    file = told(means(tmp_path / "m.onnx"), FRAMES)
    given = {"crop": 4, "short_side": 8, "mean": (0.5, 0.4, 0.3)}
    refused(file, "modalities.m.crop is 4", "wants 8", "modalities.m.mean", error=SettingsError, **given)
    sound = told(onnx_file(tmp_path / "s.onnx", {"x": ["N", 96]}, [("Neg", ["x"], "y", {})], {}), SOUND | {"dim": 96})
    refused(sound, "modalities.m.sample_rate is 16000", "8000", kind="audio", sample_rate=16000, error=SettingsError)
    refused(sound, "reads audio, and m is video", kind="video", error=SettingsError)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("scheme", ["torchscript", "export"])
def test_pickles_are_refused_and_nothing_is_executed(tmp_path, monkeypatch, scheme):
    monkeypatch.chdir(tmp_path)
    file = told(tmp_path / "m.pt", CLIP)
    torch.save({"model": Hostile()}, file)
    refused(file, "m.pt: is no", "what torch.save makes, a pickle", "executed", scheme=scheme)
    file.write_bytes(pickle.dumps(Hostile()))
    refused(file, "m.pt: is no", scheme=scheme)
    assert not Path("executed").exists()


def test_pickles_inside_an_exported_program(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(Clip().eval(), (torch.zeros(1, 3, 2, 8, 8),)), "whole.pt2")
    with zipfile.ZipFile("whole.pt2") as source, zipfile.ZipFile("m.pt2", "w") as target:
        for name in source.namelist():
            sample = "sample_inputs" in name
            if sample:
                torch.save(Hostile(), "hostile.pt")
            target.writestr(name, Path("hostile.pt").read_bytes() if sample else source.read(name))
    refused(told(tmp_path / "m.pt2", CLIP), "m.pt2: is no exported program", scheme="export")
    with zipfile.ZipFile("m.pt2", "a") as target:
        target.writestr("m/data/constants/opaque_obj_0", pickle.dumps(Hostile()))
    refused(tmp_path / "m.pt2", "holds a pickled object", scheme="export")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("kind", "layer", "shape", "attributes"),
    [
        ("Conv", nn.Conv2d(4, 6, (3, 2), stride=2, groups=2), (2, 4, 13, 12), {"strides": [2, 2], "group": 2}),
        ("ConvTranspose", nn.ConvTranspose1d(6, 8, 3, stride=2, groups=2), (2, 6, 9), {"strides": [2], "group": 2}),
        ("Gemm", nn.Linear(7, 5), (3, 7), {"transB": 1}),
        ("MatMul", nn.Linear(7, 5), (2, 9, 7), {}),
        ("GRU", nn.GRU(7, 5, bidirectional=True), (9, 2, 7), {"hidden_size": 5, "direction": "bidirectional"}),
        ("RNN", nn.RNN(7, 5), (9, 2, 7), {"hidden_size": 5}),
    ],
)
def test_operations_are_as_many_as_torch_counts(tmp_path, kind, layer, shape, attributes):
    if kind in ("GRU", "RNN"):
        weights = [[w for name, w in layer.named_parameters() if f"weight_{of}" in name] for of in ("ih", "hh")]
        constants = [torch.stack(both) for both in weights]
    else:
        constants = [layer.weight.T if kind == "MatMul" else layer.weight]
    named = {f"w{at}": value.detach().numpy() for at, value in enumerate(constants)}
    nodes = [(kind, ["x", *named], "m", attributes), ("Relu", ["m"], "y", {})]
    model = OnnxModel(onnx_file(tmp_path / "m.onnx", {"x": [None] * len(shape)}, nodes, named))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.zeros(shape))
    with model.counted() as flops:
        model.run(torch.zeros(shape))
    assert flops == [counter.get_total_flops()]


def test_passports_tell_the_operations_of_all_frames(tmp_path):
    told(means(tmp_path / "m.onnx"), FRAMES | {"frames": 3})
    modality = {"kind": "video", "encoder": "onnx:m.onnx", "cut": "adapter"}
    settings = validate({"modalities": {"m": modality}, "cache": {"weights_dir": tmp_path}})
    assert passports(settings)["m"].gflop == pytest.approx(2 * 3 * 3 * 4 / 1e9)  # 3 frames of 3 means by 4 features


def test_a_missing_package_names_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(told(means(tmp_path / "m.onnx"), FRAMES), "onnxruntime", "--group onnx", error=SettingsError)


def test_random_weights_are_none(tmp_path):
    file = told(means(tmp_path / "m.onnx"), FRAMES)
    modality = {"kind": "video", "encoder": "onnx:m.onnx", "cut": "adapter"}
    cache = {"weights_dir": file.parent, "random_weights": True}
    settings = described_encoders(validate({"modalities": {"m": modality}, "cache": cache}))
    with pytest.raises(CheckpointError, match="has no random weights"):
        build_trunk(settings, "m", settings.modalities["m"])
