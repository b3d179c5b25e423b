"""The configuration of a training run: frozen, keyword-only, one tree for every stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from apt.errors import ConfigError
from apt.train.monitor import MonitorConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from.

    Attributes:
        source: "digits", the built-in stream; "folder", your own videos and images; or "latents",
            what `diffusion-apt data encode` made of such a folder, whose size and rate then hold.
        path: the folder, for sources "folder" and "latents".
        frames, height, width: size of a clip; frames are 4k + 1. In a folder, height times width
            is the pixel budget of the aspect-ratio buckets.
        fps: frame rate of the clips; 0 keeps each video's own.
        size_multiple: heights and widths of the buckets are multiples of this (codec x patch).
        native_ratio: aspect-ratio buckets near each file's own shape; False crops all to
            height x width.
        images: "mix" trains on images as one-frame videos beside the videos; "only" and "none".
            A latent cache with both can be used for any of these.
        num_workers: processes that decode ahead; 0 decodes in the trainer.
        strict: stop at the first file that cannot be used, instead of skipping and reporting it.
    """

    source: Literal["digits", "folder", "latents"] = "digits"
    path: str = ""
    frames: int = 9
    height: int = 32
    width: int = 32
    fps: float = 8.0
    size_multiple: int = 8
    native_ratio: bool = True
    images: Literal["mix", "only", "none"] = "mix"
    num_workers: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.path and self.source == "digits":
            raise ConfigError(
                f"--data.path {self.path} is a folder, but the data source is the built-in digits; "
                "add --data.source folder (or latents)"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The networks of a pre-training run; later stages take theirs from the model they start from.

    Attributes:
        name: registered backbone.
        options: fields of its config to change, for example {"depth": 4}.
        text_encoder, text_encoder_options: likewise; it is trained if it has weights of its own.
        codec, codec_options: likewise; never trained.
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
    """

    rank: int = 0
    alpha: int = 0
    targets: tuple[str, ...] = ()
    discriminator: bool = True

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0:
            raise ConfigError(
                f"lora.rank and lora.alpha must not be negative, got {self.rank} and {self.alpha}"
            )


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
class PretrainConfig:
    """Flow-matching pre-training (APT Sec. 3.1).

    Attributes:
        timestep_sampling: how t is drawn before the shift.
        timestep_shift: s of Eq. 7, applied to the training timesteps.
        caption_dropout: share of captions replaced by the negative prompt, for guidance.
        cfg_scale, num_steps, sampling_shift: recorded as the model's sampling defaults;
            sampling_shift is s of Eq. 7 on the grid of timesteps.
    """

    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float = 1.0
    caption_dropout: float = 0.1
    cfg_scale: float = 7.5
    num_steps: int = 25
    sampling_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout must be in [0, 1], got {self.caption_dropout}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Consistency distillation (APT Sec. 3.2).

    Attributes:
        teacher: the diffusion model: built-in name, folder or Hub id.
        cfg_scale: constant guidance scale of the teacher.
        num_timesteps: intervals of the discretised trajectory.
        timestep_shift: s of Eq. 7, applied to the grid.
        target_decay: EMA of the target network.
    """

    teacher: str = ""
    cfg_scale: float = 7.5
    num_timesteps: int = 50
    timestep_shift: float = 1.0
    target_decay: float = 0.95


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Adversarial post-training (APT Secs. 3.3-3.5). A weight of 0 switches a term off.

    Attributes:
        generator: the distilled model that G starts from: built-in name, folder or Hub id.
        discriminator: the diffusion model that D's backbone starts from.
        generator_trains: "all" of G's weights, as in the paper, or its transformer "blocks" only. A
            small D sees little of the finest detail, and what it does not see, the gradients of the
            output layers are noise for.
        head: registered discriminator head.
        layers: blocks that heads read, counted from 1; empty scales the paper's to the depth.
        discriminator_learning_rate: of D; 0 takes the optimizer's, as the paper does. A small batch
            needs a D that is faster than G (Heusel et al. 2017).
        freeze_discriminator_backbone: train D's heads only (APT App. F: worse).
        timestep_shift: s of Eq. 7 for D's timestep input.
        objective: registered adversarial objective.
        r1_weight, r1_sigma: approximated R1 (Eq. 9); sigma is a standard deviation.
        r1_normalize: "sigma2" divides the penalty by sigma squared.
        r1_fraction: share of the batch that it is computed on.
        r2_weight: the same on generated samples, with r1_sigma.
        exact_r1_weight: exact R1 (Eq. 8) by double backward; reference ops only.
        logit_centring_weight, feature_matching_weight, mismatched_weight: see `apt.losses`.
    """

    generator: str = ""
    discriminator: str = ""
    generator_trains: Literal["all", "blocks"] = "all"
    head: str = "attention"
    layers: tuple[int, ...] = ()
    discriminator_learning_rate: float = 0.0
    freeze_discriminator_backbone: bool = False
    timestep_shift: float = 1.0
    objective: str = "non_saturating"
    r1_weight: float = 100.0
    r1_sigma: float = 0.1
    r1_normalize: Literal["sigma2"] | None = None
    r1_fraction: float = 1.0
    r2_weight: float = 0.0
    exact_r1_weight: float = 0.0
    logit_centring_weight: float = 0.0
    feature_matching_weight: float = 0.0
    mismatched_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.discriminator_learning_rate < 0:
            raise ConfigError(
                "discriminator_learning_rate must not be negative, got "
                f"{self.discriminator_learning_rate}; 0 takes the optimizer's"
            )


StageConfig = PretrainConfig | DistillConfig | AdversarialConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
        name: of the recipe; goes into logs and model folders.
        run_dir: where checkpoints, logs, samples and the finished model go.
        stage: what is trained and how; its type is the stage.
        model, data, optimizer, lora, monitor: see there. Generator and discriminator have one
            optimizer config, as in the paper, but for D's own learning rate if the stage gives one.
        seed: of everything random.
        num_updates: updates of the (generator's) weights.
        batch_size: samples per update over all ranks and accumulation steps.
        micro_batch_size: samples per rank that go through the network at once; 0 is all of the
            rank's share. Gradients of micro-batches are accumulated.
        ema_decay: of the exported weights.
        negative_prompt: fixed, for guidance and caption dropout.
        precision: "fp32", or "bf16" autocast with fp32 weights.
        activation_checkpointing: recompute blocks in the backward pass.
        device: "auto", "cpu" or "cuda".
        checkpoint_every: updates between checkpoints; keep_checkpoints: how many stay.
        snapshot_at: updates at which EMA and raw weights are exported to `snapshots/`.
        sample_every: updates between sample sheets; 0 for none.
        sample_prompts: what the sheets show, and the collapse monitor looks at.
    """

    name: str
    run_dir: str
    stage: StageConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    seed: int = 0
    num_updates: int = 1000
    batch_size: int = 32
    micro_batch_size: int = 0
    ema_decay: float = 0.995
    negative_prompt: str = ""
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    snapshot_at: tuple[int, ...] = ()
    sample_every: int = 100
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_updates", "batch_size", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch_size", "sample_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.lora.rank and isinstance(self.stage, PretrainConfig):
            raise ConfigError(
                "lora.rank is for later stages: pre-training starts from random weights, which "
                "adapters would leave as they are"
            )
        if (
            self.lora.rank
            and isinstance(self.stage, AdversarialConfig)
            and self.stage.generator_trains != "all"
        ):
            raise ConfigError(
                "with lora.rank only adapters train; lora.targets says where they go, so set "
                "stage.generator_trains to all"
            )
        if self.optimizer.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be positive, got {self.optimizer.learning_rate}")
