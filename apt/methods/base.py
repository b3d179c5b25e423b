"""The interface of a training stage: its configuration, networks, updates and export.

Most stages are methods, which train a generator. A stage does not know its trainer, which gives it
a `Host`. The host provides the models that the run starts from, and prepares networks: it moves
them to the device, shards them, and gives them an optimiser and an average.
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
    """The part of a rank's batch that goes through the networks at once.

    Attributes:
        x: clean latents (b, C, T, H, W); pixels for a stage without a codec.
        captions: b texts.
        offset: index of the first sample in the global batch; random draws are keyed by it.
        extra: further conditions of the samples, by name, each (b, ...).
        texts: encoded captions, kept on the CPU for later parts of the same update; private to
            the method.
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
    """A forward pass of a backbone in an update, and how far its backward pass goes.

    Attributes:
        backbone: the module, whose depth and blocks determine the cost.
        samples: samples that it sees for each sample of the batch.
        backward: 0 for no gradients, 1 for those of its inputs, 2 for those of its weights too;
            each costs as much as the forward pass.
    """

    backbone: DiffusionTransformer
    samples: float
    backward: Literal[0, 1, 2]


Part = Callable[[Sequence[MicroBatch], int], Metrics]
"""A part of an update; see `Stage.parts`."""


@dataclass(frozen=True)
class Preview:
    """The contents of a sample sheet.

    Attributes:
        latents: (B, C, T, H, W), or pixels.
        names: one for each.
        generated: whether they are generated samples, which are watched for collapse; clips of
            the batch may well be alike.
        shows: what each row of the sheet contains.
    """

    latents: Tensor
    names: tuple[str, ...]
    generated: bool = True
    shows: str = "frames"


@dataclass(frozen=True)
class Outcome:
    """The weights to export, and their description.

    Attributes:
        weights: unsharded tensors by name, on the CPU; each is produced on access.
        adapters: adapters to merge into the weights, by name of their layer in the backbone.
        config: the configuration of the stage.
        sample: the size of the clips that it was trained on.
        training: the record of this stage, without earlier ones.
        dtype: the dtype of the weights in files; None keeps fp32.
    """

    weights: Mapping[str, Tensor]
    adapters: dict[str, LoRALayer]
    config: StageConfig
    sample: SampleInfo
    training: dict[str, Any]
    dtype: torch.dtype | None = None


class Denoiser(nn.Module):
    """A backbone, and the text encoder if it is trained too: one unit for FSDP and EMA."""

    def __init__(
        self, backbone: DiffusionTransformer, text_encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder

    def forward(self, x: Tensor, t: Tensor, c: Condition, *, rows: Tensor | None = None) -> Tensor:
        """Return the backbone's velocity."""
        return self.backbone(x, t, c, rows=rows)

    def encode(self, prompts: Sequence[str]) -> EncodedText:
        """Return encoded prompts, with gradients to the trained text encoder."""
        assert self.text_encoder is not None
        return self.text_encoder(prompts)


class Average(Protocol):
    """An exponential moving average of a network's weights."""

    def update(self, module: nn.Module, update: int = ...) -> None:
        """Move the average towards the module's current weights."""

    def applied(self, module: nn.Module) -> AbstractContextManager[None]:
        """Give a module the averaged weights inside the `with` block."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged tensors by name, without copying them."""
        ...


class TrainedNetwork(Protocol):
    """A network with its optimiser and, for generators, its average."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def ema(self) -> Average | None: ...

    @property
    def moves(self) -> int:
        """How many updates of its weights have begun in this process."""
        ...

    def zero_grad(self) -> None:
        """Clear the gradients."""

    def accumulated(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches; gradients of the passes in the loop's body accumulate."""
        ...

    def backward_passes(self, number: int) -> Iterator[object]:
        """Yield once before each of several backward passes of a micro-batch."""
        ...

    def step(self, update: int) -> float:
        """Update the weights and the average, and return the gradient norm.

        `update` counts from 0.
        """
        ...

    def rate(self, update: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        ...

    def state(self) -> dict[str, Any]:
        """Return everything that training changes, as tensors by name, without copying them."""
        ...


class Host(Protocol):
    """Runs a stage.

    Attributes:
        seed: the seed of all random draws.
        device: the device of the networks.
        negative_prompt: the fixed negative prompt, for guidance and caption dropout.
    """

    @property
    def seed(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def negative_prompt(self) -> str: ...

    def model(self) -> ModelBundle:
        """Return the model that the generator starts from; see `backbone` for its backbone."""
        ...

    def backbone(self, field: str) -> tuple[DiffusionTransformer, ModelInfo]:
        """Return backbone and description of the model that a field of the stage names.

        The backbone may be on the meta device. It has weights once `train` or `place` was called
        with a network that contains it.
        """
        ...

    def codec(self) -> tuple[str, LatentCodec]:
        """Return the name of the codec that the run configures, and a new instance of it."""
        ...

    def over_ranks(self, values: Tensor) -> Tensor:
        """Return the mean over ranks of a small tensor that each rank has computed."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Set the precision of forward passes."""
        ...

    def adapt(self, backbone: DiffusionTransformer, *, discriminator: bool = False) -> None:
        """Add activation checkpointing and adapters, as the run configures them."""

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
        """Move a network to the device, shard it by `blocks`, and give it an optimiser.

        Args:
            averaged: keep an exponential moving average of the weights.
            learning_rate: None uses the run's.
            slowed: a part of the network, and its learning rate as a fraction of the network's.
            forward_methods: methods besides `forward` that run the network.
            exact: compute in fp32 or TF32 even if the run is in bf16.
        """
        ...

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Move a network to the device, and shard it.

        If the run computes in bf16, weights that do not train may be stored in bf16.
        """

    def average(
        self, network: nn.Module, decay: float, *, inside: nn.Module | None = None
    ) -> Average:
        """Return an average that the method updates itself, held in `inside` if that is given."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageConfig(ABC):
    """The options of a stage, and facts about all stages of its kind.

    Class attributes:
        exports_as: the stage's name in `apt.json`: "diffusion", "consistency", "apt", "codec", or
            a new one.
        summary: one line about the exported model, for its card.
        starts_from: the field that names the model that the stage starts from; None starts from
            random weights.
        may_begin_anew: that field may be empty, which also starts from random weights.
        names_models: all fields that name a model: a built-in name, a folder, or a Hub id.
        names_folders: fields that name a folder, whose path is never published.
        takes_latents: whether the stage can train on a cache of latents.
        reads_captions: whether the stage encodes captions.
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
        """The field that names the model that this run starts from; None for random weights."""
        field = self.starts_from
        anew = field is None or (self.may_begin_anew and not getattr(self, field))
        return None if anew else field

    @abstractmethod
    def begin(self, host: Host) -> Stage:
        """Return the stage, ready to train on its host."""

    def trained_codec(self) -> str:
        """Return the codec of a new model: a folder or a Hub id; empty for the run's own."""
        return ""

    def filled(self, start: ModelInfo) -> StageConfig:
        """Return the options, with open values taken from the model that the stage starts from."""
        return self

    def check_adapters(self) -> None:  # noqa: B027  (most stages can)
        """Raise ConfigError if the stage cannot train adapters instead of the weights."""

    def check_compiled(self) -> None:  # noqa: B027  (most stages can)
        """Raise ConfigError if the stage needs something that compiled blocks do not support."""

    def check_sharded(self) -> None:  # noqa: B027  (most stages can)
        """Raise ConfigError if the stage cannot train on several ranks."""

    def check(self) -> None:  # noqa: B027  (not every stage has limits)
        """Raise ConfigError, with the option's name, for numbers out of range."""

    def source(self, field: str) -> str:
        """Return the model that a field names. Raises ConfigError if the field is empty."""
        value = str(getattr(self, field))
        if not value:
            raise ConfigError(
                f"--stage.{field} is empty; name the model to start from: a folder that a training "
                "run exported, a built-in name, or a Hub id"
            )
        return value


class Stage(ABC):
    """Networks in training.

    Attributes:
        trained: the trained networks by name; "generator" always exists and is exported.
        codec: encodes pixels to latents and decodes previews; None trains on pixels.
        frozen: modules that must be on the device but do not train.
        shares_batch: whether all parts of an update use the same samples; otherwise each part gets
            its own batch.
    """

    trained: dict[str, TrainedNetwork]
    codec: LatentCodec | None = None
    frozen: Sequence[nn.Module] = ()
    shares_batch: bool = True

    def __init__(self, host: Host) -> None:
        self.host = host

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """Return the parts of an update by name, in order.

        Each part updates weights once, at its end; a run can stop and resume between two parts. A
        part takes micro-batches of equal size and the number of the update, from 0, and returns
        metrics, each a mean over this rank's samples.
        """

    @property
    def batches_per_update(self) -> int:
        """How many global batches an update uses."""
        return 1 if self.shares_batch else len(self.parts())

    def update(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Run all parts of an update on the same samples, and return their metrics."""
        metrics: Metrics = {}
        for part in self.parts().values():
            metrics |= part(batches, update)
        return metrics

    def check_prompts(self, shown: Sequence[str]) -> None:  # noqa: B027  (not all encode any)
        """Raise InputError for prompts that would stop a later update.

        `shown` are the prompts of sample sheets.
        """

    def heldout(self, batch: MicroBatch) -> Metrics:
        """Measure the networks' current weights on held-out clips.

        Returns means over the batch, under the names of the training metrics. Noise and timesteps
        depend only on the seed and `batch.offset`, so different updates can be compared. This must
        not change the state of training. The default is no metrics.
        """
        return {}

    @abstractmethod
    def samples(
        self, prompts: tuple[str, ...], clip: SampleInfo, batches: Sequence[MicroBatch]
    ) -> Preview | None:
        """Return a sample sheet of the generator's current weights, or None for no sheet.

        `batches` are the micro-batches of the update.
        """

    @abstractmethod
    def save(self, folder: Path, outcome: Outcome) -> None:
        """Export to a folder."""

    def extra_state(self) -> dict[str, Any]:
        """Return what checkpoints store besides the trained networks."""
        return {}

    def passes(self) -> Sequence[Pass]:
        """Return an update's backbone passes, for throughput in the log; empty if unknown."""
        return []

    def warnings(self) -> list[str]:
        """Return what the user should know before the run starts."""
        return []

    @property
    def generator(self) -> TrainedNetwork:
        return self.trained["generator"]

    def draw(self, batch: MicroBatch, update: int, stream: str) -> Draw:
        """Return the key of a batch's random draws, which are made on the batch's device."""
        return Draw(self.host.seed, update, batch.offset, stream, batch.x.device)

    def uniform(self, batch: MicroBatch, update: int, stream: str) -> Tensor:
        """Return (b,) uniform numbers in [0, 1), on the CPU so that reading them needs no sync."""
        draw = Draw(self.host.seed, update, batch.offset, stream)
        return sample_uniform(len(batch), draw)


def even_timesteps(batch: MicroBatch) -> Tensor:
    """Return (b,) timesteps in [0, 1), on the CPU, that depend only on the sample's index.

    They are multiples of the golden ratio modulo 1, which are evenly spaced for any number of
    samples.
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
        """Return the method, ready to train `start`, the generator's bundle."""

    @abstractmethod
    def sampling(self, before: SamplingInfo) -> SamplingInfo:
        """Return how an exported model is sampled, if its start was sampled as `before`."""


class Method(Stage):
    """A generator in training.

    Attributes:
        start: the bundle that the run started from: text encoder, codec and description.
    """

    def __init__(self, start: ModelBundle, host: Host) -> None:
        super().__init__(host)
        self.start = start
        self.codec = start.codec
        self.frozen = (start.codec, start.text_encoder)

    @property
    def asks_again(self) -> bool:
        """Whether later parts of an update use the captions of the first again."""
        return self.shares_batch and len(self.parts()) > 1

    def prompts(self) -> list[str]:
        """Return the prompts, besides captions, that the text encoder will encode."""
        return []

    def check_prompts(self, shown: Sequence[str]) -> None:
        prompts = [*shown, *self.prompts()]
        if prompts:
            self.start.text_encoder.check(prompts)

    @abstractmethod
    def preview(self, z: Tensor, c: Condition) -> Tensor:
        """Return latents (B, C, T, H, W) that the generator's current weights make from noise."""

    def samples(
        self, prompts: tuple[str, ...], clip: SampleInfo, batches: Sequence[MicroBatch]
    ) -> Preview | None:
        """Return one sample of each prompt, always from the same noise.

        If the data have further conditions, each prompt uses those of one of the update's samples,
        and its size.
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
        """Write the generator as a model folder, and any adapters separately as well."""
        info, config = self.start.info, outcome.config
        assert isinstance(config, MethodConfig)
        # Without weights: trained weights may be sharded, and are written one by one.
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
        """Prepare the start's backbone for training, with the text encoder if it trains too."""
        backbone = self.start.backbone
        return self.host.train(
            Denoiser(backbone, text_encoder),
            backbone.block_list(),
            averaged=True,
            forward_methods=("encode",) if text_encoder else (),
        )

    def condition(self, batch: MicroBatch) -> Condition:
        """Return the conditions of a batch's samples.

        A frozen text encoder runs once if the parts of an update share captions.
        """
        text = batch.texts.get("captions")
        if text is None:
            text = self.encode_text(batch.captions)
            if not text.tokens.requires_grad and self.asks_again:
                batch.texts["captions"] = text.to("cpu")
        return self._condition(text.to(batch.x.device), batch.extra)

    def negative(self, c: Condition) -> Condition:
        """Return `c` with the negative prompt as its text, for guidance."""
        return c.with_text(self.encode([self.host.negative_prompt]).text)

    def encode(
        self, prompts: Sequence[str], extra: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Condition:
        """Return encoded prompts and further conditions, in the dtype of the trained weights.

        Public text encoders are in bf16, whatever dtype the networks have.
        """
        return self._condition(self.encode_text(prompts), extra)

    def _condition(self, text: EncodedText, extra: Mapping[str, Tensor]) -> Condition:
        dtype = next(self.generator.module.parameters()).dtype
        return Condition(text, extra).to(dtype=dtype)

    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts with the frozen text encoder."""
        with torch.no_grad():
            return self.start.text_encoder(prompts)


def mean(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of scalars, detached."""
    return torch.stack([value.detach().float() for value in values]).mean()


def mean_logs(logs: Sequence[dict[str, Tensor]]) -> Metrics:
    """Return the mean of each entry over micro-batches."""
    return {name: mean([log[name] for log in logs]) for name in logs[0]}


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    # Look up values only for matching names: producing them may be costly.
    return {k.removeprefix(prefix): state[k] for k in state if k.startswith(prefix)}
