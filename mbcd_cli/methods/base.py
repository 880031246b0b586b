"""What a method is: how a batch becomes gradients. ERM is the class as it is.

Letters: B clips (of this process, where several share the batch), M modalities, C classes, D_k features of modality k,
S source domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.staged import Noise
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.parts import cross_entropy, full_precision
from mbcd_cli.model import MultiModalModel, TailWeights
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.randomness import Randomness
from mbcd_cli.settings import MethodSettings

Figures = dict[str, torch.Tensor]
"""What one step computed, by name: tensors on the device without a graph, [] or (one value per modality) [M]."""
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Outputs:
    """One forward pass of the student.

    Attributes:
        pooled: modality -> pooled features before the norm, [B, D_k].
        features: modality -> after it, [B, D_k]; what the heads read.
        unimodal: modality -> logits of its own head, [B, C].
        fused: logits of the fused head, [B, C].
    """

    pooled: Mapping[str, torch.Tensor]
    features: Mapping[str, torch.Tensor]
    unimodal: Mapping[str, torch.Tensor]
    fused: torch.Tensor


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the loss: its value, [] or [M], and what it is multiplied with (a tensor [] or [M], too)."""

    value: torch.Tensor
    weight: float | torch.Tensor = 1.0


def total(terms: Mapping[str, Term]) -> torch.Tensor:
    """The sum of all terms (of all their modalities) times their weights, [].

    Raises:
        SettingsError: they are no terms, or none.
    """
    _check_terms(terms)
    loss: torch.Tensor | None = None
    for term in terms.values():
        value, weight = term.value, term.weight
        if isinstance(weight, torch.Tensor) and weight.dim():
            value, weight = weight * value, 1
        value = value.sum() if value.dim() else value
        if isinstance(weight, torch.Tensor) or weight != 1:
            value = weight * value
        loss = value if loss is None else loss + value
    return loss


def _check_terms(terms: object) -> None:
    what = ""
    if not isinstance(terms, Mapping) or not terms:
        what = "an empty one" if isinstance(terms, Mapping) else type(terms).__name__
    else:
        for name, term in terms.items():
            if not isinstance(term, Term):
                what = f"{name!r}, which is {type(term).__name__}"
            elif not isinstance(term.value, torch.Tensor):
                what = f"{name!r}, whose value is {type(term.value).__name__}"
    if what:
        raise SettingsError(
            f"The losses of a method are a dict of names and Terms of tensors; there is {what}.",
            "Let `losses` return such as super().losses(batch, out) | {'mine': Term(value, weight)}.",
        )


class WeightAverage(Protocol):
    """What a method may ask of the average of the student's weights."""

    model: MultiModalModel
    """The averaged model, in eval mode; its uni-modal heads are not averaged."""
    start: int
    """Step from which weights are averaged; until then the average is a copy of the student."""

    def follow(self, module: AnyModule) -> AnyModule:
        """A copy of one of the method's own modules, to be kept by the method, that is averaged like the model."""


class EpochClips(Protocol):
    """What a method may read before an epoch (`Method.before_epoch`); batches are as `Method.gradients` gets them."""

    seed: int
    """The training's."""
    batches: int
    """How many an epoch has."""

    def training(self, ahead: int = 0) -> Iterator[Batch]:
        """The epoch's batches (or those `ahead` epochs later), in its order: of several processes each one's rows."""

    def validation(self) -> Iterator[Batch]:
        """The test split of the source domains, in test views; all of it in every process."""

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A new one, of the training's kind and settings."""

    def train_mode(self, model: MultiModalModel) -> None:
        """Put a copy of the student in train mode, batch norms as the training has them."""


@dataclass(frozen=True, slots=True)
class EncoderFactors:
    """What every encoder's part of an optimizer's step is multiplied with.

    Attributes:
        value: of each modality, [M]; of all members of a population [K, M].
        only: modality -> names of the parameters of its tail that are meant; None: all that train.
    """

    value: torch.Tensor
    only: Mapping[str, Sequence[str]] | None = None

    def parameters(self, model: MultiModalModel) -> list[tuple[torch.Tensor, int]]:
        """(parameter, number of its modality) of all that are multiplied."""
        return [
            (value, k)
            for k, (name, weights) in enumerate(model.theta().items())
            for key, value in weights.items()
            if self.only is None or key in self.only[name]
        ]


@dataclass(slots=True)
class Context:
    """What a method works on. It is lent: nothing in it belongs to the method's own modules.

    Attributes:
        model: the student.
        randomness: source of every draw but nn.Dropout's.
        average: the weight average, where there is one.
        precision: float32, or bfloat16 (autocast; weights and losses stay float32).
        group: the processes that share the batch; a statistic of the batch is one of all of them together.
        sources: index of each source domain in the dataset's list, [S].
        epoch: epochs finished, [] on the device, so that a captured step reads it anew.
        step: the step that is being done, the first being 1, [] on the device.
        factors: what the optimizer's changes of the encoders are multiplied with in this step (`modulate`).
    """

    model: MultiModalModel
    randomness: Randomness
    average: WeightAverage | None
    precision: str
    group: Group
    sources: torch.Tensor
    epoch: torch.Tensor
    step: torch.Tensor
    factors: EncoderFactors | None = None

    @staticmethod
    def of(
        model: MultiModalModel,
        *,
        randomness: Randomness,
        average: WeightAverage | None = None,
        precision: str = "float32",
        group: Group = ALONE,
        sources: Sequence[int] = (0,),
    ) -> Context:
        """The context of a training that begins, with counters on the model's device."""
        device = next(model.parameters()).device
        zeros = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
        return Context(
            model=model,
            randomness=randomness,
            average=average,
            precision=precision,
            group=group,
            sources=torch.tensor(list(sources), device=device),
            epoch=zeros[0],
            step=zeros[1],
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, [], to what `gradient` gives of every parameter."""
        loss.backward()

    def gradients(
        self,
        loss: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        *,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> list[torch.Tensor]:
        """The gradient of `loss`, [], with respect to each parameter (zeros where it does not depend on it)."""
        if not parameters:
            return []
        return list(
            torch.autograd.grad(
                loss, parameters, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
            )
        )

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        """What the optimizer will take for the gradient of `parameter`, both [*] (zeros where nothing was added)."""
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def set_gradient(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Have the optimizer take `gradient` for that of `parameter`, both [*]."""
        parameter.grad = gradient

    def modulate(
        self,
        factors: torch.Tensor,
        *,
        of: Literal["gradient", "update"],
        only: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Multiply what each encoder takes of this step; after `backward`.

        Args:
            factors: of each modality in fusion order, [M], the same in all processes.
            of: the gradient as it is now (Adam, which divides by the gradient's size, undoes most of that), or the
                optimizer's change of the weights, its decay included: a learning rate of each modality.
            only: as `EncoderFactors.only`.
        """
        chosen = EncoderFactors(factors.detach(), only)
        if of == "update":
            self.factors = chosen
            return
        for parameter, k in chosen.parameters(self.model):
            self.set_gradient(parameter, self.gradient(parameter) * chosen.value[k])

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes: bfloat16 where `precision` says so."""
        return torch.autocast(self.step.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def source_domains(self, batch: Batch) -> torch.Tensor:
        """Each clip's domain as a number from 0 to S - 1, [B]."""
        return (batch.domains[:, None] == self.sources[None, :]).to(torch.int64).argmax(dim=1)


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Own parameters that the optimizer treats otherwise; None leaves what `optimizer.*` says."""

    parameters: Sequence[nn.Parameter]
    weight_decay: float | None = None
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """One figure of a `Panel`: its label, the axes it is drawn in (their labels), and its row in a sweep's table."""

    label: str
    axis: str
    marker: str = "-"
    row: str | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Panel:
    """Figures, one value per modality each, that are drawn together, apart from the losses.

    Attributes:
        name: of the picture `plots/NAME.png`, and of a sweep's table.
        title: of both; note: below the table.
        figures: name of a figure -> how it is shown.
    """

    name: str
    title: str
    figures: Mapping[str, Shown]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A figure of an epoch at which the user is warned, once (per modality, where it has one value for each).

    Attributes:
        figure: its name; key: what `metrics.jsonl` calls the warning.
        least: the value from which it is given.
        text: what it says, of {modality}, {value} and {percent}.
    """

    figure: str
    key: str
    least: float
    text: str


class Method(nn.Module):
    """ERM: joint training of the fused head; uni-modal heads only probe, unless they are set to train too.

    A method overrides `losses`, or `gradients` where it takes more than one pass or changes gradients on their way.
    Modules and parameters that it owns are trained by the same optimizer, averaged over the processes and saved with
    the training; they are never part of the deployed model. A step may neither branch on data nor wait for the device:
    `torch.where` instead of `if`, `context.step` instead of a Python number, no `.item()`. Gradients are taken by the
    context (`backward`, `gradients`, `set_gradient`) and parameters looked up when they are used, so that many members
    of a population can take one step at once.

    Attributes:
        Settings: the method's own settings group.
        views: views of a clip per batch; with 2, rows 2i and 2i + 1 are two views of one clip.
        capturable: whether a CUDA graph may hold the step.
        stackable: whether many trainings may take the step at once (`training.population`).
        average: kind of the weight average unless `average.kind` says otherwise.
        average_start: step from which it averages unless `average.start` says otherwise.
        ticker: figures beside the loss that the progress line shows.
        alarms: figures to warn about.
        terms: names of the figures that are terms of the loss, once a step was done.
        published: its authors' own chassis (`--chassis published`): dotted settings to values or, where the paper
            differs per dataset, to {dataset: value} with a "default" among them; None: there is none.
        neutral: settings with which it trains ERM's very weights; None: zero weights of all terms that ERM lacks.
        symmetric: whether another order of the modalities changes nothing but rounding.

    Args:
        settings: an instance of `Settings`.
        context: what it works on.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    views: ClassVar[int] = 1
    capturable: ClassVar[bool] = True
    stackable: ClassVar[bool] = True
    average: ClassVar[Literal["none", "ema", "sma", "swad"]] = "none"
    average_start: ClassVar[int] = 0
    ticker: ClassVar[tuple[str, ...]] = ("ce_fused",)
    alarms: ClassVar[tuple[Alarm, ...]] = ()
    terms: tuple[str, ...] = ()
    published: ClassVar[Mapping[str, object] | None] = None
    neutral: ClassVar[Mapping[str, object] | None] = None
    symmetric: ClassVar[bool] = True

    def __init__(self, settings: MethodSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.context = context

    @classmethod
    def panels(cls, settings: MethodSettings) -> tuple[Panel, ...]:
        """Figures that are not drawn with the losses, with these settings."""
        return ()

    @property
    def passes(self) -> int:
        """Forward passes of the student per step, in train mode."""
        return 1

    @property
    def least_batch(self) -> int:
        """Clips that a step needs in every process: two rows, where own batch norms take their statistics from them."""
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())
        return -(-2 // self.views) if normed else 1

    # ---- what a method says

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """The terms of the loss by name, from the student's outputs on `batch`."""
        ce = torch.stack([cross_entropy(logits, batch.labels) for logits in out.unimodal.values()])
        return {"ce_fused": Term(cross_entropy(out.fused, batch.labels)), "ce": Term(ce)}

    def gradients(self, batch: Batch) -> Figures:
        """Leave the gradient of the loss in `.grad` of everything that trains; the figures of the step.

        Args:
            batch: as the dataset gives it, on the device, floating inputs in the weights' type.
        """
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        loss = total(terms)
        self.context.backward(loss)
        return self.figures(batch, out, loss, terms)

    def after_update(self) -> None:
        """Called after the optimizer and the weight average."""

    def before_epoch(self, clips: EpochClips) -> None:
        """Called before the first step of every epoch, outside all graphs; it may wait for the device.

        What it changes (buffers, weights, in place) it changes at its end: a signal may end it while it reads, and a
        training that goes on from there calls it anew.
        """

    def parameter_groups(self) -> list[ParameterGroup]:
        """Own parameters with other optimizer settings; all others are trained like the model's."""
        return []

    # ---- their parts

    def at_cut(self, batch: Batch) -> Batch:
        """Through the student's live trunks, where there are any; once for all passes: their weights are fixed."""
        model = self.context.model
        if not model.trunks:
            return batch
        with self.context.autocast():
            inputs = model.at_cut(batch.inputs)
        return replace(batch, inputs=inputs)

    def forward(self, batch: Batch, *, noise: Noise | None = None, theta: TailWeights | None = None) -> Outputs:
        """One pass of the student.

        Args:
            batch: at the cut.
            noise: applied between the stages of the tails.
            theta: the tails' parameters to use instead of the model's.
        """
        model = self.context.model
        with self.context.autocast():
            pooled = model.pooled(batch.inputs, noise=noise, theta=theta)
            features = model.normalised(pooled)
            unimodal = model.unimodal(self.seen_by_heads(features))
            return Outputs(pooled, features, unimodal, model.fuse(features))

    def seen_by_heads(self, features: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Features [B, D_k] for the uni-modal heads: detached where the heads only probe."""
        if self.settings.unimodal == "joint":
            return features
        return {name: value.detach() for name, value in features.items()}

    @torch.no_grad()
    def told_alone(
        self, features: Mapping[str, torch.Tensor], unimodal: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Logits of what each modality's features tell by themselves, M times [B, C], without a graph.

        Of a linear fused head its own part, W_k h_k + b / M; an MLP has none, and the uni-modal heads stand for it.
        """
        head = self.context.model.fused_head
        if not isinstance(head, nn.Linear):
            return list(unimodal.values())
        parts = head.weight.split([h.shape[1] for h in features.values()], dim=1)
        with self.context.autocast():
            return [
                nn.functional.linear(h, weight, head.bias / len(parts))
                for h, weight in zip(features.values(), parts, strict=True)
            ]

    @torch.no_grad()
    def figures(
        self, batch: Batch, out: Outputs, loss: torch.Tensor, terms: Mapping[str, Term], **more: torch.Tensor
    ) -> Figures:
        """The loss [], its terms, `more` ([] or [M]), and the accuracies of the pass `out` (in train mode)."""

        def accuracy(logits: torch.Tensor) -> torch.Tensor:
            return (full_precision(logits).argmax(dim=1) == batch.labels).sum() / len(batch)

        self.terms = tuple(terms)
        return {
            "total": loss.detach(),
            **{name: term.value.detach() for name, term in terms.items()},
            **more,
            "accuracy_fused": accuracy(out.fused),
            "accuracy": torch.stack([accuracy(logits) for logits in out.unimodal.values()]),
        }
