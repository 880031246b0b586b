"""One streaming pass of a model over batches: logits of fused and uni-modal heads, and optionally features.

Letters: N clips, C classes, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.errors import MbcdError
from mbcd_cli.model import MultiModalModel

Variant = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Features of one batch (each [B, D_k]) -> other fused logits [B, C] from the same pass of the tails."""

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model says about N clips, all on the CPU and in the order the batches came.

    Attributes:
        labels: [N] int64.
        domains: [N] int64, indices into the dataset's domain list.
        clips: [N] int64, indices into the dataset's clip table.
        fused: [N, C] float32 logits of the fused head.
        unimodal: per modality [N, C] float32 logits of its own head.
        features: per modality [N, D_k] float32 normalised pooled features, or None when not asked for.
        variants: further fused logits [N, C] float32 from the same features, by name.
    """

    labels: torch.Tensor
    domains: torch.Tensor
    clips: torch.Tensor
    fused: torch.Tensor
    unimodal: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor] | None = None
    variants: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def heads(self) -> dict[str, torch.Tensor]:
        """Logits [N, C] of the fused head ("fused"), then of every modality's own (by its name)."""
        return {"fused": self.fused, **self.unimodal}

    def rows(self, index: torch.Tensor) -> Predictions:
        """The clips that `index` (positions [n], or a mask [N] bool) selects, in its order."""
        return Predictions(
            labels=self.labels[index],
            domains=self.domains[index],
            clips=self.clips[index],
            fused=self.fused[index],
            unimodal={name: logits[index] for name, logits in self.unimodal.items()},
            features=None if self.features is None else {n: f[index] for n, f in self.features.items()},
            variants={name: logits[index] for name, logits in self.variants.items()},
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module has the mode it had, whatever mixture that was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def autocast(device: torch.device, precision: str):
    """The autocast context of `precision`: none for float32, else bfloat16 or float16 on `device`."""
    if precision == "float32":
        return nullcontext()
    if precision not in _AUTOCAST:
        raise MbcdError(f"There is no precision {precision!r}.", "Use float32, bfloat16 or float16.")
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


@torch.no_grad()
def predict(
    model: MultiModalModel,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    precision: str = "float32",
    features: bool = False,
    variants: Mapping[str, Variant] | None = None,
) -> Predictions:
    """Run `model` over `batches` in eval mode, without gradients or dropout; the module modes are restored.

    Args:
        model: on `device` already.
        batches: as the dataset gives them; any number, of any sizes, consumed once.
        device: where the model is.
        precision: float32, or bfloat16 / float16 autocast; what is returned is float32 always.
        features: also keep the normalised pooled features (memory then grows with N times sum D_k).
        variants: name -> function of the features that gives other fused logits (a modality missing, say).

    Raises:
        MbcdError: `batches` holds no clip.
    """
    device = torch.device(device)
    meta: tuple[list, list, list] = ([], [], [])
    fused: list[torch.Tensor] = []
    unimodal: dict[str, list[torch.Tensor]] = {name: [] for name in model.modalities}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in model.modalities}
    varied: dict[str, list[torch.Tensor]] = {name: [] for name in variants or {}}
    with evaluating(model), autocast(device, precision):
        for batch in batches:
            if len(batch) == 0:
                continue
            for store, values in zip(meta, (batch.labels, batch.domains, batch.clips), strict=True):
                store.append(values.to("cpu", torch.int64))
            hidden = model.features(model.at_cut(batch.to(device).inputs))
            fused.append(model.fuse(hidden).to("cpu", torch.float32))
            for name, logits in model.unimodal(hidden).items():
                unimodal[name].append(logits.to("cpu", torch.float32))
            for name, variant in (variants or {}).items():
                varied[name].append(variant(hidden).to("cpu", torch.float32))
            if features:
                for name, values in hidden.items():
                    kept[name].append(values.to("cpu", torch.float32))
    if not fused:
        raise MbcdError(
            "There are no clips to evaluate.",
            "Check the domains and splits that were asked for: `mbcd list` shows what the cache holds.",
        )
    labels, domains, clips = (torch.cat(store) for store in meta)
    return Predictions(
        labels=labels,
        domains=domains,
        clips=clips,
        fused=torch.cat(fused),
        unimodal={name: torch.cat(parts) for name, parts in unimodal.items()},
        features={name: torch.cat(parts) for name, parts in kept.items()} if features else None,
        variants={name: torch.cat(parts) for name, parts in varied.items()},
    )
