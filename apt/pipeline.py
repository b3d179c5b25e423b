"""From a prompt to a video."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from apt.checkpoints.info import ModelInfo
from apt.checkpoints.load import ModelBundle, Origin, load_bundle
from apt.checkpoints.lora import find_lora, load_lora, merge_lora
from apt.checkpoints.source import weights_digest
from apt.condition import Condition, EncodedText
from apt.device import explained_memory, find_device, require_memory
from apt.distributed.sequence import SequenceGroup
from apt.errors import InputError
from apt.flow import (
    SAMPLERS,
    SamplerName,
    bind,
    bind_guided,
    check_timesteps,
    one_step_sample,
    sample,
    sampling_timesteps,
)
from apt.generate_options import GenerateOptions, OptionNames
from apt.models.architectures import untrained_timesteps
from apt.pixels import (
    OutputType,
    check_output_type,
    to_array,
    to_frames,
    to_images,
    to_unit,
)
from apt.rng import Draw, sample_noise
from apt.version import __version__

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from typing_extensions import Unpack

Seeds = int | Sequence[int] | None
Generators = torch.Generator | Sequence[torch.Generator] | None

_SAMPLERS_BY_STAGE: dict[str, SamplerName] = {
    "diffusion": "euler",
    "consistency": "consistency",
    "apt": "consistency",
}
"""What "auto" means for a model that does not say. In one step they are the same."""


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How the pipeline will sample: every choice made, nothing left to a default.

    Attributes:
        stage: of the model.
        sampler: "consistency" or "euler".
        timesteps: from 1 to 0; one network evaluation for each but the last.
        cfg_scale: 1 means no guidance; otherwise each evaluation has a second half.
        negative_prompt: what guidance leads away from.
    """

    stage: str
    sampler: SamplerName
    timesteps: tuple[float, ...]
    cfg_scale: float
    negative_prompt: str


class OneStepPipeline:
    """Prompt to video with a model of any stage: one step for "apt", many for "diffusion".

    The same prompt, seed and settings give the same video bit for bit, whatever else is in the
    call, as long as `batch_size` is 1. Noise is drawn on the CPU from the seed, so other devices
    and batch sizes start from the same noise, and differ by rounding.
    """

    def __init__(self, bundle: ModelBundle, *, offload_to: torch.device | None = None) -> None:
        self.bundle = bundle
        self._offload_to = offload_to
        self._loras: list[dict[str, Any]] = []
        for module in bundle.modules():
            module.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> OneStepPipeline:
        """Load a built-in name, a folder, or a Hub id; see `apt.load_bundle`.

        Args:
            name_or_folder: see there.
            device: where to compute; None takes the GPU if there is one, else the CPU;
                `pipeline.device` tells.
            dtype: of the model's own weights.
            offload: keep the parts in main memory, and each on the device only while it works:
                text encoder, then transformer, then codec. The device then needs room for the
                largest of them, and every call waits for the copies.

        Raises InputError for a device that this machine does not have.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = find_device(device)
        kept = "cpu" if offload else device
        with explained_memory(
            f"loading {str(name_or_folder)!r}", "try bfloat16, or offload on a GPU"
        ):
            bundle = load_bundle(name_or_folder, device=kept, dtype=dtype)
        return cls(bundle, offload_to=device if offload else None)

    def load_lora(self, name_or_file: str | Path, *, scale: float = 1.0) -> OneStepPipeline:
        """Merge a LoRA into the transformer, in place; returns itself.

        Args:
            name_or_file: a .safetensors file, or a folder or Hub id ("owner/name[@revision]") with
                one, in any of the spellings that `apt.checkpoints.lora.files` reads.
            scale: of the change; merging again with the negative takes it off, to rounding.

        Raises:
            CheckpointError: no such file, one that does not fit the model, or one that makes
                weights that are not finite. The model is then as it was.
            InputError: a scale that is not finite, or a negative one of a DoRA.
        """
        backbone = self.bundle.backbone
        file = find_lora(name_or_file)
        with explained_memory(f"merging {str(name_or_file)!r}", "load the model in bfloat16"):
            merge_lora(backbone, load_lora(file, backbone), scale=scale)
        on_hub = None if Path(name_or_file).expanduser().exists() else str(name_or_file)
        self._loras.append({"name": on_hub, "weights": weights_digest(file), "scale": scale})
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> OneStepPipeline:
        """Move the networks, in place; returns itself. `dtype` is for the model's own weights.

        With `offload` they stay, and `device` is where they will work.

        Raises InputError for a device that this machine does not have; nothing has moved then.
        """
        if device is not None:
            device = find_device(device)
        if self._offload_to is None:
            for module in self.bundle.modules():
                module.to(device=device)
        elif device is not None:
            self._offload_to = device
        for module in self.bundle.own_modules():
            module.to(dtype=dtype)
        return self

    def compile_blocks(self) -> OneStepPipeline:
        """Have `torch.compile` make the transformer's blocks at the next call; returns itself.

        That takes a minute or more, and again for each new size and number of samples at once.
        """
        self.bundle.backbone.compile_blocks()
        return self

    def split_tokens(self, sequence: SequenceGroup | None) -> OneStepPipeline:
        """Let several ranks share the transformer's tokens, or no longer; returns itself.

        They must then make the same calls, with the same weights, and each gets the videos. Text
        encoder and codec work on each rank as they do alone.

        Raises ConfigError for a transformer whose tokens cannot be split.
        """
        self.bundle.backbone.split_tokens(sequence)
        return self

    def __repr__(self) -> str:
        """In a line: the model, and the device where that is not where its weights are."""
        offloaded = "" if self._offload_to is None else f", offloaded from {self._offload_to}"
        return f"{type(self).__name__}({self.bundle!r}{offloaded})"

    @property
    def info(self) -> ModelInfo:
        """What the model is, how large its videos are, and where it comes from."""
        return self.bundle.info

    @property
    def stage(self) -> str:
        """ "diffusion", "consistency" or "apt"."""
        return self.bundle.info.stage

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self._offload_to or self._parameter().device

    @property
    def dtype(self) -> torch.dtype:
        """The type they compute in; latents are kept in fp32 between steps."""
        return self._parameter().dtype

    def plan(
        self, options: GenerateOptions = GenerateOptions(), **names: Unpack[OptionNames]
    ) -> SamplingPlan:
        """Resolve sampling options without generating; arguments as for calling the pipeline."""
        options = options.replace(names)
        batch_size = options.batch_size
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        defaults = self.info.sampling
        sampler = options.sampler
        if sampler == "auto":
            sampler = defaults.sampler or _SAMPLERS_BY_STAGE[self.stage]
        if sampler not in SAMPLERS:
            raise InputError(
                f"unknown sampler {sampler!r}; choose from auto, {', '.join(SAMPLERS)}"
            )
        if options.timesteps is None:
            steps = defaults.num_steps if options.num_steps is None else options.num_steps
            if not isinstance(steps, int) or steps < 1:
                raise InputError(f"num_steps must be a whole number of at least 1, got {steps!r}")
            if steps > _MOST_STEPS:
                raise InputError(f"num_steps must be at most {_MOST_STEPS}, got {steps}")
            grid = check_timesteps(sampling_timesteps(steps, defaults.timestep_shift))
        else:
            grid = check_timesteps(options.timesteps)
            if options.num_steps not in (None, len(grid) - 1):
                raise InputError(
                    f"{len(grid)} timesteps make {len(grid) - 1} steps, but num_steps is "
                    f"{options.num_steps}; leave one of them out"
                )
        # Distilled models have their guidance built in.
        own_scale = 1.0 if self.stage in ("consistency", "apt") else defaults.cfg_scale
        scale = own_scale if options.cfg_scale is None else float(options.cfg_scale)
        if not 0 <= scale < float("inf"):
            raise InputError(f"cfg_scale must be finite and at least 0, got {options.cfg_scale}")
        return SamplingPlan(
            stage=self.stage,
            sampler=sampler,
            timesteps=tuple(grid),
            cfg_scale=scale,
            negative_prompt=(
                defaults.negative_prompt
                if options.negative_prompt is None
                else options.negative_prompt
            ),
        )

    def tags(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        fps: float | None = None,
        options: GenerateOptions = GenerateOptions(),
        **names: Unpack[OptionNames],
    ) -> dict[str, Any]:
        """How a video is made, for its file: `apt.media.write_media(..., tags=...)`.

        Prompt, seed, model (name, with its revision or the digest of its weights), merged LoRAs,
        settings with nothing left open, and the version of this package. No folder of this machine
        is named.

        Args:
            prompt, seed: of the video; several for a file that shows several.
            fps: of the file; None is the model's.
            options, names: as for generating, and with the same errors.
        """
        options = options.replace(names)
        plan, sample = self.plan(options), self.info.sample
        self.latent_shape(options.frames, options.height, options.width)
        frames, height, width = sample.sized(options.frames, options.height, options.width)
        origin = self.bundle.origin or Origin(name=self.info.model.architecture)
        return {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "seed": seed if isinstance(seed, int) else list(seed),
            "model": {**asdict(origin), "stage": self.stage},
            "loras": [dict(lora) for lora in self._loras],
            "settings": {
                "num_steps": len(plan.timesteps) - 1,
                "timesteps": list(plan.timesteps),
                "sampler": plan.sampler,
                "cfg_scale": plan.cfg_scale,
                "negative_prompt": plan.negative_prompt,
                "frames": frames,
                "height": height,
                "width": width,
                "fps": sample.fps if fps is None else fps,
                "batch_size": options.batch_size,
                "dtype": str(self.dtype).removeprefix("torch."),
                "device": self.device.type,
            },
            "software": f"diffusion-apt {__version__}",
        }

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: Seeds = None,
        generator: Generators = None,
        extra: Mapping[str, Tensor] | None = None,
        output_type: Literal["uint8", "pt"] = "uint8",
        options: GenerateOptions = GenerateOptions(),
        **names: Unpack[OptionNames],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: Seeds = None,
        generator: Generators = None,
        extra: Mapping[str, Tensor] | None = None,
        output_type: Literal["np"],
        options: GenerateOptions = GenerateOptions(),
        **names: Unpack[OptionNames],
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: Seeds = None,
        generator: Generators = None,
        extra: Mapping[str, Tensor] | None = None,
        output_type: Literal["pil"],
        options: GenerateOptions = GenerateOptions(),
        **names: Unpack[OptionNames],
    ) -> list[list[Image.Image]]: ...
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: Seeds = None,
        generator: Generators = None,
        extra: Mapping[str, Tensor] | None = None,
        output_type: OutputType = "uint8",
        options: GenerateOptions = GenerateOptions(),
        **names: Unpack[OptionNames],
    ) -> Tensor | npt.NDArray[np.float32] | list[list[Image.Image]]:
        """Generate videos, all at once; `stream` gives one after the other.

        Args:
            prompt: one or several; none of them empty.
            seed: one for all prompts, or one each; None is 0. Several seeds with one prompt make
                several videos of it.
            generator: diffusers' way to say the seed: one generator, of which a seed is drawn for
                each video, or one each. Calls with the same generator differ, as there.
            extra: what a model of your own reads beside the prompt, by name: (B, ...), one row for
                each video, or (1, ...) for all of them.
            output_type: what is returned.
            options: how, all in one; see `GenerateOptions`.
            names: options by name, which go before those of `options`. diffusers' names are taken
                too: `num_inference_steps`, `guidance_scale`, `num_frames`.

        Returns:
            uint8 (B, T, H, W, 3) on the CPU, B being the number of prompts or of seeds; for other
            output types see `apt.pixels.OutputType`.

        Raises:
            InputError: for a prompt, seed, size or option that does not fit, saying what does; for
                values that are not finite, and for too little memory.
        """
        check_output_type(output_type)
        request = self._request(prompt, seed, generator, extra, options.replace(names))
        size = math.prod(request.pixels) * len(request.prompts)
        if output_type in ("pt", "np"):
            size *= 4
        require_memory(size, torch.device("cpu"), "all the videos together", "use stream()")
        batches = self._batches(request)
        if output_type in ("pt", "np"):
            unit = torch.cat([to_unit(batch) for batch in batches])
            return to_array(unit) if output_type == "np" else unit
        frames = torch.cat([to_frames(batch) for batch in batches])
        return to_images(frames) if output_type == "pil" else frames

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        seed: Seeds = None,
        generator: Generators = None,
        extra: Mapping[str, Tensor] | None = None,
        options: GenerateOptions = GenerateOptions(),
        **names: Unpack[OptionNames],
    ) -> Iterator[Tensor]:
        """As calling the pipeline, but each video, uint8 (T, H, W, 3), as soon as it is made.

        Arguments are checked, and prompts read, at once; memory and the wait for the first video
        do not grow with their number.
        """
        request = self._request(prompt, seed, generator, extra, options.replace(names))
        return (video for batch in self._batches(request) for video in to_frames(batch))

    def sample_pixels(
        self,
        prompt: str | Sequence[str],
        *,
        seed: Seeds = None,
        generator: Generators = None,
        extra: Mapping[str, Tensor] | None = None,
        options: GenerateOptions = GenerateOptions(),
        **names: Unpack[OptionNames],
    ) -> Tensor:
        """As calling the pipeline, but fp32 pixels (B, 3, T, H, W) in [-1, 1] on the device."""
        request = self._request(prompt, seed, generator, extra, options.replace(names))
        return torch.cat(list(self._batches(request)))

    def _request(
        self,
        prompt: str | Sequence[str],
        seed: Seeds,
        generator: Generators,
        extra: Mapping[str, Tensor] | None,
        options: GenerateOptions,
    ) -> _Request:
        """Everything that can be wrong, looked at before anything is computed."""
        plan = self.plan(options)
        prompts, sources = _pair(prompt, seed, generator)
        given = _one_row_each(extra or {}, self.bundle.backbone.extra_conditions, len(prompts))
        size = (options.frames, options.height, options.width)
        latent = self.latent_shape(*size)
        frames, height, width = self.info.sample.sized(*size)
        if self.stage == "diffusion" and (
            problem := untrained_timesteps(self.info.model.architecture, plan.timesteps)
        ):
            warnings.warn(problem, stacklevel=3)
        # One video in fp32 before it is 8 bits: there will be more, but never less.
        require_memory(
            4 * 3 * frames * height * width,
            self.device,
            f"a video of {frames} frames of {height}x{width}",
            _SMALLER,
        )
        self.bundle.text_encoder.check(prompts)
        if plan.cfg_scale != 1:
            self.bundle.text_encoder.check([plan.negative_prompt])
        # Last, so that a call which is refused leaves a generator as it was.
        seeds = [_seed_of(source) for source in sources]
        pixels = (frames, height, width, 3)
        return _Request(prompts, seeds, given, plan, latent, pixels, options.batch_size)

    @torch.inference_mode()
    def _batches(self, request: _Request) -> Iterator[Tensor]:
        """Pixels (b, 3, T, H, W) of one network call after the other.

        With `offload` each part works for several calls, as moving it takes longer than they do.
        """
        calls = _CALLS_PER_MOVE if self._offload_to is not None else 1
        step = request.batch_size * calls
        frames, height, width, _ = request.pixels
        doing = f"generating {frames} frames of {height}x{width} on {self.device}"
        for start in range(0, len(request.prompts), step):
            with explained_memory(doing, _SMALLER):
                end = min(start + step, len(request.prompts))
                latents = self._latents(request, range(start, end))
            with self.at_work(self.bundle.codec):
                for x in latents:
                    with explained_memory(doing, _SMALLER):
                        pixels = self.bundle.codec.decode(x).float()
                    self._check_finite(pixels, "pixels")  # infinity would be clamped to white
                    yield pixels.clamp(-1, 1)

    def _latents(self, request: _Request, places: Sequence[int]) -> list[Tensor]:
        """Latents of some of the videos, one tensor for each network call."""
        texts = dict.fromkeys(request.prompts[place] for place in places)
        plan, size = request.plan, request.batch_size
        with self.at_work(self.bundle.text_encoder):
            encoded = {text: self._encode(text) for text in texts}
            negative = self._encode(plan.negative_prompt) if plan.cfg_scale != 1 else None
        made = []
        with self.at_work(self.bundle.backbone):
            for start in range(0, len(places), size):
                call = places[start : start + size]
                text = [encoded[request.prompts[place]] for place in call]
                extra = {name: value[list(call)] for name, value in request.extra.items()}
                x = self._sample_latents(
                    Condition(EncodedText.concatenate(text), extra).to(self.device, self.dtype),
                    negative,
                    [request.seeds[place] for place in call],
                    request.latent,
                    plan,
                )
                self._check_finite(x, "latents")
                made.append(x)
        return made

    def _check_finite(self, values: Tensor, kind: str) -> None:
        """Raise InputError for values that would be written as black."""
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise InputError(
                f"{bad} of {values.numel()} values of the {kind} are NaN or infinite in "
                f"{str(self.dtype).removeprefix('torch.')}, so there is nothing to show: load the "
                "model in bfloat16 or float32, lower the scale of a LoRA, or use other weights"
            )

    def latent_shape(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Latent shape (C, T, H, W) for a video; None takes the trained size.

        Raises:
            InputError: for a size that the codec or the model cannot take, naming the trained one.
        """
        trained = self.info.sample
        own = (trained.frames, trained.height, trained.width)
        size = trained.sized(frames, height, width)
        latent = self._latent_size(size)
        if latent is not None:
            return (self.bundle.codec.channels, *latent)
        for axis, name in enumerate(("frames", "height", "width")):
            alone = (*own[:axis], size[axis], *own[axis + 1 :])
            if self._latent_size(alone) is None:
                near = " or ".join(map(str, self._nearest(alone, axis) or [own[axis]]))
                raise InputError(
                    f"{name} = {size[axis]} does not fit this model; use {near}. It was trained "
                    f"on {own[0]} frames of {own[1]}x{own[2]} (height x width)"
                )
        raise AssertionError("the axes fit one by one")

    def noise(
        self, seeds: Sequence[int], shape: tuple[int, int, int, int] | None = None, step: int = 0
    ) -> Tensor:
        """The noise (B, C, T, H, W) fp32 that videos of these seeds start from.

        Args:
            seeds: B of them.
            shape: of a latent, (C, T, H, W); None is that of the trained size.
            step: samplers that go back to noise before a later step take that of its number.
        """
        shape = self.latent_shape() if shape is None else shape
        # The key holds the seed alone: a video does not depend on its place in the batch.
        draws = [sample_noise(1, shape, Draw(seed, step, stream="generate")) for seed in seeds]
        return torch.cat(draws).to(self.device)

    @contextmanager
    def at_work(self, part: nn.Module) -> Iterator[None]:
        """Have a part on the device, and with `offload` back in main memory afterwards."""
        if self._offload_to is None:
            yield
            return
        _move(part, self._offload_to)
        try:
            yield
        finally:
            _move(part, "cpu")

    def _latent_size(self, size: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Latent (T, H, W) of (frames, height, width), or None if the model cannot take it."""
        try:
            latent = self.bundle.codec.latent_shape(*size)
            self.bundle.backbone.token_grid(latent)
        except InputError:
            return None
        return latent

    def _nearest(self, size: tuple[int, ...], axis: int) -> list[int]:
        """The values nearest to size[axis], below and above, that the model can take.

        Those that are further than `reach` help nobody, and looking for them may take minutes.
        """

        def fits(value: int) -> bool:
            return self._latent_size((*size[:axis], value, *size[axis + 1 :])) is not None

        start, reach = max(size[axis], 0), 1024
        below = next((v for v in range(start, max(start - reach, 0), -1) if fits(v)), None)
        above = next((v for v in range(start + 1, start + reach) if fits(v)), None)
        return [value for value in (below, above) if value is not None]

    def _sample_latents(
        self,
        condition: Condition,
        negative: EncodedText | None,
        seeds: Sequence[int],
        shape: tuple[int, int, int, int],
        plan: SamplingPlan,
    ) -> Tensor:
        backbone = self.bundle.backbone

        def noise(step: int) -> Tensor:
            return self.noise(seeds, shape, step)

        if negative is None:
            predict = bind(backbone, condition)
        else:
            away_from = condition.with_text(negative)
            predict = bind_guided(backbone, condition, away_from, plan.cfg_scale)
        z = noise(0)
        if len(plan.timesteps) == 2:
            return one_step_sample(predict, z)
        return sample(predict, z, plan.timesteps, sampler=plan.sampler, noise=noise)

    def _encode(self, prompt: str) -> EncodedText:
        return self.bundle.text_encoder([prompt]).to(self.device, self.dtype)

    def _parameter(self) -> Tensor:
        (backbone, *_) = self.bundle.modules()
        return next(backbone.parameters())


@dataclass(frozen=True)
class _Request:
    """What to generate, checked.

    Attributes:
        prompts, seeds: one each for every video.
        extra: what is given beside them, by name, a row for every video.
        plan: how.
        latent: (C, T', H', W').
        pixels: (T, H, W, 3).
        batch_size: videos per network call.
    """

    prompts: list[str]
    seeds: list[int]
    extra: Mapping[str, Tensor]
    plan: SamplingPlan
    latent: tuple[int, int, int, int]
    pixels: tuple[int, int, int, int]
    batch_size: int


_CALLS_PER_MOVE = 8
"""Network calls for which a part stays on the device with `offload`: their latents are small."""

_MOST_STEPS = 1000

_SMALLER = (
    "ask for fewer frames or a smaller size, or try batch_size 1, bfloat16, or offload on a GPU"
)


def _move(part: nn.Module, device: torch.device | str) -> None:
    """Weights that are copied in inference mode could never be trained."""
    with torch.inference_mode(False):
        part.to(device)


def _one_row_each(
    extra: Mapping[str, Tensor], read: Sequence[str], videos: int
) -> dict[str, Tensor]:
    """What is given beside the prompts, with a row for each video."""
    if unread := sorted(extra.keys() - set(read)):
        raise InputError(
            f"this model does not read {', '.join(unread)}; beside the prompt it reads "
            f"{', '.join(sorted(read)) or 'nothing'}"
        )
    rows = {}
    for name, value in extra.items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) not in (1, videos):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"extra {name!r} must be a tensor with {videos} rows, one for each video, or with "
                f"one for all, got {got}"
            )
        rows[name] = value.expand(videos, *value.shape[1:])
    return rows


def check_prompts(prompts: Sequence[object]) -> None:
    """Raise InputError for a prompt that is empty, or no text."""
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"a prompt must be text that is not empty, got {text!r}; say what to show, such as "
                '"a red seven moving left"'
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the prompt {text!r} has bytes that are not UTF-8; save or type it as UTF-8"
            ) from error


def _pair(
    prompt: str | Sequence[str], seed: Seeds, generator: Generators
) -> tuple[list[str], list[int] | list[torch.Generator]]:
    """One prompt, and one seed or generator, per video."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    sources = _sources(seed, generator)
    if not prompts or not sources:
        raise InputError("there is no prompt to generate from, or no seed")
    check_prompts(prompts)
    if len(prompts) == 1:
        prompts *= len(sources)
    if len(sources) == 1:
        sources *= len(prompts)
    if len(prompts) != len(sources):
        kind = "seed" if generator is None else "generator"
        raise InputError(
            f"{len(prompts)} prompts need one {kind}, or {len(prompts)} of them; got {len(sources)}"
        )
    return prompts, sources


def _sources(seed: Seeds, generator: Generators) -> list[int] | list[torch.Generator]:
    """What the noise comes from, as a list."""
    if generator is None:
        seeds = [0] if seed is None else list(seed) if isinstance(seed, Iterable) else [seed]
        for number in seeds:
            if not isinstance(number, int) or isinstance(number, bool):
                raise InputError(f"a seed must be a whole number, got {number!r}")
        return seeds
    if seed is not None:
        raise InputError("a seed and a generator both say where noise comes from; pass one of them")
    generators = list(generator) if isinstance(generator, Iterable) else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise InputError(f"generator must be a torch.Generator, or several, got {one!r}")
    return generators


def _seed_of(source: int | torch.Generator) -> int:
    """The seed itself, or one that is drawn."""
    if isinstance(source, int):
        return source
    return int(torch.randint(2**63 - 1, (), generator=source, device=source.device))
