"""The configuration of a training run: frozen, keyword-only, one tree for every stage."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from apt.checkpoints.info import SampleInfo
from apt.checks import check_finite, check_positive, check_range
from apt.data.builtin_sources import DATASETS, DIGITS
from apt.data.captions import CaptionRule, LongCaptions
from apt.data.digits import Setting, clip_size
from apt.data.source import ClipRequest, DataSource
from apt.distributed.mesh import ParallelConfig
from apt.errors import ConfigError
from apt.methods.base import StageConfig
from apt.models.checkpointing import Checkpointing
from apt.train.monitor import MonitorConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from.

    Attributes:
        source: registered source (`diffusion-apt list datasets`): "digits", the built-in stream;
            "folder", your own videos and images; "latents", what `diffusion-apt data encode` made
            of such a folder, whose size and rate then hold; or one of your own (--import).
        setting: of the built-in digits: "centred", "free" in place and background, "near", whose
            places vary less, or "large", which are free ones of 17 frames of 64x64.
        path: the folder, for sources that read one.
        options: other options of a source of your own.
        frames, height, width: size of a clip; frames are 4k + 1. In a folder, height times width
            is the pixel budget of the aspect-ratio buckets. None, also of fps, takes that of the
            model, or the trained codec, that the stage starts from; a first stage then takes what
            most files of a folder can give (`apt.data.statistics`), or the digits' own size.
        fps: frame rate of the clips; 0 keeps each video's own.
        max_frames, max_pixels: limits of what is taken from a folder where the size is left open;
            pixels are height times width.
        size_multiple: heights and widths of the buckets are multiples of this; None is what the
            codec makes one latent of times the model's patch.
        native_ratio: aspect-ratio buckets near each file's own shape; False crops all to
            height x width.
        images: "mix" trains on images as one-frame videos beside the videos; "only" and "none".
            A latent cache with both can be used for any of these.
        num_workers: processes that decode ahead; 0 decodes in the trainer.
        long_captions: what becomes of a sample whose caption has more tokens than the text encoder
            takes: "skip" and report it, "cut" the caption to what fits, or stop with an "error".
        strict: stop at the first file that cannot be used, instead of skipping and reporting it.
    """

    source: str = "digits"
    setting: Setting = "centred"
    path: str = ""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    max_frames: int = 17
    max_pixels: int = 64 * 64
    size_multiple: int | None = None
    native_ratio: bool = True
    images: Literal["mix", "only", "none"] = "mix"
    num_workers: int = 0
    long_captions: LongCaptions = "skip"
    strict: bool = False

    @property
    def clip(self) -> SampleInfo:
        """Size and rate of a clip, with the digits' for what is None."""
        digits = clip_size(self.setting)
        return SampleInfo(
            frames=digits.frames if self.frames is None else self.frames,
            height=digits.side if self.height is None else self.height,
            width=digits.side if self.width is None else self.width,
            fps=float(digits.fps) if self.fps is None else self.fps,
        )

    def make_source(self) -> DataSource:
        """The source with its options.

        Raises ConfigError for a source or an option that does not exist, with close matches.
        """
        kind = DATASETS.get(self.source)
        options: dict[str, Any] = dict(self.options)
        if self.source == DIGITS:
            options.setdefault("setting", self.setting)
        if self.path:
            if "path" not in inspect.signature(kind).parameters:
                raise ConfigError(
                    f"--data.path {self.path} names a folder, and the data source "
                    f"{self.source!r} reads none; add --data.source folder (or latents)"
                )
            options["path"] = self.path
        return DATASETS.create(self.source, **options)

    def request(
        self, *, seed: int, captions: CaptionRule | None = None, captioned: bool = True
    ) -> ClipRequest:
        """The clips that are asked for, with the digits' size and rate for what is None."""
        clip = self.clip
        return ClipRequest(
            frames=clip.frames,
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
            seed=seed,
            size_multiple=self.size_multiple or ClipRequest.size_multiple,
            native_ratio=self.native_ratio,
            images=self.images,
            strict=self.strict,
            captions=captions,
            captioned=captioned,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The networks of a pre-training run; later stages take theirs from the model they start from.

    Attributes:
        name: registered backbone.
        options: fields of its config to change, for example {"depth": 4}.
        text_encoder, text_encoder_options: registered text encoder, and fields of its config; it
            is trained if it has weights of its own.
        codec, codec_options: registered codec, and fields of its config; a codec run trains it,
            later runs never do.
    """

    name: str = "mmdit_digits"
    options: dict[str, int | float | str] = field(default_factory=dict)
    text_encoder: str = "bytes"
    text_encoder_options: dict[str, int | float | str] = field(default_factory=dict)
    codec: str = "patchify"
    codec_options: dict[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train low-rank adapters in place of the weights (Hu et al. 2022; needs peft).

    The finished model has them merged in, and holds them alone in
    `pytorch_lora_weights.safetensors` too.

    Attributes:
        rank: of the change of each weight; 0 trains the weights themselves.
        alpha: the change is scaled by alpha over rank; 0 is the rank, a scale of 1.
        targets: ends of the names of linear layers, such as "attn1.to_q"; empty takes all in the
            blocks.
        discriminator: D's backbone gets adapters as well; its heads train in full.
        base: the model that the adapters of the generator's folder were trained on. They go on from
            there, beside that model's weights, which on one GPU all networks that start from it
            share. Empty: the weights with those adapters merged in are the base of new ones.
    """

    rank: int = 0
    alpha: int = 0
    targets: tuple[str, ...] = ()
    discriminator: bool = True
    base: str = ""

    def __post_init__(self) -> None:
        if self.base and not self.rank:
            raise ConfigError(
                "lora.base is for adapters that go on; set --lora.rank to that of the generator's"
            )
        if self.rank < 0 or self.alpha < 0:
            raise ConfigError(
                f"lora.rank and lora.alpha must not be negative, got {self.rank} and {self.alpha}"
            )


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """A loss on clips that are not trained on, under the averaged weights; off unless one of share,
    clips and path says which.

    Attributes:
        share: about which share of the data's files is held out, in (0, 1). Names decide, so that
            every stage on the data holds out the same ones.
        clips: how many files are held out instead. Of the digits: how many clips in handwriting
            that is never trained on.
        path: a folder of clips of their own instead, of the kind of data.path.
        every: updates between two measurements; each reads, encodes and passes all these clips.
    """

    share: float = 0.0
    clips: int = 0
    path: str = ""
    every: int = 100

    @property
    def is_on(self) -> bool:
        """Whether anything is held out."""
        return bool(self.share or self.clips or self.path)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move.

    Attributes:
        name: "rmsprop" (the paper: alpha 0.9, which is Adam with betas 0 and 0.9) or "adamw".
        learning_rate: after the warm-up and before the decay.
        warmup_updates: linear from 0.
        decay_updates: linear to 0 over the last updates of the run; 0 keeps the rate constant, as
            the paper does.
        alpha: RMSprop's smoothing.
        betas: AdamW's.
        eps: added to the root of the second moment.
        weight_decay: AdamW only; the paper has none.
        max_grad_norm: clip the gradient's norm; 0 does not clip, as the paper.
    """

    name: Literal["rmsprop", "adamw"] = "rmsprop"
    learning_rate: float = 1e-4
    warmup_updates: int = 0
    decay_updates: int = 0
    alpha: float = 0.9
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
        name: of the recipe; goes into logs and model folders.
        run_dir: where checkpoints, logs, samples and the finished model go.
        stage: the options of the stage that it is (`apt.methods`).
        model, data, optimizer, lora, heldout, monitor, parallel: see there. Generator and
            discriminator have one optimizer config, as in the paper, except D's own learning rate
            if the stage gives one.
        seed: of everything random.
        num_updates: updates of the (generator's) weights.
        batch_size: samples per update over all ranks and accumulation steps.
        micro_batch_size: samples per rank that go through the network at once; 0 is all of the
            rank's share. Gradients of micro-batches are accumulated.
        ema_decay: of the exported weights.
        ema_warmup: the decay of update n, from 0, is at most (1 + n) / (10 + n), so that the
            average soon forgets where it began. None does so where random weights would otherwise
            keep more than 5 % of it at the end: in pre-training, if ema_decay ** num_updates is
            above 0.05. A resumed run keeps what it began with.
        negative_prompt: fixed, for guidance and caption dropout; None is that of the model that the
            stage starts from, or none.
        precision: "fp32", or "bf16" autocast with fp32 weights; "auto" is bf16 where the device
            computes in it: a GPU, or a CPU with AVX-512 BF16 or AMX.
        activation_checkpointing: recompute blocks in the backward pass, of which only inputs are
            kept.
        checkpointing: what is kept beside (`apt.models.checkpointing`): the outputs of attention,
            and whether inputs wait in host memory.
        compile_blocks: let `torch.compile` make the blocks that train; the first updates then take
            minutes. Results are the same except for rounding.
        bf16_residual: in bf16, tokens between blocks stay bf16 also in MMDiT with shared
            modulation, whose fp32 gates make them fp32: half the memory of checkpoints. The other
            families have bf16 there in any case.
        device: "auto", "cpu" or "cuda".
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: how many of the newest stay.
        checkpoint_every_minutes: of rank 0's clock, after which one is written besides, at the end
            of the update; 0 goes by updates alone.
        checkpoint_in_background: train on while a copy of the state, in host memory, is hashed and
            written.
        replay_every: updates between checks of the hardware: each part of the update computes its
            first micro-batch twice more, and every module must come out the same, bit for bit; 0
            for none. Attention and other operations must be deterministic.
        timeout_minutes: how long ranks wait for one that is dead or hangs, before the run ends and
            says which.
        snapshot_at: updates at which EMA and raw weights are exported to `snapshots/`.
        sample_every: updates between sample sheets; 0 for none.
        sample_prompts: what the sheets show, and the collapse monitor looks at. None is what the
            model that the stage starts from was shown with, or captions from all over the folder;
            the option without a value is none.
        wandb_project: of Weights & Biases, which then gets metrics and sheets too; empty: none
            does. WANDB_MODE=offline keeps them in the run's folder.
    """

    name: str
    run_dir: str
    stage: StageConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    num_updates: int = 1000
    batch_size: int = 32
    micro_batch_size: int = 0
    ema_decay: float = 0.995
    ema_warmup: bool | None = None
    negative_prompt: str | None = None
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    activation_checkpointing: bool = False
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    compile_blocks: bool = False
    bf16_residual: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    checkpoint_every_minutes: float = 0.0
    checkpoint_in_background: bool = True
    replay_every: int = 0
    timeout_minutes: float = 10.0
    snapshot_at: tuple[int, ...] = ()
    sample_every: int = 100
    sample_prompts: tuple[str, ...] | None = None
    wandb_project: str = ""

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("num_updates", "batch_size", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch_size", "sample_every", "replay_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        # A class; whether its options are right is asked when all of them are known.
        gives_latents = getattr(DATASETS.get(self.data.source), "gives_latents", False)
        if gives_latents and not self.stage.takes_latents:
            raise ConfigError(
                f"this stage is trained on pixels, and --data.source {self.data.source} has "
                "latents; set it to folder"
            )
        if self.checkpointing != Checkpointing() and not self.activation_checkpointing:
            raise ConfigError(
                "checkpointing.saves_attention and checkpointing.offloads are for blocks that are "
                "recomputed; add --activation-checkpointing"
            )
        if self.compile_blocks:
            self.stage.check_compiled()
            if self.checkpointing.saves_attention:
                raise ConfigError(
                    "checkpointing.saves_attention watches each operation of a block, of which a "
                    "compiled one has none; leave it out, or set --no-compile-blocks"
                )
        if self.lora.rank:
            self.stage.check_adapters()
        decay = self.optimizer.decay_updates
        if decay > self.num_updates:
            raise ConfigError(
                f"optimizer.decay_updates {decay} is longer than the run of {self.num_updates} "
                "updates, whose learning rate would never reach its value; set "
                f"--optimizer.decay-updates to at most {self.num_updates} (0 keeps the rate "
                "constant)"
            )

    def _check_numbers(self) -> None:
        # Here and not in each part: the command line wraps what a part raises into a usage message.
        parts = ("optimizer", "stage", "data", "heldout", "monitor")
        check_finite(self, "")
        for name in parts:
            check_finite(getattr(self, name), f"{name}.")
        check_range(self, "", {"ema_decay": (0, 1), "seed": (0, 2**63 - 1)})
        check_range(self, "", {"checkpoint_every_minutes": (0, math.inf)})
        check_positive(self, "", "timeout_minutes")
        check_positive(self.optimizer, "optimizer.", "learning_rate")
        counts = ("warmup_updates", "decay_updates", "eps", "weight_decay", "max_grad_norm")
        check_range(self.optimizer, "optimizer.", dict.fromkeys(counts, (0, math.inf)))
        smoothing: dict[str, tuple[float, float]] = {"alpha": (0, 1), "betas": (0, 1)}
        check_range(self.optimizer, "optimizer.", smoothing, open_end=True)
        if self.optimizer.name == "rmsprop" and self.optimizer.weight_decay:
            raise ConfigError(
                f"optimizer.weight_decay {self.optimizer.weight_decay:g} is for adamw only; set "
                "--optimizer.name adamw, or --optimizer.weight-decay 0"
            )
        self.stage.check()
        check_range(self.heldout, "heldout.", {"share": (0, 1)}, open_end=True)
        check_range(self.heldout, "heldout.", {"clips": (0, math.inf), "every": (1, math.inf)})
        given = [f"--heldout.{n}" for n in ("share", "clips", "path") if getattr(self.heldout, n)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} each say what is held out; leave one of them")
        sizes = ("frames", "height", "width", "size_multiple", "max_frames", "max_pixels")
        check_range(self.data, "data.", dict.fromkeys(sizes, (1, math.inf)))
        check_range(self.data, "data.", {"fps": (0, math.inf), "num_workers": (0, math.inf)})
