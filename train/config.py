"""What a training run is told. Every key can be given in a TOML file or by --set."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from shared.config import Config
from shared.reading import IO, Access
from train import method as methods
from train.dictionary import Norm
from train.filter import RowsConfig
from train.kernels.choice import Codes, Precision
from train.parallel import Over
from train.scale import Kind


class SpanConfig(Config):
    """A run of latents with the same readers and writers."""

    name: str  # in figures and pictures
    size: int | float | None = None  # latents (integer) or share of all; none, for one span: what the others leave
    readers: list[str] | None = None  # none: all sources
    writers: list[str] | None = None  # none: all sources
    weight: float = Field(1.0, ge=0)  # of its codes in a penalty
    tied: bool = False  # one decoder vector for all writers: designated shared latents


class WiringConfig(Config):
    """Which latents each source reads into and writes from."""

    kind: Literal["autoencoder", "transcoder", "crosscoder", "dedicated", "spans"] = "crosscoder"  # who reads, writes
    latents: int = Field(ge=1)  # of the whole dictionary
    sources: list[str] | None = (
        None  # in order, differences such as "chat - base" too; none: all of the store. A transcoder: first -> second
    )
    exclusive: int | float | dict[str, int | float] = 0.05  # dedicated: latents (integer) or share per source
    readers: list[str] | None = None  # crosscoder: the sources that are read; none: all
    spans: list[SpanConfig] = Field(default_factory=list)  # of the kind spans
    k: dict[str, int] = Field(default_factory=dict)  # {span: latents that it keeps by itself}
    skip: bool = False  # transcoder: a linear map from what is read to what is written, beside the latents
    norm: Norm = "sum"  # decoder norm that weights sparsity and selection: sum, joint, mixed, mean, none, decoupled
    alpha: float = Field(0.1, ge=0)  # mixed: joint + alpha x sum
    decoder: Literal["free", "unit"] = "free"  # unit: what a latent writes, to all sources together, has the length 1
    decoder_norm: float | None = Field(None, gt=0)  # length of fresh decoder vectors; none: 0.4, or 1 for one source


class ReadConfig(Config):
    """How the rows of the store are read; what comes out is the same."""

    io: IO = "map"  # map: memory maps; pread: large reads, for network disks; a packed store is decoded either way
    resident: Literal["auto", "never"] = "auto"  # auto: rows stay on the GPU or in memory, if half of it is room enough

    @property
    def access(self) -> Access:
        return Access(self.io)


class ScaleConfig(Config):
    """How rows are scaled before the dictionary sees them."""

    kind: Kind = "median_norm"  # none, rms, median_norm
    centre: bool = True  # subtract the mean of the kept rows


class InitConfig(Config):
    """What a dictionary begins with, beside random directions."""

    bias: Literal["zero", "mean", "median", "row"] = "zero"  # of a decoder: of the scaled rows; median: the geometric
    tied: bool = True  # encoders begin as the decoders, where a source both reads and writes; else as random directions
    rows: int = Field(32_768, ge=1)  # behind a bias, drawn from those that the run keeps


class ResampleConfig(Config):
    """Dead latents begin again from rows that are reconstructed badly (Bricken et al. 2023)."""

    steps: list[int] = Field(default_factory=list)  # at which they do (there 25000, 50000, 75000 and 100000)
    rows: int = Field(819_200, ge=1)  # whose loss is taken, drawn from those that the run keeps
    idle_rows: int | None = Field(None, ge=1)  # since a latent last fired; none: dead_rows (there 12,500 steps)
    encoder: float = Field(0.2, gt=0)  # length of a new encoder row, in mean lengths of those that live


class OptimiserConfig(Config):
    """Adam, or, where weights decay, AdamW."""

    lr: float = Field(3e-4, gt=0)  # peak
    warmup: int = Field(100, ge=0)  # steps from 0 to the peak
    decay: float = Field(0.2, ge=0, le=1)  # share of the steps, at the end, over which the rate falls to 0
    beta1: float = Field(0.9, ge=0, lt=1)  # decay of the mean of the gradient
    beta2: float = Field(0.999, ge=0, lt=1)  # decay of the mean of its square
    weight_decay: float = Field(0.0, ge=0)  # share of matrices (no biases), times the rate, that a step takes off
    clip: float = Field(1.0, gt=0)  # largest norm of the gradient
    ema: float = Field(0.0, ge=0, lt=1)  # decay of a moving average of the weights, which is what is saved; 0: none


class LogConfig(Config):
    """How often things are written down."""

    every: int = Field(50, ge=1)  # steps between lines of metrics.jsonl
    checkpoint: int = Field(1000, ge=1)  # steps between checkpoints
    keep: int = Field(2, ge=1)  # checkpoints that stay
    measure_rows: int = Field(131_072, ge=1)  # rows of each split that the final measure reads at most
    tensorboard: bool = False  # show what metrics.jsonl has in TensorBoard, too: files in tensorboard/ of the run
    wandb: str | None = Field(None, pattern=r"^[^/\\#?%:]{1,128}$")  # W&B project to show it in (WANDB_ENTITY: whose)


class TrainConfig(Config):
    """The whole of a run."""

    wiring: WiringConfig
    method: SerializeAsAny[methods.MethodConfig]  # a table with `name` and that method's own keys
    steps: int = Field(ge=1)  # optimiser updates
    batch: int = Field(4096, ge=1)  # rows
    micro_batch: int | None = Field(
        None, ge=1
    )  # rows whose scores are in memory at once; none: all. A step is the same
    seed: int = Field(0, ge=0, lt=2**63)  # of the weights; rows.seed is that of the order
    dead_rows: int = Field(10_000_000, ge=1)  # a latent is dead that has not fired for so many rows
    rows: RowsConfig = RowsConfig()
    read: ReadConfig = ReadConfig()
    scale: ScaleConfig = ScaleConfig()
    init: InitConfig = InitConfig()
    resample: ResampleConfig = ResampleConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    log: LogConfig = LogConfig()
    kernels: Codes = "auto"  # whether kept codes are entries (sparse) or matrices (dense): by what is faster
    precision: Precision = (
        "auto"  # of large products: fp32, bf16; auto: bf16 where the device multiplies it in hardware
    )
    device: str = "auto"  # auto: cuda where there is one
    parallel: Over = "rows"  # what ranks (torchrun) share: rows of a batch, or latents, of which each then has a part
    threads: int | None = Field(None, ge=1)  # of torch on the CPU; none: torch's own choice

    @field_validator("method", mode="before")
    @classmethod
    def _named_method(cls, value: Any) -> Any:
        return methods.parse(value) if isinstance(value, Mapping | str) else value


class SweepConfig(Config):
    """Which runs a config stands for, in its table [sweep] (train.sweep)."""

    grid: dict[str, Any] = Field(default_factory=dict)  # lists of values, each below its key: every combination
    runs: list[dict[str, Any]] = Field(default_factory=list)  # tables laid over the config, a run each
