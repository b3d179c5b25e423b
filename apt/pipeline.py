"""The pipeline from a prompt to a video."""

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
"""The sampler that "auto" chooses if the model names none. With one step they are the same."""


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How the pipeline will sample, with every default filled in.

    Attributes:
        stage: of the model.
        sampler: "consistency" or "euler".
        timesteps: from 1 to 0; one network evaluation for each but the last.
        cfg_scale: 1 means no guidance; otherwise each evaluation has a second, negative half.
        negative_prompt: the prompt that guidance steers away from.
    """

    stage: str
    sampler: SamplerName
    timesteps: tuple[float, ...]
    cfg_scale: float
    negative_prompt: str


class OneStepPipeline:
    """Generates videos from prompts with a model of any stage: in one step with "apt", for example.

    With `batch_size` 1, the same prompt, seed and settings give the same video bit for bit,
    whatever else is in the call. Noise is drawn on the CPU from the seed, so other devices and
    batch sizes start from the same noise and differ only by rounding.
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
        """Load a model by built-in name, folder or Hub id.

        Args:
            name_or_folder: as for `apt.load_bundle`.
            device: where to compute; None is the GPU if there is one, else the CPU. The property
                `device` returns the choice.
            dtype: of the model's own weights.
            offload: keep the text encoder, transformer and codec in main memory, and move each to
                the device only while it works. The device then needs memory only for the largest
                of them, but every call waits for the copies.

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
        """Merge a LoRA into the transformer in place; returns the pipeline.

        Args:
            name_or_file: a .safetensors file, or a folder or Hub id ("owner/name[@revision]") with
                one, in any of the formats that `apt.checkpoints.lora.files` reads.
            scale: of the change. Merging again with the negative scale undoes it, up to rounding.

        Raises:
            CheckpointError: if there is no such file, it does not fit the model, or it makes
                weights that are not finite. The model is then unchanged.
            InputError: if the scale is not finite, or is negative for a DoRA.
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
        """Move the networks in place; returns the pipeline.

        `dtype` applies to the model's own weights. With `offload`, the networks stay in main
        memory, and `device` is where they will compute.

        Raises InputError for a device that this machine does not have; nothing is moved then.
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
        """Compile the transformer's blocks with `torch.compile` at the next call.

        Compiling takes a minute or more, and is repeated for each new size and batch size. Returns
        the pipeline.
        """
        self.bundle.backbone.compile_blocks()
        return self

    def split_tokens(self, sequence: SequenceGroup | None) -> OneStepPipeline:
        """Split the transformer's tokens over several ranks, or stop with None.

        All ranks must then make the same calls with the same weights, and each gets the videos.
        The text encoder and the codec run in full on every rank. Returns the pipeline.

        Raises ConfigError for a transformer whose tokens cannot be split.
        """
        self.bundle.backbone.split_tokens(sequence)
        return self

    def __repr__(self) -> str:
        """Return one line with the model, and the device that it is offloaded from, if any."""
        offloaded = "" if self._offload_to is None else f", offloaded from {self._offload_to}"
        return f"{type(self).__name__}({self.bundle!r}{offloaded})"

    @property
    def info(self) -> ModelInfo:
        """The model's description: architecture, size of its videos, and source."""
        return self.bundle.info

    @property
    def stage(self) -> str:
        """ "diffusion", "consistency" or "apt"."""
        return self.bundle.info.stage

    @property
    def device(self) -> torch.device:
        """The device that the networks compute on."""
        return self._offload_to or self._parameter().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in; latents between steps are fp32."""
        return self._parameter().dtype

    def plan(
        self, options: GenerateOptions = GenerateOptions(), **names: Unpack[OptionNames]
    ) -> SamplingPlan:
        """Resolve the sampling options without generating; arguments as for `__call__`."""
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
                    f"{options.num_steps}; pass only one of the two"
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
        """Return a description of how a video is made, for `apt.media.write_media(..., tags=...)`.

        It has the prompt, seed, model (name, with its revision or the digest of its weights),
        merged LoRAs, settings with every default filled in, and the version of this package, but no
        path of this machine.

        Args:
            prompt, seed: of the video; several for a file that shows several videos.
            fps: of the file; None is the model's.
            options, names: as for `__call__`, with the same errors.
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
        """Generate videos and return all of them; `stream` yields them one by one.

        Args:
            prompt: one or several non-empty prompts.
            seed: one for all prompts, or one per prompt; None is 0. Several seeds with one prompt
                make several videos of it.
            generator: an alternative to `seed`, as in diffusers: one generator, from which a seed
                is drawn for each video, or one per video. Repeated calls with the same generator
                give different videos, as in diffusers.
            extra: inputs that a model of your own reads beside the prompt, by name: (B, ...), one
                row per video, or (1, ...) for all of them.
            output_type: the type to return.
            options: all options in one object; see `GenerateOptions`.
            names: single options, which override those of `options`. diffusers' names also work:
                `num_inference_steps`, `guidance_scale`, `num_frames`.

        Returns:
            uint8 (B, T, H, W, 3) on the CPU, where B is the number of prompts or seeds. For other
            output types see `apt.pixels.OutputType`.

        Raises:
            InputError: for an invalid prompt, seed, size or option, with the valid ones; for values
                that are not finite; and for too little memory.
        """
        check_output_type(output_type)
        request = self._request(prompt, seed, generator, extra, options.replace(names))
        size = math.prod(request.pixels) * len(request.prompts)
        if output_type in ("pt", "np"):
            size *= 4
        require_memory(size, torch.device("cpu"), "returning all videos at once", "use stream()")
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
        """Like `__call__`, but yield each video, uint8 (T, H, W, 3), as soon as it is finished.

        The arguments are checked immediately. Memory and the wait for the first video do not grow
        with the number of prompts.
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
        """Like `__call__`, but return fp32 pixels (B, 3, T, H, W) in [-1, 1] on the device."""
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
        """Check all arguments before anything is computed."""
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
        # A lower bound of the memory: the fp32 pixels of one video.
        require_memory(
            4 * 3 * frames * height * width,
            self.device,
            f"a video of {frames} frames of {height}x{width}",
            _SMALLER,
        )
        self.bundle.text_encoder.check(prompts)
        if plan.cfg_scale != 1:
            self.bundle.text_encoder.check([plan.negative_prompt])
        # Last, so that a rejected call does not advance the generators.
        seeds = [_seed_of(source) for source in sources]
        pixels = (frames, height, width, 3)
        return _Request(prompts, seeds, given, plan, latent, pixels, options.batch_size)

    @torch.inference_mode()
    def _batches(self, request: _Request) -> Iterator[Tensor]:
        """Yield the pixels (b, 3, T, H, W) of each network call.

        With `offload`, each part handles several calls per move, because moving it takes longer.
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
                    self._check_finite(pixels, "pixels")  # clamping would turn infinity into white
                    yield pixels.clamp(-1, 1)

    def _latents(self, request: _Request, places: Sequence[int]) -> list[Tensor]:
        """Return the latents of some of the videos, one tensor per network call."""
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
        """Raise InputError for values that are not finite, which would be written as black."""
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise InputError(
                f"{bad} of {values.numel()} values of the {kind} are NaN or infinite in "
                f"{str(self.dtype).removeprefix('torch.')}; load the model in bfloat16 or float32, "
                "lower the scale of a LoRA, or use other weights"
            )

    def latent_shape(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Return the latent shape (C, T, H, W) of a video; None is the trained size.

        Raises:
            InputError: for a size that does not fit the codec or the model, naming the nearest ones
                that do, and the trained one.
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
        """Draw the noise (B, C, T, H, W) fp32 that videos with these seeds start from.

        Args:
            seeds: B seeds.
            shape: of a latent, (C, T, H, W); None is that of the trained size.
            step: number of the sampling step, for samplers that add fresh noise before later steps.
        """
        shape = self.latent_shape() if shape is None else shape
        # The key has no place in the batch, so that a video does not depend on it.
        draws = [sample_noise(1, shape, Draw(seed, step, stream="generate")) for seed in seeds]
        return torch.cat(draws).to(self.device)

    @contextmanager
    def at_work(self, part: nn.Module) -> Iterator[None]:
        """Keep a part on the device within the block; with `offload`, move it back afterwards."""
        if self._offload_to is None:
            yield
            return
        _move(part, self._offload_to)
        try:
            yield
        finally:
            _move(part, "cpu")

    def _latent_size(self, size: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Return the latent (T, H, W) of (frames, height, width); None if the size does not fit."""
        try:
            latent = self.bundle.codec.latent_shape(*size)
            self.bundle.backbone.token_grid(latent)
        except InputError:
            return None
        return latent

    def _nearest(self, size: tuple[int, ...], axis: int) -> list[int]:
        """Return the nearest values below and above size[axis] that fit the model.

        Values further away than `reach` are of no use, and the search could take minutes.
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
    """A checked request.

    Attributes:
        prompts, seeds: one of each per video.
        extra: extra inputs by name, one row per video.
        plan: how to sample.
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
"""Network calls per move of a part with `offload`. Their latents are small."""

_MOST_STEPS = 1000

_SMALLER = (
    "ask for fewer frames or a smaller size, or try batch_size 1, bfloat16, or offload on a GPU"
)


def _move(part: nn.Module, device: torch.device | str) -> None:
    """Move a part, outside inference mode: weights copied in it could never be trained."""
    with torch.inference_mode(False):
        part.to(device)


def _one_row_each(
    extra: Mapping[str, Tensor], read: Sequence[str], videos: int
) -> dict[str, Tensor]:
    """Return the extra inputs with one row per video."""
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
                f"extra {name!r} must be a tensor with {videos} rows, one per video, or with one "
                f"row for all, got {got}"
            )
        rows[name] = value.expand(videos, *value.shape[1:])
    return rows


def check_prompts(prompts: Sequence[object]) -> None:
    """Raise InputError for a prompt that is empty or not text."""
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"a prompt must be non-empty text, got {text!r}; describe what to show, such as "
                '"a red seven moving left"'
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the prompt {text!r} contains bytes that are not UTF-8; save or type it as UTF-8"
            ) from error


def _pair(
    prompt: str | Sequence[str], seed: Seeds, generator: Generators
) -> tuple[list[str], list[int] | list[torch.Generator]]:
    """Return one prompt and one seed or generator per video."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    sources = _sources(seed, generator)
    if not prompts or not sources:
        raise InputError("the list of prompts or seeds is empty; pass at least one of each")
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
    """Return the seeds or generators as a list."""
    if generator is None:
        seeds = [0] if seed is None else list(seed) if isinstance(seed, Iterable) else [seed]
        for number in seeds:
            if not isinstance(number, int) or isinstance(number, bool):
                raise InputError(f"a seed must be a whole number, got {number!r}")
        return seeds
    if seed is not None:
        raise InputError("pass either a seed or a generator, not both: each determines the noise")
    generators = list(generator) if isinstance(generator, Iterable) else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise InputError(f"generator must be a torch.Generator or a list of them, got {one!r}")
    return generators


def _seed_of(source: int | torch.Generator) -> int:
    """Return the seed itself, or draw one from the generator."""
    if isinstance(source, int):
        return source
    return int(torch.randint(2**63 - 1, (), generator=source, device=source.device))
