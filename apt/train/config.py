"""The configuration of a training run: one tree of frozen, keyword-only dataclasses."""

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
            "folder", your own videos and images; "latents", the output of `diffusion-apt data
            encode`, which also sets size and frame rate; or your own source (--import).
        setting: setting of the built-in digits: "centred", "free" (places and backgrounds vary),
            "near" (places vary less), or "large" ("free" with 17 frames of 64x64).
        path: the folder, for sources that read one.
        options: other options of your own source.
        frames, height, width: size of a clip; frames are 4k + 1. In a folder, height times width
            is the pixel budget of the aspect-ratio buckets. None, also for fps, takes the value of
            the model or trained codec that the stage starts from. A first stage then takes what
            most files of a folder allow (`apt.data.statistics`), or the digits' own size.
        fps: frame rate of the clips; 0 keeps each video's own.
        max_frames, max_pixels: limits for clips from a folder if the size is left open; pixels are
            height times width.
        size_multiple: heights and widths of the buckets are multiples of this; None is the codec's
            compression times the model's patch.
        native_ratio: use aspect-ratio buckets near each file's own shape; False crops all to
            height x width.
        images: "mix" trains on videos, and on images as one-frame videos; "only" uses only images,
            and "none" leaves them out. A latent cache with both can be used for any of these.
        num_workers: processes that decode ahead; 0 decodes in the trainer.
        long_captions: for captions with more tokens than the text encoder takes: "skip" and report
            the sample, "cut" the caption to what fits, or stop with an "error".
        strict: stop at the first unusable file instead of skipping and reporting it.
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
        """Size and frame rate of a clip; fields that are None are those of the digits."""
        digits = clip_size(self.setting)
        return SampleInfo(
            frames=digits.frames if self.frames is None else self.frames,
            height=digits.side if self.height is None else self.height,
            width=digits.side if self.width is None else self.width,
            fps=float(digits.fps) if self.fps is None else self.fps,
        )

    def make_source(self) -> DataSource:
        """Create the source with its options.

        Raises ConfigError for an unknown source or option, and lists close matches.
        """
        kind = DATASETS.get(self.source)
        options: dict[str, Any] = dict(self.options)
        if self.source == DIGITS:
            options.setdefault("setting", self.setting)
        if self.path:
            if "path" not in inspect.signature(kind).parameters:
                raise ConfigError(
                    f"--data.path {self.path} names a folder, but the data source "
                    f"{self.source!r} reads none; add --data.source folder (or latents)"
                )
            options["path"] = self.path
        return DATASETS.create(self.source, **options)

    def request(
        self, *, seed: int, captions: CaptionRule | None = None, captioned: bool = True
    ) -> ClipRequest:
        """Return the request for clips; sizes and rates that are None are those of the digits."""
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
    """The networks of a pre-training run. Later stages take them from the model they start from.

    Attributes:
        name: registered backbone.
        options: fields of its config to change, for example {"depth": 4}.
        text_encoder, text_encoder_options: registered text encoder, and fields of its config; it
            is trained if it has weights.
        codec, codec_options: registered codec, and fields of its config; only a codec run trains
            it.
    """

    name: str = "mmdit_digits"
    options: dict[str, int | float | str] = field(default_factory=dict)
    text_encoder: str = "bytes"
    text_encoder_options: dict[str, int | float | str] = field(default_factory=dict)
    codec: str = "patchify"
    codec_options: dict[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train low-rank adapters instead of the weights (Hu et al. 2022; needs peft).

    The adapters are merged into the finished model, and also saved alone in
    `pytorch_lora_weights.safetensors`.

    Attributes:
        rank: rank of the change of each weight; 0 trains the weights themselves.
        alpha: the change is scaled by alpha / rank; 0 takes the rank, a scale of 1.
        targets: ends of the names of linear layers, such as "attn1.to_q"; empty takes all linear
            layers in the blocks.
        discriminator: also train D's backbone by adapters; its heads train in full.
        base: the model on which the adapters in the generator's folder were trained. Training
            continues those adapters beside that model's weights, which all networks that start from
            it share on one GPU. Empty: the weights with those adapters merged in are the base of
            new ones.
    """

    rank: int = 0
    alpha: int = 0
    targets: tuple[str, ...] = ()
    discriminator: bool = True
    base: str = ""

    def __post_init__(self) -> None:
        if self.base and not self.rank:
            raise ConfigError(
                "lora.base continues the generator's adapters, but lora.rank is 0; set --lora.rank "
                "to the rank of those adapters"
            )
        if self.rank < 0 or self.alpha < 0:
            raise ConfigError(
                f"lora.rank and lora.alpha must not be negative, got {self.rank} and {self.alpha}"
            )


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """Measure losses of the averaged weights on clips that are not trained on.

    Off unless one of share, clips and path is set.

    Attributes:
        share: approximate share of the files to hold out, in (0, 1). File names decide, so every
            stage on the data holds out the same files.
        clips: number of files to hold out instead. With the digits, the number of clips in
            handwriting that is never trained on.
        path: a separate folder of held-out clips instead, of the same kind as data.path.
        every: updates between measurements; each measurement reads and encodes all held-out clips.
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
    """The optimiser and its learning-rate schedule.

    Attributes:
        name: "rmsprop" (the paper: alpha 0.9, which is Adam with betas 0 and 0.9) or "adamw".
        learning_rate: learning rate after warm-up and before decay.
        warmup_updates: updates over which the rate rises linearly from 0.
        decay_updates: last updates of the run, over which the rate falls linearly to 0; 0 keeps it
            constant, as in the paper.
        alpha: smoothing of RMSprop.
        betas: betas of AdamW.
        eps: added to the root of the second moment.
        weight_decay: for AdamW only; the paper has none.
        max_grad_norm: clip the gradient's norm; 0 does not clip, as in the paper.
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
        name: name of the recipe, for logs and model folders.
        run_dir: folder for checkpoints, logs, samples and the finished model.
        stage: options of the stage (`apt.methods`).
        model, data, optimizer, lora, heldout, monitor, parallel: see their classes. Generator and
            discriminator share the optimizer config, as in the paper, but a stage can set another
            learning rate for D.
        seed: seed of all random numbers.
        num_updates: updates of the (generator's) weights.
        batch_size: samples per update, over all ranks and accumulation steps.
        micro_batch_size: samples per rank in one pass; 0 takes the rank's whole share. Gradients of
            micro-batches are accumulated.
        ema_decay: decay of the averaged weights, which are exported.
        ema_warmup: limit the decay of update n, from 0, to (1 + n) / (10 + n), so that the average
            soon forgets its start. None does this where random weights would otherwise make up
            more than 5 % of the average at the end: in pre-training, if ema_decay ** num_updates
            is above 0.05. A resumed run keeps its first choice.
        negative_prompt: fixed, for guidance and caption dropout; None takes that of the model that
            the stage starts from, if it has one.
        precision: "fp32", or "bf16" autocast with fp32 weights; "auto" is bf16 where the device
            supports it: on a GPU, or a CPU with AVX-512 BF16 or AMX.
        activation_checkpointing: keep only the inputs of blocks, and recompute blocks in the
            backward pass.
        checkpointing: options of activation checkpointing (`apt.models.checkpointing`): also keep
            the outputs of attention, or keep the inputs of blocks in host memory.
        compile_blocks: compile the blocks that train with `torch.compile`; the first updates then
            take minutes. Results are the same except for rounding.
        bf16_residual: in bf16, also keep tokens between blocks in bf16 in MMDiT with shared
            modulation, whose fp32 gates otherwise make them fp32; this halves the memory of
            checkpointed inputs. In other families these tokens always are bf16.
        device: "auto", "cpu" or "cuda".
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: number of the newest checkpoints to keep.
        checkpoint_every_minutes: also write a checkpoint when so many minutes have passed on rank
            0's clock, at the end of the update; 0 goes by updates alone.
        checkpoint_in_background: continue training while a copy of the state in host memory is
            hashed and written.
        replay_every: updates between checks of the hardware, 0 for none. A check computes the
            first micro-batch of each part of the update twice more, and compares the outputs of
            every module bit for bit. Attention and other operations must be deterministic.
        timeout_minutes: how long ranks wait for a dead or hung rank before the run ends and names
            it.
        snapshot_at: updates at which EMA and raw weights are exported to `snapshots/`.
        sample_every: updates between sample sheets; 0 for none.
        sample_prompts: prompts of the sample sheets and of the collapse monitor. None takes those
            of the model that the stage starts from, or captions spread over the folder; the option
            without a value means no prompts.
        wandb_project: project of Weights & Biases that also gets metrics and sheets; empty for
            none. WANDB_MODE=offline keeps them in the run's folder.
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
        # Look at the class only; its options are checked when all of them are known.
        gives_latents = getattr(DATASETS.get(self.data.source), "gives_latents", False)
        if gives_latents and not self.stage.takes_latents:
            raise ConfigError(
                f"this stage trains on pixels, but --data.source {self.data.source} has latents; "
                "use --data.source folder"
            )
        if self.checkpointing != Checkpointing() and not self.activation_checkpointing:
            raise ConfigError(
                "checkpointing.saves_attention and checkpointing.offloads only apply to recomputed "
                "blocks; add --activation-checkpointing"
            )
        if self.compile_blocks:
            self.stage.check_compiled()
            if self.checkpointing.saves_attention:
                raise ConfigError(
                    "checkpointing.saves_attention intercepts the operations of a block, which is "
                    "impossible in a compiled one; leave it out, or set --no-compile-blocks"
                )
        if self.lora.rank:
            self.stage.check_adapters()
        decay = self.optimizer.decay_updates
        if decay > self.num_updates:
            raise ConfigError(
                f"optimizer.decay_updates {decay} exceeds num_updates {self.num_updates}, so the "
                "learning rate would never reach its full value; set "
                f"--optimizer.decay-updates to at most {self.num_updates} (0 keeps the rate "
                "constant)"
            )

    def _check_numbers(self) -> None:
        # Checked here because the command line turns errors of a part into a usage message.
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
            raise ConfigError(f"{' and '.join(given)} exclude each other; set only one of them")
        sizes = ("frames", "height", "width", "size_multiple", "max_frames", "max_pixels")
        check_range(self.data, "data.", dict.fromkeys(sizes, (1, math.inf)))
        check_range(self.data, "data.", {"fps": (0, math.inf), "num_workers": (0, math.inf)})
