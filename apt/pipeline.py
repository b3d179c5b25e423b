"""From a prompt to a video."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from apt.checkpoints.bundle import ModelBundle
from apt.checkpoints.info import ModelInfo
from apt.checkpoints.load import load_bundle
from apt.checkpoints.lora import find_lora, load_lora, merge_lora
from apt.device import find_device
from apt.errors import InputError
from apt.flow import sampling_timesteps
from apt.memory import explained_memory, require_memory
from apt.models.conditions import TextCondition
from apt.models.registry import untrained_timesteps
from apt.pixels import to_uint8
from apt.rng import Draw, sample_noise
from apt.sampling import (
    SAMPLERS,
    SamplerName,
    bind,
    bind_guided,
    check_timesteps,
    one_step_sample,
    sample,
)

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
        with explained_memory(f"merging {str(name_or_file)!r}", "load the model in bfloat16"):
            merge_lora(backbone, load_lora(find_lora(name_or_file), backbone), scale=scale)
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
        self,
        *,
        num_steps: int | None = None,
        sampler: SamplerName | Literal["auto"] = "auto",
        timesteps: Sequence[float] | None = None,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> SamplingPlan:
        """Resolve sampling options without generating; arguments as for calling the pipeline."""
        defaults = self.info.sampling
        if sampler == "auto":
            sampler = defaults.sampler or _SAMPLERS_BY_STAGE[self.stage]
        if sampler not in SAMPLERS:
            raise InputError(
                f"unknown sampler {sampler!r}; choose from auto, {', '.join(SAMPLERS)}"
            )
        if timesteps is None:
            steps = defaults.num_steps if num_steps is None else num_steps
            if not isinstance(steps, int) or steps < 1:
                raise InputError(f"num_steps must be a whole number of at least 1, got {steps!r}")
            if steps > _MOST_STEPS:
                raise InputError(f"num_steps must be at most {_MOST_STEPS}, got {steps}")
            grid = check_timesteps(sampling_timesteps(steps, defaults.timestep_shift))
        else:
            grid = check_timesteps(timesteps)
            if num_steps is not None and num_steps != len(grid) - 1:
                raise InputError(
                    f"{len(grid)} timesteps make {len(grid) - 1} steps, but num_steps is "
                    f"{num_steps}; leave one of them out"
                )
        # Distilled models have their guidance built in.
        own_scale = 1.0 if self.stage in ("consistency", "apt") else defaults.cfg_scale
        scale = own_scale if cfg_scale is None else float(cfg_scale)
        if not 0 <= scale < float("inf"):
            raise InputError(f"cfg_scale must be finite and at least 0, got {cfg_scale}")
        return SamplingPlan(
            stage=self.stage,
            sampler=sampler,
            timesteps=tuple(grid),
            cfg_scale=scale,
            negative_prompt=(
                defaults.negative_prompt if negative_prompt is None else negative_prompt
            ),
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_steps: int | None = None,
        sampler: SamplerName | Literal["auto"] = "auto",
        timesteps: Sequence[float] | None = None,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """Generate videos, all at once; `stream` gives one after the other.

        Args:
            prompt: one or several; none of them empty.
            seed: one for all prompts, or one each. Several seeds with one prompt make several
                videos of it.
            num_steps: network evaluations; None is the model's own number (1 after APT).
            sampler: "consistency" (back to t with fresh noise), "euler", or "auto", which follows
                from the model. In one step they are the same.
            timesteps: the grid itself, from 1 to 0, such as (1, 0.6, 0), in place of `num_steps`.
            cfg_scale: classifier-free guidance; 1 is off. None is the model's own for diffusion,
                and off for distilled models, which have it built in.
            negative_prompt: what guidance leads away from; None is the model's own.
            frames, height, width: None is what the model was trained on.
            batch_size: videos per network call. Above 1 is faster for many, and equal to rounding.

        Returns:
            uint8 (B, T, H, W, 3) on the CPU, B being the number of prompts or of seeds.

        Raises:
            InputError: for a prompt, seed, size or option that does not fit, saying what does; for
                values that are not finite, and for too little memory.
        """
        request = self._request(
            prompt,
            seed,
            self.plan(
                num_steps=num_steps,
                sampler=sampler,
                timesteps=timesteps,
                cfg_scale=cfg_scale,
                negative_prompt=negative_prompt,
            ),
            (frames, height, width),
            batch_size,
        )
        size = math.prod(request.pixels) * len(request.prompts)
        require_memory(size, torch.device("cpu"), "all the videos together", "use stream()")
        return torch.cat([_frames(batch) for batch in self._batches(request)])

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_steps: int | None = None,
        sampler: SamplerName | Literal["auto"] = "auto",
        timesteps: Sequence[float] | None = None,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
    ) -> Iterator[Tensor]:
        """As calling the pipeline, but each video, uint8 (T, H, W, 3), as soon as it is made.

        Arguments are checked, and prompts read, at once; memory and the wait for the first video
        do not grow with their number.
        """
        request = self._request(
            prompt,
            seed,
            self.plan(
                num_steps=num_steps,
                sampler=sampler,
                timesteps=timesteps,
                cfg_scale=cfg_scale,
                negative_prompt=negative_prompt,
            ),
            (frames, height, width),
            batch_size,
        )
        return (video for batch in self._batches(request) for video in _frames(batch))

    def sample_pixels(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_steps: int | None = None,
        sampler: SamplerName | Literal["auto"] = "auto",
        timesteps: Sequence[float] | None = None,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """As calling the pipeline, but fp32 pixels (B, 3, T, H, W) in [-1, 1] on the device."""
        request = self._request(
            prompt,
            seed,
            self.plan(
                num_steps=num_steps,
                sampler=sampler,
                timesteps=timesteps,
                cfg_scale=cfg_scale,
                negative_prompt=negative_prompt,
            ),
            (frames, height, width),
            batch_size,
        )
        return torch.cat(list(self._batches(request)))

    def _request(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int],
        plan: SamplingPlan,
        size: tuple[int | None, int | None, int | None],
        batch_size: int,
    ) -> _Request:
        """Everything that can be wrong, looked at before anything is computed."""
        prompts, seeds = _pair(prompt, seed)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        latent = self.latent_shape(*size)
        trained = self.info.sample
        own = (trained.frames, trained.height, trained.width)
        frames, height, width = (
            mine if asked is None else asked for mine, asked in zip(own, size, strict=True)
        )
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
        return _Request(prompts, seeds, plan, latent, (frames, height, width, 3), batch_size)

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
            with self._at_work(self.bundle.codec):
                for x in latents:
                    with explained_memory(doing, _SMALLER):
                        pixels = self.bundle.codec.decode(x).float().clamp(-1, 1)
                    self._check_finite(pixels, "pixels")
                    yield pixels

    def _latents(self, request: _Request, places: Sequence[int]) -> list[Tensor]:
        """Latents of some of the videos, one tensor for each network call."""
        texts = [request.prompts[place] for place in places]
        plan, size = request.plan, request.batch_size
        with self._at_work(self.bundle.text_encoder):
            encoded = {text: self._encode(text) for text in dict.fromkeys(texts)}
            negative = self._encode(plan.negative_prompt) if plan.cfg_scale != 1 else None
        made = []
        with self._at_work(self.bundle.backbone):
            for start in range(0, len(places), size):
                x = self._sample_latents(
                    TextCondition.concatenate([encoded[t] for t in texts[start : start + size]]),
                    negative,
                    [request.seeds[place] for place in places[start : start + size]],
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

    @contextmanager
    def _at_work(self, part: nn.Module) -> Iterator[None]:
        """Have a part on the device, and with `offload` back in main memory afterwards."""
        if self._offload_to is None:
            yield
            return
        part.to(self._offload_to)
        try:
            yield
        finally:
            part.to("cpu")

    def latent_shape(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Latent shape (C, T, H, W) for a video; None takes the trained size.

        Raises:
            InputError: for a size that the codec or the model cannot take, naming the trained one.
        """
        trained = self.info.sample
        own = (trained.frames, trained.height, trained.width)
        size = tuple(
            mine if asked is None else asked
            for mine, asked in zip(own, (frames, height, width), strict=True)
        )
        for axis, name in enumerate(("frames", "height", "width")):
            alone = (*own[:axis], size[axis], *own[axis + 1 :])
            if self._latent_size(alone) is None:
                near = " or ".join(map(str, self._nearest(alone, axis) or [own[axis]]))
                raise InputError(
                    f"{name} = {size[axis]} does not fit this model; use {near}. It was trained "
                    f"on {own[0]} frames of {own[1]}x{own[2]} (height x width)"
                )
        latent = self._latent_size(size)
        assert latent is not None, "the axes fit one by one"
        return (self.bundle.codec.channels, *latent)

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
        condition: TextCondition,
        negative: TextCondition | None,
        seeds: Sequence[int],
        shape: tuple[int, int, int, int],
        plan: SamplingPlan,
    ) -> Tensor:
        backbone = self.bundle.backbone

        def noise(step: int) -> Tensor:
            # The key holds the seed alone: a video does not depend on its place in the batch.
            draws = [sample_noise(1, shape, Draw(seed, step, stream="generate")) for seed in seeds]
            return torch.cat(draws).to(self.device)

        if negative is None:
            predict = bind(backbone, condition)
        else:
            predict = bind_guided(backbone, condition, negative, plan.cfg_scale)
        z = noise(0)
        if len(plan.timesteps) == 2:
            return one_step_sample(predict, z)
        return sample(predict, z, plan.timesteps, sampler=plan.sampler, noise=noise)

    def _encode(self, prompt: str) -> TextCondition:
        return self.bundle.text_encoder([prompt]).to(self.device, self.dtype)

    def _parameter(self) -> Tensor:
        (backbone, *_) = self.bundle.modules()
        return next(backbone.parameters())


@dataclass(frozen=True)
class _Request:
    """What to generate, checked.

    Attributes:
        prompts, seeds: one each for every video.
        plan: how.
        latent: (C, T', H', W').
        pixels: (T, H, W, 3).
        batch_size: videos per network call.
    """

    prompts: list[str]
    seeds: list[int]
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


def _frames(pixels: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) on the CPU from pixels (B, 3, T, H, W)."""
    return to_uint8(pixels).permute(0, 2, 3, 4, 1).contiguous().cpu()


def _pair(prompt: str | Sequence[str], seed: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """One prompt and one seed per video."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not prompts or not seeds:
        raise InputError("there is no prompt to generate from, or no seed")
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
    for number in seeds:
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"a seed must be a whole number, got {number!r}")
    if len(prompts) == 1:
        prompts *= len(seeds)
    if len(seeds) == 1:
        seeds *= len(prompts)
    if len(prompts) != len(seeds):
        raise InputError(
            f"{len(prompts)} prompts need one seed, or {len(prompts)} of them; got {len(seeds)}"
        )
    return prompts, seeds
