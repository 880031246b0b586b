"""The settings tree shared by all commands. Every field's docstring is its help and its line in docs/settings.md.

Merging presets, files, environment and flags into one tree is `mbcd_cli.resolved`'s work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from mbcd_cli.naming import modality_faults, name_faults
from mbcd_cli.settings.ranges import AROUND, Range
from mbcd_cli.settings.roles import ForCache, ForMachine, ForReport, ForWeights, Role, Slice, field_role


def _split_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Radius = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=3e38)]
NonNegative = Annotated[float, Field(ge=0, le=3e38)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Allowed = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Held = TypeVar("Held", bound=Iterable[str])


def _fit(names: Held, faults: Callable[[str], list[str]]) -> Held:
    if problems := [problem for name in names for problem in faults(name)]:
        raise ValueError("; ".join(problems))
    return names


class ReaderSettings(Slice):
    """What lists the clips: a reader by name, with settings of its own; this is what every reader has."""

    name: str = "manifest"
    """Reader that lists the clips; `mbcd list datasets` shows them."""


class ManifestSettings(ReaderSettings):
    """The manifest is a CSV table."""

    manifest: Path = Path("manifest.csv")
    """CSV table of the manifest reader, relative to the root."""


AnyReaderSettings = TypeVar("AnyReaderSettings", bound=ReaderSettings)


class DatasetSettings(Slice, Generic[AnyReaderSettings]):
    """Which clips there are and where their media lies."""

    reader: AnyReaderSettings = Field(default_factory=dict)  # validated as the reader's own class
    """Reader (`mbcd list datasets` shows them), with the settings that it has; its name alone will do."""
    name: str | None = None
    """Name of the dataset in the cache and in run folders; default: the root folder's name."""
    root: ForMachine[Path | None] = None
    """Folder that holds the dataset; only `prepare` and prompts from narrations need it."""
    domains: Names = ()
    """Domains to use, in this order; empty means all that the dataset has."""
    classes: Count | None = None
    """Number of classes, labels being 0 to classes - 1; default: the largest label found plus one."""
    target_split: ForCache[Literal["test", "all"]] = "test"
    """Rows of the target domain that are tested: its test split, or all of its clips."""
    min_frames: ForCache[Count] = 2
    """A video or flow with fewer frames than this is rejected."""
    max_bad: ForMachine[Allowed] = "0"
    """Rejected clips that `prepare` tolerates before it exits with 3: a number, or a share of all (5%)."""
    missing_frames: ForCache[Literal["nearest", "reject"]] = "nearest"
    """What to do when single frames of a clip are missing: use the nearest present frame, or reject the clip."""
    compute_flow: bool = False
    """Compute optical flow (OpenCV DIS) from the video where the dataset has none."""
    leave_out: ForCache[Literal["none", "audit"]] = "none"
    """Training clips to leave out: those that, by `mbcd audit`, tell of a test clip; the test splits stay whole."""
    seal_target: bool = False
    """Read none of the target's labels (no accuracy, plot, warning) until `mbcd reveal` writes the look down."""
    left_out: ForMachine[tuple[str, ...] | None] = None
    """Filled in by `prepare`: ids of the clips that were left out."""

    @field_validator("name")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        _fit([] if value is None else [value], partial(name_faults, "dataset name"))
        return value

    @field_validator("max_bad")
    @classmethod
    def _number_or_share(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9]{1,9}|[0-9]{1,2}(\.[0-9]{1,6})?%|100%", value):
            raise ValueError("neither a number of clips nor a share of them such as 5%")
        return value

    @field_validator("reader", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    def tolerates(self, rejected: int, clips: int) -> bool:
        """Whether so many rejected clips of so many in all are as `max_bad` allows."""
        share = self.max_bad.removesuffix("%")
        return rejected <= (float(share) / 100 * clips if share != self.max_bad else int(share))

    def __reduce__(self):
        # The class of one reader's dataset has no name in this module, so that decoding processes could not find it.
        return _dataset, (dict(self),)


def _dataset(values: dict[str, object]) -> DatasetSettings:
    return DatasetSettings(**values)


class ModalitySettings(Slice):
    """What every kind of modality has in common; the kinds are in `mbcd_cli.data.modalities`."""

    role: ClassVar[Role] = "cache"

    kind: str
    """Kind of the modality."""
    encoder: ForWeights[str]
    """Encoder that reads this modality; `mbcd list encoders` shows them."""
    cut: str = "input"
    """First trained stage: `input` trains everything, `layer4` as in the paper, `adapter` a small MLP after pooling."""
    weights: ForWeights[Path | None] = None
    """Checkpoint file for the encoder, relative to `--weights-dir`; none means random weights."""
    weights_sha256: ForWeights[str | None] = None
    """Expected SHA-256 of the weights file, or its beginning; a file that differs is refused."""
    pretraining: ForReport[str | None] = None
    """What the weights were trained on, as results tell it; default: what their publisher states, as far as known."""
    width: ForWeights[Count] = 16
    """Channels of the first layer of a small encoder; the others grow from it."""
    encoder_config: ForWeights[str | None] = None
    """Filled in by `prepare`: what an encoder's own files say of its layers and preprocessing."""

    @property
    def from_files(self) -> bool:
        """Whether the encoder is a user's file (`SCHEME:WHAT`), and not one of a registry."""
        return ":" in self.encoder

    @property
    def prepared_encoder(self) -> bool:
        """Whether `prepare` needs the encoder: to freeze part of it, or to keep weights that training begins with."""
        return self.cut != "input" or self.weights is not None or self.from_files


class CacheSettings(Slice):
    """The cache of trunk outputs."""

    role: ClassVar[Role] = "machine"

    dir: Path = Path("cache")
    """Folder of all caches."""
    views: ForCache[Annotated[int, Field(ge=0, lt=2**31)]] = 4
    """Random training views stored per training clip; 0: `train` decodes a fresh one every epoch and runs the trunk."""
    trunk_batch_norm: ForCache[Literal["running", "batch"]] = "running"
    """Batch norm of the trunk with views = 0: as in the weights, or following train and eval mode (the reference)."""
    dtype: ForCache[Literal["float16", "float32", "int8"]] = "float16"
    """Type of stored trunk outputs and spectrograms (int8: with a scale per row and channel); frames are uint8."""
    shard_clips: Count | None = None
    """Clips per shard file (64; of many small ones more); a killed `prepare` loses at most the shard in flight."""
    compression: Literal["none", "gzip", "lzf"] = "none"
    """HDF5 compression; uncompressed shards are memory-mapped."""
    workers: Annotated[int, Field(ge=0, lt=2**31)] = 2
    """Processes that decode media; 0 decodes in the main process."""
    weights_dir: Path = Path("weights")
    """Folder of the encoders' pretrained weights."""
    random_weights: ForWeights[bool] = False
    """Allow a frozen trunk with random weights (for tests and timings; never silently)."""
    seed: ForCache[Seed] = 0
    """Seed of the random views; with the clip's id it fixes every view, whatever the number of workers."""

    @model_validator(mode="after")
    def _batch_needs_fresh_views(self):
        if self.trunk_batch_norm == "batch" and self.views:
            raise ValueError("trunk_batch_norm = batch needs views = 0: stored trunk outputs depend on no batch")
        return self

    @property
    def live_trunks(self) -> bool:
        """Whether trunks run as part of the model, and the cache holds decoded test views."""
        return self.views == 0 and self.trunk_batch_norm == "batch"


class ModelSettings(Slice):
    """Heads and fusion; the encoders are set per modality."""

    modalities: Names = ()
    """Modalities to train on, in fusion order; empty means all that are prepared."""
    hidden: Count = 512
    """Width of the hidden layer of every head."""
    dropout: Annotated[float, Field(ge=0, lt=1), Range(0.1, 0.8)] = 0.5
    """Dropout inside the heads."""
    unimodal_head: Literal["mlp", "linear"] = "mlp"
    """Uni-modal heads: one hidden layer, or a single linear layer."""
    fused_head: Literal["mlp", "linear"] = "mlp"
    """The fused head: one hidden layer, or a single linear layer on the concatenated features."""
    tails: Literal["trained", "frozen"] = "trained"
    """Encoders train from the cut on, or stay as they were prepared, in eval mode; arrays cut at `input` are then read
    as they are, not through layers that nothing has trained."""
    norm: Literal["layer", "none"] = "layer"
    """LayerNorm on the pooled features of every modality, or none."""
    feature_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on pooled features, before the norm: everything after it sees the dropped vector."""
    feature_dropout_on: Names = ()
    """Modalities whose pooled features are dropped out; empty means all."""

    @field_validator("modalities")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a modality is named twice")
        return _fit(value, modality_faults)

    @model_validator(mode="after")
    def _known(self):
        unknown = [name for name in self.feature_dropout_on if self.modalities and name not in self.modalities]
        if unknown:
            raise ValueError(f"feature_dropout_on: {', '.join(unknown)} is not among the modalities")
        return self


class MethodSettings(Slice):
    """What trains: a method by name, with the settings of its class; these are ERM's, which every method has."""

    name: str = "erm"
    """Name of the method (`mbcd list methods`), or a class of your own: my_method.py:MyMethod."""
    unimodal: Literal["joint", "probe"] = "probe"
    """Uni-modal heads train with their encoders, or only probe detached features, to be reported."""

    @property
    def needs_average(self) -> bool:
        """Whether training itself reads the weight average (to distil from it, say)."""
        return False


class AverageSettings(Slice):
    """The average of the student's weights (the teacher); where there is one, it is the deployed model."""

    kind: Literal["none", "ema", "sma", "swad"] = "none"
    """No average, an exponential one, the mean of all steps, or SWAD's; the default is the method's own."""
    beta: Annotated[float, Field(ge=0, lt=1), Range(0.9, 0.9999, benchmark=4, only=("kind", "ema"))] = 0.999
    """ema: Theta_EMA <- beta Theta_EMA + (1 - beta) Theta after every step."""
    start: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """ema, sma: step from which weights are averaged; until then the average is a copy of the student."""
    converge: Count = 3
    """swad: epochs (N_s) whose first has their least validation loss where the valley begins."""
    leave: Count = 6
    """swad: epochs (N_e) that are all above the threshold where the valley has ended."""
    tolerance: Annotated[float, Field(ge=1)] = 1.3
    """swad: the threshold (r), times the mean validation loss of the first N_s epochs of the valley."""
    snapshots: ForMachine[bool] = False
    """Keep averages of the student after every epoch, in `snapshots/`, for `mbcd average`; they teach nobody."""

    @model_validator(mode="after")
    def _swad_starts_itself(self):
        if self.kind == "swad" and self.start:
            raise ValueError("start is of ema and sma: swad finds its first epoch itself")
        return self


class OptimizerSettings(Slice):
    """The one optimizer of encoders' tails and heads."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam with coupled weight decay (the paper), AdamW, or SGD with momentum."""
    lr: Annotated[Positive, AROUND] = 1e-4
    """Learning rate, of the first epoch at least."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate by epoch: constant, falling along half a cosine, or a tenth after each of `drops`."""
    least_lr: NonNegative = 1e-6
    """cosine: the learning rate that it would reach after the last epoch."""
    drops: tuple[Count, ...] = (70,)
    """step: epochs after each of which the learning rate is a tenth of what it was."""
    weight_decay: Annotated[NonNegative, AROUND] = 1e-4
    """Weight decay."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; beta_1 of Adam."""

    @model_validator(mode="after")
    def _falls(self):
        if self.schedule == "cosine" and self.least_lr > self.lr:
            raise ValueError(f"least_lr: {self.least_lr:g} is above the learning rate {self.lr:g}")
        return self


class TrainingSettings(Slice):
    """Domains, length and seed of a training."""

    chassis: Literal["shared", "published"] = "shared"
    """Heads, optimizer, epochs and selection: one for all methods, or (published) what each one's authors used."""
    target_domain: str | None = None
    """Unseen domain, only used to report; none trains and reports in-domain."""
    source_domains: Names = ()
    """Domains seen in training; empty means all but the target."""
    epochs: Count = 20
    """Passes over the source domains' training clips."""
    batch_size: Count = 16
    """Clips per step."""
    seed: Seed = 0
    """Seed of initial weights, order, views, masks and noise."""
    init_seed: Seed | None = None
    """Seed of the initial weights alone, one for all seeds whose weights are to be averaged; default: `seed`."""
    batch_norm: Literal["tracked", "frozen"] = "tracked"
    """Batch norm of the tails: train mode with tracked statistics, or frozen statistics."""
    checkpoint_minutes: ForMachine[NonNegative] = 10.0
    """Minutes between checkpoints inside an epoch; every epoch ends with one, 0 means only then."""
    keep_checkpoints: ForMachine[bool] = False
    """Keep every epoch's weights (`checkpoints/epoch-NNN.pt`) for trajectories."""
    log_steps: ForMachine[Count] = 10
    """Steps between two records in steps.jsonl, each the mean over those steps."""
    limit_clips: Count | None = None
    """Use at most this many training clips (a quick sanity run)."""
    max_steps: Count | None = None
    """Stop after this many steps (a quick sanity run)."""

    @model_validator(mode="after")
    def _target_unseen(self):
        if self.target_domain is not None and self.target_domain in self.source_domains:
            raise ValueError(f"target domain {self.target_domain!r} is also a source domain")
        if len(set(self.source_domains)) != len(self.source_domains):
            raise ValueError("a source domain is named twice")
        return self


class EvaluationSettings(Slice):
    """What `evaluate` computes."""

    role: ClassVar[Role] = "report"

    batch_size: Count = 64
    """Clips per forward pass."""
    checkpoints: tuple[Literal["best", "last"], ...] = ("best", "last")
    """Checkpoints of the run to evaluate."""
    top_k: Count = 5
    """k of the top-k accuracy reported beside top-1."""
    analyses: tuple[Literal["missing", "shift", "corruptions", "trust", "insight"], ...] = (
        "missing",
        "trust",
        "insight",
    )
    """What to analyse beyond accuracy; `trust` is calibration, `insight` t-SNE maps and the hardest clips."""
    shift: tuple[NonNegative, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Standard deviations of the Gaussian shift, in units of the spread of each clip's own input."""
    bins: Count = 15
    """Bins of the calibration error and the reliability diagram."""
    tsne_clips: Count = 600
    """Clips drawn in the t-SNE maps, at most, spread evenly over source and target."""
    hardest: Annotated[int, Field(ge=0, lt=2**31)] = 20
    """How many of the clips whose class got the least probability are listed."""
    export: tuple[Literal["csv", "hdf5"], ...] = ("csv",)
    """Files written per set of clips: predictions as CSV, logits and embeddings as HDF5."""
    report: bool = True
    """Write one self-contained HTML report."""
    seed: Seed = 0
    """Seed of the shifts and maps."""


class LandscapeSettings(Slice):
    """Loss surfaces and flatness."""

    role: ClassVar[Role] = "report"

    points: Annotated[int, Field(ge=3)] = 15
    """Points per axis of the 2-D surface (1-D curves use four times as many, less one)."""
    span: Positive = 1.0
    """The axes run from -span to +span in units of the filter-normalised directions."""
    radii: Annotated[tuple[Radius, ...], Field(min_length=1)] = (
        0.0,
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
    )
    """Relative radii of the random perturbations for the flatness curve."""
    directions: Count = 10
    """Random directions per radius."""
    data: Literal["validation", "target", "train"] = "validation"
    """Clips on which the loss is measured."""
    max_clips: Annotated[int, Field(ge=0, lt=2**31)] = 256
    """At most this many clips, drawn evenly; 0 uses all."""
    batch_size: Count = 64
    """Clips per forward pass."""
    seed: Seed = 0
    """Seed of the directions."""
    analyses: tuple[Literal["surface", "curve", "flatness", "worst_case", "curvature"], ...] = (
        "surface",
        "curve",
        "flatness",
    )
    """What to measure: 2-D surface, 1-D curve, mean and worst-case loss increase per radius, Hessian curvature."""
    group: str = "all"
    """Parameters that move: all, tails, fused_head, or the name of a modality (its tail alone)."""
    weights: Literal["deployed", "student", "teacher"] = "deployed"
    """Weights at the centre: the deployed ones (the teacher's if there is one), the student's, or the teacher's."""
    to_weights: Literal["deployed", "student", "teacher"] = "deployed"
    """Weights of the checkpoints named with --to; with `weights`, the path from a student to its teacher."""
    loss: Literal["fused", "total"] = "fused"
    """Cross-entropy of the fused head, or the sum of the fused and all uni-modal heads' cross-entropies."""
    batch_norm: Literal["running", "recalibrated"] = "running"
    """Batch norm at every point: the checkpoint's running statistics, or recalibrated on training clips."""
    normalisation: Literal["filter", "layer", "adaptive", "relative", "absolute"] = "filter"
    """Length of a direction: that of the weights per filter, layer or value (adaptive) or in all, or 1."""
    biases: Literal["still", "move"] = "still"
    """Biases and batch-norm parameters: not moved (Li et al. 2018), or moved like one filter per tensor."""
    points_per_pass: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Points evaluated together by vmap; 0 chooses (many when only heads move, one otherwise)."""
    ascent_steps: Count = 10
    """Gradient ascent steps of the worst-case loss increase."""
    eigenvalues: Count = 5
    """Largest Hessian eigenvalues that are computed."""
    tolerance: Positive = 1e-3
    """Relative error at which an eigenvalue counts as converged."""
    trace_probes: Count = 32
    """Random vectors of Hutchinson's estimate of the Hessian's trace."""
    density_probes: Annotated[int, Field(ge=0, lt=2**31)] = 4
    """Random vectors of the Hessian's spectral density (stochastic Lanczos quadrature); 0 leaves it out."""
    density_steps: Count = 60
    """Lanczos steps per random vector of the spectral density."""
    curvature_dtype: Literal["float32", "float64"] = "float32"
    """Precision of Hessian-vector products (the recurrences are always float64)."""
    exact_limit: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The whole Hessian is computed when at most this many parameters move; 0 never."""


class AdaptSettings(Slice):
    """Adaptation to the inputs of the tested clips, without their labels."""

    role: ClassVar[Role] = "report"

    rule: Literal["tent", "read", "aeo"] = "tent"
    """What adapts: TENT (normalisation layers), READ (fused head's first layer) or AEO (tails and heads)."""
    reset: Literal["target", "batch", "never"] = "target"
    """When the checkpoint's weights come back: before each domain, before each batch, or never (sources first)."""
    batch_size: Count = 64
    """Clips per step, 2 at least: the rules look at a batch as a whole. A last clip alone joins the batch before it."""
    steps: Count = 1
    """Steps on each batch."""
    lr: Positive | None = None
    """Learning rate of Adam; default: the rule's own (tent, read: 1e-4, aeo: 2e-5)."""
    weight_decay: NonNegative | None = None
    """Weight decay of Adam; default: the rule's own (tent, read: 0, aeo: 1e-4)."""
    alpha: Fraction = 0.8
    """aeo: entropy, as a share of log C, above which a clip's entropy is raised instead of lowered."""
    unimodal_weight: NonNegative = 0.1
    """aeo: weight (a) of the distance between the modalities' predictions, and of the entropies of their heads."""
    balance_weight: NonNegative = 0.1
    """aeo: weight (b) of the entropy of the softmax of a batch's summed probabilities."""
    dropout: bool = True
    """aeo: dropout stays on in every pass, as in its published code."""
    seed: Seed = 0
    """Seed of the batches' order, and of dropout."""

    @field_validator("batch_size")
    @classmethod
    def _more_than_one(cls, value: int) -> int:
        if value < 2:
            raise ValueError("a batch of one clip has no statistics and no spread of classes: take 2 or more")
        return value


class RuntimeSettings(Slice):
    """Where and how the computations run."""

    role: ClassVar[Role] = "machine"

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """CPU threads; 0 leaves it to torch."""
    precision: ForWeights[Literal["float32", "bfloat16"]] = "float32"
    """Precision of convolutions and products (weights stay float32)."""
    deterministic: ForWeights[bool] = True
    """The same inputs and seed give the same result on every run of one machine."""
    channels_last: ForWeights[Literal["auto", "on", "off"]] = "auto"
    """Channels-last memory layout of convolutions; auto takes it for CUDA and for bfloat16."""
    compile: ForWeights[bool] = False
    """Compile the tails with torch.compile (slow first steps, sometimes quicker ones after)."""
    cuda_graph: ForWeights[Literal["auto", "on", "off"]] = "auto"
    """Capture the whole training step in a CUDA graph; auto does so on one GPU and falls back to single kernels."""
    cache_device: Literal["auto", "host", "cuda"] = "auto"
    """Where the selected clips' cache lies in training: mapped from disk, or on the GPU (auto: when it fits)."""
    prefetch: Annotated[int, Field(ge=0, lt=2**31)] = 2
    """Batches that a background thread reads ahead; 0 reads each when it is needed."""
    verify: Literal["first", "always", "off"] = "first"
    """When a cached row is compared with its checksum: when a process first reads it, at every reading, or never."""


class RaySettings(Slice):
    """What a run asks of a Ray cluster (`--launcher ray`)."""

    role: ClassVar[Role] = "machine"

    processors: Count = 1
    """Processors that a run takes; its CPU threads, unless runtime.threads says so."""
    memory_gb: NonNegative = 0.0
    """Memory that a run takes, in GB; 0 asks for none in particular."""
    gpus: NonNegative | None = None
    """GPUs that a run takes, or a fraction of one; default: one, where the cluster has any and the device is no cpu."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_share(cls, value: float | None) -> float | None:
        if value and (value < 0.0001 or (value > 1 and value != int(value))):
            raise ValueError("neither a whole number of GPUs nor a fraction of one, 0.0001 at least")
        return value


AnyMethodSettings = TypeVar("AnyMethodSettings", bound=MethodSettings)
AnyModality = TypeVar("AnyModality", bound=ModalitySettings)


class Settings(Slice, Generic[AnyMethodSettings, AnyModality, AnyReaderSettings]):
    """The whole tree; `resolved.validate` gives it the classes of the method, reader and kinds that it names."""

    dataset: DatasetSettings[AnyReaderSettings] = Field(default_factory=dict)
    """Dataset."""
    modalities: ForCache[dict[str, AnyModality]] = Field(default={})
    """Modalities by name; empty means whatever the dataset has, each with its kind's defaults."""
    cache: CacheSettings = CacheSettings()
    """Cache."""
    model: ModelSettings = ModelSettings()
    """Model."""
    method: AnyMethodSettings = Field(default_factory=dict)  # validated as the method's own class
    """Method, with the settings that its class has."""
    average: AverageSettings = AverageSettings()
    """Average."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer."""
    training: TrainingSettings = TrainingSettings()
    """Training."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Evaluation."""
    landscape: LandscapeSettings = LandscapeSettings()
    """Landscape."""
    adapt: AdaptSettings = AdaptSettings()
    """Adaptation at test time."""
    runtime: RuntimeSettings = RuntimeSettings()
    """Runtime."""
    ray: RaySettings = RaySettings()
    """Ray."""

    @field_validator("average")
    @classmethod
    def _there_where_it_is_needed(cls, value: AverageSettings, info: ValidationInfo) -> AverageSettings:
        method = info.data.get("method")
        if method is not None and method.needs_average and value.kind in ("none", "swad"):
            raise ValueError("the method distils from the weight average: set average.kind to ema or sma")
        return value

    @field_validator("modalities")
    @classmethod
    def _names(cls, value: dict[str, object]) -> dict[str, object]:
        return _fit(value, modality_faults)


@lru_cache(4096)
def role_of(path: str) -> Role:
    """What the setting `path` (dotted) is for.

    A setting of one method, or of one kind of modality, has the role of its group, an unknown one that of its nearest.
    """
    group, *rest = path.split(".")
    if group == "modalities" and rest[1:] and rest[1] in ModalitySettings.model_fields:
        return field_role(ModalitySettings, rest[1])
    owner: type[Slice] | None = Settings
    role: Role = "weights"
    for key in path.split("."):
        field = None if owner is None else owner.model_fields.get(key)
        if field is None:
            break
        role = field_role(owner, key)
        held = getattr(field.annotation, "__bound__", field.annotation)
        owner = held if isinstance(held, type) and issubclass(held, Slice) else None
        role = role if owner is None else owner.role
    return role
