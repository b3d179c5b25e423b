"""What a stage of training is: its config, its networks, one update of them, and what comes out.

Most stages are methods, which train a generator. A stage names no trainer. Whoever runs it gives it
a `Host`, which has what the run starts from and puts networks to work: moves them to the device,
shards them, gives them an optimiser and an average.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from apt.checkpoints.info import ModelInfo, SampleInfo, SamplingInfo
from apt.checkpoints.load import ModelBundle
from apt.checkpoints.lora import LoRALayer, MergedWeights, save_lora
from apt.checkpoints.save import save_bundle
from apt.checkpoints.weights import empty_module
from apt.condition import Condition, EncodedText
from apt.errors import ConfigError
from apt.models.transformer import DiffusionTransformer
from apt.pixels import LatentCodec
from apt.rng import Draw, sample_noise, sample_uniform

Metrics = dict[str, float | Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a rank's batch that goes through the networks at once.

    Attributes:
        x: clean latents (b, C, T, H, W); pixels for a stage without a codec.
        captions: b texts.
        offset: index of the first sample in the global batch; random draws are keyed by it.
        extra: what the samples are conditioned on beside captions, by name, each (b, ...).
        texts: captions as the text encoder has made them for an earlier part of the same update,
            on the host; a method's own.
    """

    x: Tensor
    captions: list[str]
    offset: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    texts: dict[str, EncodedText] = field(default_factory=dict)

    def __len__(self) -> int:
        """b."""
        return len(self.captions)


class Pass(NamedTuple):
    """A forward pass of a backbone in an update, and how far it is gone back through.

    Attributes:
        backbone: as it is: of a depth, and with its blocks.
        samples: that it sees for each sample of the batch.
        backward: 0 for no gradients, 1 for those of its inputs, 2 for those of its weights too;
            each takes as much as the pass.
    """

    backbone: DiffusionTransformer
    samples: float
    backward: Literal[0, 1, 2]


Part = Callable[[Sequence[MicroBatch], int], Metrics]
"""A part of an update: see `Stage.parts`."""


@dataclass(frozen=True)
class Preview:
    """What a sample sheet shows.

    Attributes:
        latents: (B, C, T, H, W), or pixels.
        names: of each.
        generated: whether they are samples, whose collapse is watched for; clips of the batch may
            well be alike.
        shows: what each row of the sheet holds.
    """

    latents: Tensor
    names: tuple[str, ...]
    generated: bool = True
    shows: str = "frames"


@dataclass(frozen=True)
class Outcome:
    """Weights of the network that gets exported, and what is said of them.

    Attributes:
        weights: whole tensors by name, on the CPU; each is made when it is asked for.
        adapters: to be merged into them, by name of the layer in a backbone.
        config: of the stage.
        sample: the size of what it was trained on.
        training: the record, without the stages before.
        dtype: of the weights in files; None keeps fp32.
    """

    weights: Mapping[str, Tensor]
    adapters: dict[str, LoRALayer]
    config: StageConfig
    sample: SampleInfo
    training: dict[str, Any]
    dtype: torch.dtype | None = None


class Denoiser(nn.Module):
    """A backbone, and the text encoder if that is trained with it: one unit for FSDP and EMA."""

    def __init__(
        self, backbone: DiffusionTransformer, text_encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder

    def forward(self, x: Tensor, t: Tensor, c: Condition, *, rows: Tensor | None = None) -> Tensor:
        """The backbone's velocity."""
        return self.backbone(x, t, c, rows=rows)

    def encode(self, prompts: Sequence[str]) -> EncodedText:
        """Encoded prompts, with gradients to the trained text encoder."""
        assert self.text_encoder is not None
        return self.text_encoder(prompts)


class Average(Protocol):
    """An exponential moving average of a network's weights."""

    def update(self, module: nn.Module, update: int = ...) -> None:
        """Move it towards the module's present weights."""

    def applied(self, module: nn.Module) -> AbstractContextManager[None]:
        """Let a module carry it inside the `with` block."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, live."""
        ...


class TrainedNetwork(Protocol):
    """A network with its optimiser and, for generators, its average."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def ema(self) -> Average | None: ...

    @property
    def moves(self) -> int:
        """How often its weights began to move, in this process."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def accumulated(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Micro-batches whose gradients add up, in a loop around forward and backward pass."""
        ...

    def step(self, update: int) -> float:
        """Move weights and average; `update` counts from 0. Returns the gradient's norm."""
        ...

    def rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        ...

    def state(self) -> dict[str, Any]:
        """All that training changes, as live tensors by name."""
        ...


class Host(Protocol):
    """What runs a stage.

    Attributes:
        seed: of all random draws.
        device: where the networks are.
        negative_prompt: fixed, for guidance and caption dropout.
    """

    @property
    def seed(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def negative_prompt(self) -> str: ...

    def model(self) -> ModelBundle:
        """The model that the generator starts from; its backbone as in `backbone`."""
        ...

    def backbone(self, field: str) -> tuple[DiffusionTransformer, ModelInfo]:
        """The backbone of the model that a field of the stage names, and what is said of that
        model. It may be on the meta device, and has weights once it is in a network that `train`
        or `place` was given."""
        ...

    def codec(self) -> tuple[str, LatentCodec]:
        """A new codec as the run describes it, and its registered name."""
        ...

    def over_ranks(self, values: Tensor) -> Tensor:
        """The mean over the ranks of a small tensor that each has of its own samples."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of forward passes."""
        ...

    def adapt(self, backbone: DiffusionTransformer, *, discriminator: bool = False) -> None:
        """Activation checkpointing and adapters, as the run wants them."""

    def train(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        averaged: bool,
        learning_rate: float | None = None,
        slowed: tuple[nn.Module, float] | None = None,
        forward_methods: Sequence[str] = (),
        exact: bool = False,
    ) -> TrainedNetwork:
        """Place, shard by `blocks`, and give an optimiser.

        None is the run's learning rate; `slowed` is a part of the network and the share of the rate
        that it trains at; `exact` computes in fp32 or TF32 also in a run in bf16.
        """
        ...

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Move a network to the device, and shard it.

        What does not train may be held in bf16 from then on, if that is what is computed with.
        """

    def average(
        self, network: nn.Module, decay: float, *, inside: nn.Module | None = None
    ) -> Average:
        """An average that the method keeps itself, in a network of its own if it is given one."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageConfig(ABC):
    """The options of a stage, and what holds for all that it makes.

    Class attributes:
        exports_as: the stage in `apt.json`: "diffusion", "consistency", "apt", "codec", or a name
            of its own.
        summary: what comes out, in a line, for its card.
        starts_from: the field that names the model which the stage starts from; None starts from
            random weights.
        may_begin_anew: that field may be empty, which starts from random weights too.
        names_models: all fields that name a model: a built-in name, a folder, or a Hub id.
        names_folders: fields that name a folder, which nobody else gets to read.
        takes_latents: whether it can be run on a cache of latents.
        reads_captions: whether captions are encoded.
    """

    exports_as: ClassVar[str]
    summary: ClassVar[str]
    starts_from: ClassVar[str | None] = None
    may_begin_anew: ClassVar[bool] = False
    names_models: ClassVar[tuple[str, ...]] = ()
    names_folders: ClassVar[tuple[str, ...]] = ()
    takes_latents: ClassVar[bool] = True
    reads_captions: ClassVar[bool] = True

    @property
    def start_field(self) -> str | None:
        """The field that names the model which this run starts from; None for random weights."""
        field = self.starts_from
        anew = field is None or (self.may_begin_anew and not getattr(self, field))
        return None if anew else field

    @abstractmethod
    def begin(self, host: Host) -> Stage:
        """The stage at work on what its host has."""

    def trained_codec(self) -> str:
        """The codec that a new model works in: a folder or a Hub id; empty for the run's own."""
        return ""

    def filled(self, start: ModelInfo) -> StageConfig:
        """The options, with what they leave open as the model has it that the stage starts from."""
        return self

    def check_adapters(self) -> None:  # noqa: B027  (most stages can)
        """Raise ConfigError if the stage cannot train adapters in place of the weights."""

    def check_compiled(self) -> None:  # noqa: B027  (most stages can)
        """Raise ConfigError if the stage does what compiled blocks cannot."""

    def check_sharded(self) -> None:  # noqa: B027  (most stages can)
        """Raise ConfigError if the stage cannot be trained by several ranks."""

    def check(self) -> None:  # noqa: B027  (not every stage has limits)
        """Raise ConfigError, with the option's name, for numbers out of range."""

    def source(self, field: str) -> str:
        """The model that a field names. Raises ConfigError if the field is empty."""
        value = str(getattr(self, field))
        if not value:
            raise ConfigError(
                f"--stage.{field} is empty: name the model to start from, a folder that a training "
                "run exported, a built-in name, or a Hub id"
            )
        return value


class Stage(ABC):
    """Networks in training.

    Attributes:
        trained: by name; "generator" is always there, and is what gets exported.
        codec: makes latents of pixels and pixels of previews; None works on pixels.
        frozen: parts that have to be on the device and do not train.
        shares_batch: whether the parts of an update go over the same samples; otherwise each gets
            a batch of its own.
    """

    trained: dict[str, TrainedNetwork]
    codec: LatentCodec | None = None
    frozen: Sequence[nn.Module] = ()
    shares_batch: bool = True

    def __init__(self, host: Host) -> None:
        self.host = host

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """The parts of an update by name, in their order.

        Each moves weights once, at its end; between two, a run can stop and go on. A part takes
        micro-batches of equal size and the number of the update, from 0, and returns metrics, each
        a mean over this rank's samples.
        """

    @property
    def batches_per_update(self) -> int:
        """Global batches that an update goes over."""
        return 1 if self.shares_batch else len(self.parts())

    def update(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """One whole update on the same samples: all parts, and their metrics."""
        metrics: Metrics = {}
        for part in self.parts().values():
            metrics |= part(batches, update)
        return metrics

    def check_prompts(self, shown: Sequence[str]) -> None:  # noqa: B027  (not all encode any)
        """Raise InputError for prompts that a later update would stop at.

        `shown` are those of sample sheets.
        """

    def heldout(self, batch: MicroBatch) -> Metrics:
        """What the networks' present weights make of clips that are not trained on.

        Means over the batch, by the names of the metrics in training. Noise and timesteps depend on
        the seed and on `batch.offset` alone, so that two updates can be compared; nothing that
        training goes on from may change. A stage that has no such measure leaves this out.
        """
        return {}

    @abstractmethod
    def samples(
        self, prompts: tuple[str, ...], clip: SampleInfo, batches: Sequence[MicroBatch]
    ) -> Preview | None:
        """What a sheet shows, as the generator's present weights make it; None for none.

        `batches` are those of the update.
        """

    @abstractmethod
    def save(self, folder: Path, outcome: Outcome) -> None:
        """Write what is exported to a folder."""

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the trained networks."""
        return {}

    def passes(self) -> Sequence[Pass]:
        """What an update computes with backbones, for rates in the log; empty if it is not told."""
        return []

    def warnings(self) -> list[str]:
        """What the user should know before the run costs time."""
        return []

    @property
    def generator(self) -> TrainedNetwork:
        return self.trained["generator"]

    def draw(self, batch: MicroBatch, update: int, stream: str) -> Draw:
        """The key of a batch's random draws, which go to its device."""
        return Draw(self.host.seed, update, batch.offset, stream, batch.x.device)

    def uniform(self, batch: MicroBatch, update: int, stream: str) -> Tensor:
        """(b,) uniform in [0, 1), left on the CPU: looking at them waits for no GPU."""
        draw = Draw(self.host.seed, update, batch.offset, stream)
        return sample_uniform(len(batch), draw)


def even_timesteps(batch: MicroBatch) -> Tensor:
    """(b,) in [0, 1), on the CPU: the same for a sample whenever it is asked for.

    Those of any number of samples lie evenly, as multiples of the golden ratio do.
    """
    places = torch.arange(batch.offset + 1, batch.offset + 1 + len(batch), dtype=torch.float64)
    return (places * ((5**0.5 - 1) / 2) % 1).float().clamp(max=1 - 2**-24)


@dataclass(frozen=True, kw_only=True)
class MethodConfig(StageConfig):
    """The options of a method: a stage that trains a generator."""

    def begin(self, host: Host) -> Method:
        return self.build(host.model(), host)

    @abstractmethod
    def build(self, start: ModelBundle, host: Host) -> Method:
        """The method at work on `start`, the generator's bundle."""

    @abstractmethod
    def sampling(self, before: SamplingInfo) -> SamplingInfo:
        """How an exported model is sampled, where its start was sampled as `before`."""


class Method(Stage):
    """A generator in training.

    Attributes:
        start: the bundle that the run began with: text encoder, codec and description.
    """

    def __init__(self, start: ModelBundle, host: Host) -> None:
        super().__init__(host)
        self.start = start
        self.codec = start.codec
        self.frozen = (start.codec, start.text_encoder)

    @property
    def asks_again(self) -> bool:
        """Whether a second part of an update comes to a sample of the first."""
        return self.shares_batch and len(self.parts()) > 1

    def prompts(self) -> list[str]:
        """Prompts besides the captions that the text encoder will be asked for."""
        return []

    def check_prompts(self, shown: Sequence[str]) -> None:
        prompts = [*shown, *self.prompts()]
        if prompts:
            self.start.text_encoder.check(prompts)

    @abstractmethod
    def preview(self, z: Tensor, c: Condition) -> Tensor:
        """Latents (B, C, T, H, W) from noise, as the generator's present weights make them."""

    def samples(
        self, prompts: tuple[str, ...], clip: SampleInfo, batches: Sequence[MicroBatch]
    ) -> Preview | None:
        """One sample of each prompt, always from the same noise.

        If data give more than captions, a prompt takes that of one of the update's samples, and
        its size.
        """
        if not prompts:
            return None
        codec = self.start.codec
        size = codec.latent_shape(clip.frames, clip.height, clip.width)
        shape: Sequence[int] = (codec.channels, *size)
        extra: Mapping[str, Tensor] = {}
        if batches and batches[0].extra:
            shape = batches[0].x.shape[1:]
            rows = torch.arange(len(prompts), device=batches[0].x.device) % len(batches[0])
            extra = {name: value[rows] for name, value in batches[0].extra.items()}
        draw = Draw(self.host.seed, stream="samples", device=self.host.device)
        z = sample_noise(len(prompts), shape, draw)
        return Preview(self.preview(z, self.encode(prompts, extra)).float(), prompts)

    def save(self, folder: Path, outcome: Outcome) -> None:
        """Write the generator as a model folder, and adapters by themselves too."""
        info, config = self.start.info, outcome.config
        assert isinstance(config, MethodConfig)
        # Without weights: those in training may be sharded, and go to the file one by one.
        backbone = empty_module(self.start.backbone.config)
        text_encoder = self.start.text_encoder
        text_state = _inside(outcome.weights, "text_encoder.")
        if text_state:
            text_encoder = text_encoder.config.build()
            text_encoder.load_state_dict(text_state)
        before = {"started_from": dict(info.training)} if info.training else {}
        described = dataclasses.replace(
            info,
            stage=config.exports_as,
            summary=config.summary,
            sample=outcome.sample,
            sampling=config.sampling(info.sampling),
            training={**outcome.training, **before},
        )
        bundle = ModelBundle(backbone, text_encoder, self.start.codec, described)
        external = info.text_encoder.weights is None and not text_state
        save_bundle(
            folder,
            bundle,
            dtype=outcome.dtype,
            external_text_encoder=external,
            weights=MergedWeights(outcome.weights, "backbone.", outcome.adapters),
        )
        if outcome.adapters:
            save_lora(folder, outcome.adapters)

    def train_generator(self, text_encoder: nn.Module | None = None) -> TrainedNetwork:
        """The start's backbone put to work, with a text encoder if that trains too."""
        backbone = self.start.backbone
        return self.host.train(
            Denoiser(backbone, text_encoder),
            backbone.block_list(),
            averaged=True,
            forward_methods=("encode",) if text_encoder else (),
        )

    def condition(self, batch: MicroBatch) -> Condition:
        """What a batch's samples are conditioned on.

        The parts of an update share captions, and a frozen text encoder is asked once.
        """
        text = batch.texts.get("captions")
        if text is None:
            text = self.encode_text(batch.captions)
            if not text.tokens.requires_grad and self.asks_again:
                batch.texts["captions"] = text.to("cpu")
        return self._condition(text.to(batch.x.device), batch.extra)

    def negative(self, c: Condition) -> Condition:
        """What guidance leads away from: the negative prompt, with all else as it is in `c`."""
        return c.with_text(self.encode([self.host.negative_prompt]).text)

    def encode(
        self, prompts: Sequence[str], extra: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Condition:
        """Prompts, encoded, with what is given beside them, in the type of the trained weights.

        A public text encoder is in bf16 whatever the networks compute in.
        """
        return self._condition(self.encode_text(prompts), extra)

    def _condition(self, text: EncodedText, extra: Mapping[str, Tensor]) -> Condition:
        dtype = next(self.generator.module.parameters()).dtype
        return Condition(text, extra).to(dtype=dtype)

    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """Prompts through the frozen text encoder."""
        with torch.no_grad():
            return self.start.text_encoder(prompts)


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of detached scalars."""
    return torch.stack([value.detach().float() for value in values]).mean()


def mean_logs(logs: Sequence[dict[str, Tensor]]) -> Metrics:
    """The mean of every entry over micro-batches."""
    return {name: mean([log[name] for log in logs]) for name in logs[0]}


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    # By name: a value may be costly to make.
    return {k.removeprefix(prefix): state[k] for k in state if k.startswith(prefix)}
