"""Models as files that are run: ONNX by onnxruntime, TorchScript and exported programs by torch; one input, frozen.

Letters: N rows (clips, frames or windows) that pass together.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import torch
from torch import nn

from mbcd_cli.encoders.formats import import_optional
from mbcd_cli.errors import FOREIGN, CheckpointError, lines_of

Axes = tuple[int | None, ...]
"""Length of every axis of an input; None where any will do."""


class ModelFile(nn.Module):
    """A model from a file: one input [N, ...], of which the first output [N, ...] is taken.

    Attributes:
        file: it came from.
        axes: of its input, as far as the file tells; None where it tells nothing.
    """

    def __init__(self, file: Path, axes: Axes | None) -> None:
        super().__init__()
        self.file, self.axes = file, axes

    def __deepcopy__(self, memo: object) -> ModelFile:
        return self  # it is frozen, and sessions cannot be copied

    def train(self, mode: bool = True) -> ModelFile:
        """As it is: what is exported has one mode."""
        return self

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [N, ...], N as the file has it."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [N, ...] float32."""
        self._check(x)
        rows = self.axes[0] if self.axes else None
        pieces = [self._out(x[at : at + rows]) for at in range(0, len(x), rows)] if rows else [self._out(x)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _out(self, x: torch.Tensor) -> torch.Tensor:
        try:
            out = self.run(x)
        except Exception as error:  # onnxruntime's own kinds have no common class
            raise CheckpointError(
                f"{self.file}: the model cannot take {shape_text(x.shape)}: {lines_of(error)[-1]}",
                f"Say in {self.file.name}.toml what it takes.",
            ) from error
        while isinstance(out, Sequence) and len(out):
            out = out[0]
        if isinstance(out, dict):
            out = next(iter(out.values()))
        if not isinstance(out, torch.Tensor) or out.dim() < 1 or len(out) != len(x):
            held = shape_text(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise CheckpointError(
                f"{self.file}: of {len(x)} inputs the model makes {held}, not as many rows.",
                "Export a model whose first output has a row per input.",
            )
        return out.float()

    def _check(self, x: torch.Tensor) -> None:
        fits = self.axes is None or (
            len(self.axes) == x.dim()
            and all(axis in (None, size) for axis, size in zip(self.axes[1:], x.shape[1:], strict=True))
            and (self.axes[0] or 1) == 1
        )
        if not fits:
            raise CheckpointError(
                f"{self.file}: the model takes {shape_text(self.axes)}, and gets {shape_text((None, *x.shape[1:]))}.",
                f"Say in {self.file.name}.toml what it takes (size, frames, axes, samples); its first axis must "
                "be free, or 1.",
            )


def shape_text(axes: Sequence[int | None]) -> str:
    """A shape as messages give it: [N, 3, 224, 224]."""
    return "[" + ", ".join("N" if axis is None else str(axis) for axis in axes) + "]"


class OnnxModel(ModelFile):
    """An ONNX file, run by onnxruntime on the processor.

    Raises:
        SettingsError: onnxruntime is not installed. CheckpointError: it is no such file, or takes other inputs than
            one of numbers.
    """

    def __init__(self, file: Path) -> None:
        onnxruntime = import_optional("onnxruntime", "onnx")
        try:
            session = _session(onnxruntime, file)
        except Exception as error:  # onnxruntime's own kinds have no common class
            raise CheckpointError(
                f"{file}: onnxruntime cannot read it: {lines_of(error)[-1]}", "Export the model to ONNX again."
            ) from error
        inputs = session.get_inputs()
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
        if len(inputs) != 1 or inputs[0].type not in types:
            held = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise CheckpointError(
                f"{file}: the model takes {held or 'nothing'}, not one tensor of numbers.",
                "Export it with one input: frames, or sound.",
            )
        super().__init__(file, tuple(axis if isinstance(axis, int) else None for axis in inputs[0].shape) or None)
        self._session, self._name, self._type = session, inputs[0].name, types[inputs[0].type]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [N, ...]."""
        out = self._session.run(None, {self._name: x.cpu().numpy().astype(self._type, copy=False)})[0]
        return torch.from_numpy(np.array(out, np.float32)).to(x.device)

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Floating-point operations of every operator in `_PRODUCTS` that meanwhile runs; in the list at the end."""
        plain, flops = self._session, []
        with TemporaryDirectory() as folder:
            onnxruntime = import_optional("onnxruntime", "onnx")
            self._session = _session(onnxruntime, self.file, trace=Path(folder) / "trace")
            try:
                yield flops
            finally:
                trace, self._session = Path(self._session.end_profiling()), plain
            for event in json.loads(trace.read_text(encoding="utf-8")):
                told = event.get("args", {})
                if count := _PRODUCTS.get(told.get("op_name")):
                    inputs, outputs = (
                        [tuple(axes) for held in told[f"{side}_type_shape"] for axes in held.values()]
                        for side in ("input", "output")
                    )
                    flops.append(2 * count(inputs, outputs[0]))


def external_files(file: Path) -> list[Path]:
    """The files beside an ONNX model that hold tensors of it, as the model names them under `location`.

    A protobuf message tells key and value as fields 1 and 2 (tags 10 and 18), each behind its length.
    """
    with file.open("rb") as stream:
        if not file.stat().st_size:
            return []
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
            # A name has at most 255 bytes; a length of 128 and more takes two, the first with its highest bit set.
            told = [
                (found.end(), (found[1][0] & 127) + ((len(found[1]) - 1) << 7))
                for found in re.finditer(rb"\n\x08location\x12([\x80-\xff]\x01|[\x01-\x7f])", held)
            ]
            names = {os.fsdecode(held[at : at + length]) for at, length in told}
    return sorted(data for data in (file.parent / name for name in names if "\0" not in name) if data.is_file())


def _session(onnxruntime: ModuleType, file: Path, trace: Path | None = None):
    """What runs an ONNX file; with a `trace`, as its graph is written, every operator's shapes told in a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4  # what fails is told as an error
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _recurrent(inputs: list[tuple[int, ...]], _: tuple[int, ...]) -> int:
    steps, rows = inputs[0][:2]
    return steps * rows * (prod(inputs[1]) + prod(inputs[2]))


_PRODUCTS: Mapping[str, Callable[[list[tuple[int, ...]], tuple[int, ...]], int]] = {
    "Conv": lambda inputs, out: prod(out) * prod(inputs[1][1:]),
    "ConvTranspose": lambda inputs, out: prod(inputs[0]) * prod(inputs[1][1:]),
    "Gemm": lambda inputs, out: prod(inputs[0]) * out[1],
    "MatMul": lambda inputs, out: prod(out) * inputs[0][-1],
    **dict.fromkeys(("RNN", "GRU", "LSTM"), _recurrent),
}
"""Operator of ONNX -> (shapes of inputs, shape of the output) -> its products, each summed."""


class TorchModel(ModelFile):
    """A TorchScript file (`torch.jit.save`) or an exported program (`torch.export.save`), run by torch.

    Raises:
        CheckpointError: it is no such file, or an exported program that takes other inputs than one.
    """

    def __init__(self, file: Path, *, exported: bool) -> None:
        super().__init__(file, None)
        self.module, self.axes = _exported(file) if exported else (_script(file), None)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [N, ...]."""
        return self.module(x)


def _script(file: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would have it exported instead
            return torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, *FOREIGN, OSError) as error:
        raise CheckpointError(
            f"{file}: is no TorchScript file{_made_by_save(file)}; nothing of it was executed.",
            "Store the model with torch.jit.save(torch.jit.script(model), FILE), or export it.",
        ) from error


def _exported(file: Path) -> tuple[nn.Module, Axes]:
    remedy = "Store the model with torch.export.save(torch.export.export(model, inputs), FILE)."
    try:
        with zipfile.ZipFile(file) as archive:
            if pickled := [name for name in archive.namelist() if "_obj_" in name]:
                raise CheckpointError(f"{file}: holds a pickled object ({pickled[0]}); nothing was executed.", remedy)
        with _tensors_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(file))
    except (RuntimeError, pickle.UnpicklingError, *FOREIGN, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file}: is no exported program{_made_by_save(file)}; no pickle in it was executed.", remedy
        ) from error
    inputs = [value.meta["val"] for value in program.graph.nodes if value.name in program.graph_signature.user_inputs]
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
        shapes = [shape_text(value.shape) if isinstance(value, torch.Tensor) else "no tensor" for value in inputs]
        taken = ", ".join(shapes) or "nothing"
        raise CheckpointError(f"{file}: the program takes {taken}, not one tensor.", "Export a model of one input.")
    return program.module(), tuple(axis if isinstance(axis, int) else None for axis in inputs[0].shape)


def _made_by_save(file: Path) -> str:
    """Says so of a file that `torch.save` made, which is a pickle."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return ""
    pickled = any(name.endswith("/data.pkl") for name in names)
    return " but what torch.save makes, a pickle" if pickled and not any("/code/" in name for name in names) else ""


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Whatever torch unpickles meanwhile holds tensors and numbers only; `torch.export.load` itself allows anything."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
