"""The run's whole configuration as frozen dataclasses; imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from anchorformer.devices import Device, Precision
from anchorformer.schema import TARGET, Schema, to_plain
from anchorformer.tiling import UNTILED, Tiling
from data.config import Count, DataConfig, NotNegative, Share
from train.choices import Checkpointing, EngineName, Kernels, Part, Repro, Schedule, StageName
from train.config_checks import check
from train.observe.span import Span
from train.zero import ZeroConfig

NO_TRACKER = {TARGET: "train.observe.trackers.none.NoTracker"}
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class PartConfig(Schema):
    """How a stage trains one part; a part that is not listed is frozen."""

    lr: Positive
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay of matrices; norms and biases get none."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Schema):
    """An adapter of low rank (Hu et al., 2021) that is trained in place of the language model's own weights."""

    rank: Count
    """Width of what lies between the two matrices of an adapted layer."""
    alpha: Count
    """What the adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapter's input, while it trains."""
    targets: tuple[str, ...]
    """Linear layers of the language model's blocks that are adapted, by the end of their names: `q_proj`, ..."""
    quantize: bool = False
    """Keep the linear layers beneath in 4 bits (QLoRA, Dettmers et al., 2023): CUDA, bitsandbytes, ZeRO up to 2."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(Schema):
    """One training stage: what it trains, on how much, with which schedule."""

    name: StageName
    trains: dict[Part, PartConfig]
    """Parts that are trained; everything else is frozen and asserted to stay bit-equal."""
    lora: LoraConfig | None = None
    """Trains an adapter in place of the language model, whose settings in `trains` are then the adapter's; null trains
    the language model itself where it is listed."""
    template: str
    """Conversation template: `plain`, `v1`, or `chat` for the tokenizer's own."""
    global_batch: Count
    """Samples per optimizer step over all ranks; accumulation is derived from it, never typed."""
    epochs: Positive | None = 1.0
    """Passes over the mixture; exactly one of `epochs` and `max_steps` is set."""
    max_steps: Count | None = None
    """Optimizer steps; set `epochs: null` with it."""
    warmup_ratio: Share = 0.03
    """Share of the steps with linearly rising learning rate."""
    schedule: Schedule = Schedule.cosine
    """How the learning rate goes on behind the warmup."""
    min_lr_ratio: Share = 0.0
    """Where the cosine ends, as a share of the peak."""
    clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Largest total gradient norm; 0 switches clipping off."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Of AdamW, as `eps`."""
    eps: Positive = 1e-8

    def adapts(self, part: Part) -> bool:
        """Whether of this part an adapter is trained and not its own weights."""
        return self.lora is not None and part is Part.language_model

    @property
    def whole_parts(self) -> tuple[Part, ...]:
        """The parts whose own weights are trained."""
        return tuple(part for part in self.trains if not self.adapts(part))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Schema):
    """What `anchorformer.assemble` builds: hub ids or local folders, and the parts between them."""

    vision: str
    """Hub id or folder of a CLIP, DINOv2 or SigLIP model."""
    language_model: str
    """Hub id or folder of a causal language model with its tokenizer."""
    selector: dict[str, Any]
    """Plug-in of `anchorformer.selectors`."""
    connector: dict[str, Any]
    """Plug-in of `anchorformer.connectors`."""
    integration: dict[str, Any] | None = None
    """Plug-in of `anchorformer.integrations`; null for a language model that reads the connector's embeddings alone."""
    tiling: Tiling = UNTILED
    """Tiles of an image; without grids it is one."""
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Hub id -> what its config.json says of its shape, for plans made before it is downloaded."""


@dataclass(frozen=True, kw_only=True)
class HardwareConfig(Schema):
    """What the run is started on."""

    device: Device = Device.auto
    """`auto` is CUDA where there is a card."""
    ranks: Count = 1
    """Processes per node."""
    nodes: Count = 1
    """Machines, each with `ranks` processes."""
    micro_batch: Count = 1
    """Most samples in one micro-batch of one rank."""
    precision: Precision = Precision.auto
    """`auto` is bf16 on CUDA; on CPU it follows the model's size and what the CPU can do, and is logged."""
    threads: NotNegative = 0
    """CPU threads per rank; 0 divides the cores by the ranks."""
    max_restarts: NotNegative = 0
    """How often all ranks are started again, from the newest checkpoint, after one crashed, hung or was killed."""
    card: str | None = None
    """Name of the accelerator, as in `train/plan/cards.py`: says its memory and its peak."""
    memory_gb: Positive | None = None
    """Memory of one card in GB, where it is not what `card` says; with either, the positions of a micro-batch
    (`data.token_budget`) and activation checkpointing are planned before the run starts, where they are left open."""
    activation_checkpointing: Checkpointing = Checkpointing.auto
    """Of the language model, non-reentrant; `auto` without a known memory is `off`."""
    compile: tuple[Part, ...] = ()
    """Parts that run through torch.compile; not under ZeRO-3."""
    kernels: Kernels = Kernels.auto
    """Form of the fused operations."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Schema):
    every: Count = 10
    """Steps between console lines and per-part gradient norms; `metrics.jsonl` gets every step."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Schema):
    every: Count | None = 500
    """Steps between checkpoints; null saves only at the end, so that a run that is killed is lost."""
    keep: Count = 2
    """Newest complete checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Schema):
    """Validation while the run trains; it changes no number of the training."""

    every: Count | None = None
    """Steps between validations, and one behind the last step; null never validates."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> plug-in of `evals.tasks`: each gives a loss of its right answers, and where it generates a score. On the
    command line names of conf/eval: `eval.tasks=[docvqa_val,chartqa_test]`. Their sources start from `data.root`."""
    limit: Count | None = 64
    """So many questions of each task, spread evenly over it and the same every time; null asks all."""
    batch_size: Count = 16
    """Questions that a rank answers together."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Schema):
    """How the anchors and the connector look at a few images that stay the same through the run."""

    every: Count | None = None
    """Steps between two looks, and one behind the last step; null never looks."""
    images: Count = 8
    """Records with one image, spread evenly over the run's own data."""
    max_new_tokens: Count = 32
    """Longest answer that is shown of them."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig(Schema):
    """How long a run may stand still before it says who holds it up and ends."""

    startup_seconds: Positive = 1800.0
    """Longest for one phase outside of steps (loading, saving, exporting) and for any phase of the first step."""
    step_seconds: Positive = 600.0
    """Longest for one phase of a step: its data, the exchange of facts, forward and backward, the update."""
    shutdown_seconds: Count = 300
    """Longest from a signal to the end by force; has to cover what is left of a step, and a save."""

    @property
    def collective_seconds(self) -> float:
        """Longest wait in a collective; behind the watchdog, which can tell more about the ranks."""
        return 1.5 * max(self.startup_seconds, self.step_seconds)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Schema):
    """Everything that decides a run; written to `checkpoints/<run>/config.yaml`, and all that ranks ever see."""

    run: str
    """Name of the run, its folder under `output_root`."""
    stage: StageConfig
    model: ModelConfig
    data: DataConfig
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tracker: dict[str, Any] = field(default_factory=lambda: dict(NO_TRACKER))
    """Plug-in of `train.observe.trackers`: where the curves are shown beside the run's own files."""
    profile: str | None = None
    """Steps of which every rank writes a trace, `step:10` or `step:10-12`; null writes none."""
    engine: EngineName = EngineName.deepspeed
    """`plain` is PyTorch alone, on one rank: what DeepSpeed is compared with."""
    seed: NotNegative = 0
    """Of fresh weights, the order of samples, dropout and whatever else is drawn."""
    repro: Repro = Repro.fast
    """How far two runs of one config agree."""
    init_from: str | None = None
    """Run or model folder to start from; required by finetune, while align assembles a fresh model without it."""
    rehearse: bool = False
    """Instead of the run: two of its steps and all around them, in a folder of their own; says what it proved."""
    resume: str = "never"
    """`never`, `auto` (newest complete checkpoint of this run) or a checkpoint folder."""
    output_root: str = "checkpoints"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def world_size(self) -> int:
        return self.hardware.ranks * self.hardware.nodes

    @property
    def profiled(self) -> Span | None:
        """The steps that `profile` names."""
        return None if self.profile is None else Span.parse(self.profile)

    @property
    def digest(self) -> str:
        """Hash of every value, for comparing nodes and naming checkpoints."""
        return hashlib.sha256(json.dumps(to_plain(self), sort_keys=True).encode()).hexdigest()
