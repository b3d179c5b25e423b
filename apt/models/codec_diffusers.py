"""Latent codecs of public checkpoints: diffusers' autoencoders and their latent statistics.

They are frozen, and not saved with our models: the config says where to load them from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from apt.checkpoints.external import (
    DType,
    import_hub_extra,
    load_complete,
    local_folder,
    read_config,
    torch_dtype,
)
from apt.errors import AptError, CheckpointError, ConfigError, InputError
from apt.models.architectures import CODECS
from apt.pixels import LatentCodec


@dataclass(frozen=True, kw_only=True)
class DiffusersCodecConfig:
    """A pretrained autoencoder; values of None are read from its own config.

    Attributes:
        class_name: class in diffusers, such as "AutoencoderKLWan"; empty uses the class that the
            repository names. Image autoencoders encode videos frame by frame. Video autoencoders
            must be causal: their first latent frame covers a single frame.
        repo: Hub id or local folder.
        revision: branch, tag or commit on the Hub.
        subfolder: folder in the repository; "" for the top.
        dtype: dtype of the weights and the computation. Inputs and outputs are fp32.
        latents_mean, latents_std: statistics of the raw latents, one value per channel.
        temporal_compression: frames per latent frame after the first.
        spatial_compression: pixels per latent along height and width.
        tiling: process large frames in overlapping tiles, which takes less memory; seams are
            blended, so results differ slightly.
        slicing: process one sample of a batch at a time, which takes less memory.
    """

    class_name: str
    repo: str
    revision: str | None = None
    subfolder: str = "vae"
    dtype: DType = "float32"
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    temporal_compression: int | None = None
    spatial_compression: int | None = None
    tiling: bool = False
    slicing: bool = False

    def build(self) -> DiffusersCodec:
        """Load the weights, and download what is not in the Hub's cache."""
        return DiffusersCodec(self)

    def shape(self) -> DiffusersCodec:
        """Return a codec without weights, which knows its channels and compression."""
        return DiffusersCodec(self, weights=False)


class DiffusersCodec(LatentCodec):
    """Encodes pixels to normalised latents, `(mode of the posterior - mean) / std`, and back.

    If the config does not name a class, the one that was found is first tried on a small clip.
    There are no gradients, and the codec stays in evaluation mode. Without `weights` it only knows
    its shapes.

    Raises:
        MissingPackageError: if diffusers is not installed.
        InputError: if diffusers has no such class, or it is not an autoencoder.
        ConfigError: if latent statistics or compression are missing or do not fit.
        CheckpointError: if the repository, the folder or its weights cannot be used.
    """

    def __init__(self, config: DiffusersCodecConfig, *, weights: bool = True) -> None:
        super().__init__()
        diffusers = import_hub_extra("diffusers")
        if not config.repo:
            raise ConfigError(
                "this codec needs the folder or Hub id of an autoencoder; set its option repo "
                "(--model.codec-options repo DIR)"
            )
        folder = local_folder(config.repo, config.revision, [config.subfolder]) / config.subfolder
        description = read_config(folder)
        found = description.get("_class_name")
        is_named = bool(config.class_name)
        if not is_named:
            config = dataclasses.replace(config, class_name=str(found))
        vae_class = getattr(diffusers, config.class_name, None)
        if vae_class is None:
            raise InputError(
                f"diffusers {diffusers.__version__} has no class {config.class_name}; check "
                "class_name, or install a version of diffusers that has it"
            )
        # Other classes, such as pipelines, would load further parts.
        is_model = isinstance(vae_class, type) and issubclass(vae_class, diffusers.ModelMixin)
        if not is_model or not hasattr(vae_class, "encode") or not hasattr(vae_class, "decode"):
            raise InputError(
                f"{config.class_name!r} of diffusers is not an autoencoder; name the folder of one"
            )
        if found != config.class_name:
            raise CheckpointError(
                f"{folder} holds {found!r}, not {config.class_name!r}; set class_name to match"
            )
        self.config = config
        if weights:
            self.vae = load_complete(vae_class, folder, dtype=torch_dtype(config.dtype))
        else:
            with torch.device("meta"):
                self.vae = vae_class.from_config(description)
        for wanted, switch in (
            (config.tiling, "enable_tiling"),
            (config.slicing, "enable_slicing"),
        ):
            if wanted and not hasattr(self.vae, switch):
                raise ConfigError(
                    f"{config.class_name} does not support {switch.removeprefix('enable_')}; turn "
                    "it off"
                )
            if wanted:
                getattr(self.vae, switch)()
        self.channels = int(self._required("latent channels", "latent_channels", "z_dim"))
        # Those like SVD's have a temporal decoder but an image encoder.
        self._is_video = any(isinstance(part, nn.Conv3d) for part in self.vae.encoder.modules())
        self.temporal_compression = self._temporal_compression()
        self.spatial_compression = self._spatial_compression()
        # Plain numbers: casting the module must not round them.
        self._mean, self._std = self._statistics()
        self.requires_grad_(False)
        self.eval()
        if weights and not is_named:
            self._check_that_it_works()

    def train(self, mode: bool = True) -> DiffusersCodec:
        """Stay in evaluation mode: the codec is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, T, H, W) in [-1, 1] to fp32 latents (B, C, T', H', W').

        Raises InputError for sizes that do not fit.
        """
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise InputError(f"pixels must be (B, 3, T, H, W), got {tuple(pixels.shape)}")
        batch, _, frames, height, width = pixels.shape
        expected = (batch, self.channels, *self.latent_shape(frames, height, width))
        x = pixels.to(self.vae.dtype)
        raw = self._posterior_mode(x) if self._is_video else _per_frame(self._posterior_mode, x)
        if tuple(raw.shape) != expected:
            raise ConfigError(
                f"{self.config.class_name} returned latents {tuple(raw.shape)}, expected "
                f"{expected}; set temporal_compression and spatial_compression of the codec"
            )
        mean, std = self._affine(raw.device)
        return (raw.float() - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, T', H', W') to fp32 pixels (B, 3, T, H, W), clamped to [-1, 1].

        Raises InputError for latents with another number of channels.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise InputError(
                f"latents must be (B, {self.channels}, T, H, W), got {tuple(latents.shape)}"
            )
        mean, std = self._affine(latents.device)
        raw = (latents.float() * std + mean).to(self.vae.dtype)
        pixels = self._decode_raw(raw) if self._is_video else _per_frame(self._decode_raw, raw)
        return pixels.float().clamp(-1, 1)

    def _check_that_it_works(self) -> None:
        """Encode and decode a small clip: not all classes of diffusers take the same arguments.

        Raises ConfigError if this fails, or returns another shape.
        """
        side = 4 * self.spatial_compression
        frames = 1 + self.temporal_compression
        clip = torch.zeros(1, 3, frames, side, side)
        name = f"{self.config.class_name} of diffusers does not work like other autoencoders"
        try:
            back = self.decode(self.encode(clip))
        except AptError:
            raise
        except Exception as error:  # third-party code may raise anything
            raise ConfigError(
                f"{name}: it fails on {frames} frames of {side}x{side} ({type(error).__name__}: "
                f"{error}); use another autoencoder"
            ) from error
        if back.shape != clip.shape:
            raise ConfigError(
                f"{name}: it returns {tuple(back.shape)} for {tuple(clip.shape)}; use another "
                "autoencoder"
            )

    def _posterior_mode(self, x: Tensor) -> Tensor:
        encoded = self.vae.encode(x)
        # Autoencoders without a posterior return latents, under either name.
        for name in ("latent", "latents"):
            if hasattr(encoded, name):
                return cast(Tensor, getattr(encoded, name))
        return cast(Tensor, encoded.latent_dist.mode())

    def _decode_raw(self, raw: Tensor) -> Tensor:
        return self.vae.decode(raw, return_dict=False)[0]

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (1, self.channels, 1, 1, 1)
        both = torch.tensor([self._mean, self._std], dtype=torch.float32, device=device)
        return both[0].view(shape), both[1].view(shape)

    def _temporal_compression(self) -> int:
        given = self.config.temporal_compression
        if not self._is_video:
            if given not in (None, 1):
                raise ConfigError(
                    f"{self.config.class_name} encodes single images, so temporal_compression "
                    f"must be 1, got {given}"
                )
            return 1
        if given is not None:
            return given
        # The spelling is that of Wan and of the classes derived from it.
        halvings = self.vae.config.get("temperal_downsample")
        if isinstance(halvings, (list, tuple)):
            return 2 ** sum(map(bool, halvings))
        return int(
            self._required(
                "temporal_compression", "temporal_compression_ratio", "scale_factor_temporal"
            )
        )

    def _spatial_compression(self) -> int:
        if self.config.spatial_compression is not None:
            return self.config.spatial_compression
        levels = self.vae.config.get("block_out_channels")
        if not self._is_video and levels is not None:
            return 2 ** (len(levels) - 1)
        return int(
            self._required(
                "spatial_compression", "spatial_compression_ratio", "scale_factor_spatial"
            )
        )

    def _statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation per channel, from our or the checkpoint's config."""
        options = self.vae.config
        mean = self.config.latents_mean or options.get("latents_mean")
        std = self.config.latents_std or options.get("latents_std")
        if mean is None and std is None:
            scaling, shift = options.get("scaling_factor"), options.get("shift_factor")
            if not scaling:
                raise ConfigError(
                    f"the config of {self.config.repo!r} has no latent statistics; set "
                    "latents_mean and latents_std of the codec"
                )
            return [shift or 0.0] * self.channels, [1 / scaling] * self.channels
        if mean is None or std is None:
            raise ConfigError("set both latents_mean and latents_std of the codec, or neither")
        if not len(mean) == len(std) == self.channels or not all(value > 0 for value in std):
            raise ConfigError(
                f"latents_mean and latents_std must have {self.channels} values each, with all of "
                f"latents_std above 0; got {len(mean)} and {len(std)} values"
            )
        return list(mean), list(std)

    def _required(self, what: str, *names: str) -> Any:
        """Return the first of several attributes that the autoencoder's config or module has."""
        for source in (self.vae.config.get, lambda name: getattr(self.vae, name, None)):
            for name in names:
                value = source(name)
                if value is not None:
                    return value
        raise ConfigError(
            f"{self.config.class_name} does not state its {what}; "
            "use another autoencoder, or set the codec's option of that name if there is one"
        )


def _per_frame(run: Any, x: Tensor) -> Tensor:
    """Apply a function of images (N, C, H, W) to each frame of (B, C, T, H, W)."""
    batch = x.shape[0]
    images = run(x.transpose(1, 2).flatten(0, 1))
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


@CODECS.register("diffusers_vae")
def diffusers_vae() -> DiffusersCodecConfig:
    """Any autoencoder of diffusers, from a folder or Hub repository of its own."""
    return DiffusersCodecConfig(class_name="", repo="", subfolder="")


@CODECS.register("wan_vae")
def wan_vae() -> DiffusersCodecConfig:
    """Wan 2.1's causal video VAE, 4x8x8, 16 channels (Apache-2.0)."""
    return DiffusersCodecConfig(
        class_name="AutoencoderKLWan", repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


@CODECS.register("wan2.2_vae")
def wan22_vae() -> DiffusersCodecConfig:
    """Wan 2.2's causal video VAE, 4x16x16, 48 channels (Apache-2.0), for the 5B model only."""
    return DiffusersCodecConfig(
        class_name="AutoencoderKLWan", repo="Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    )


@CODECS.register("kl_vae")
def kl_vae() -> DiffusersCodecConfig:
    """Stable Diffusion's image VAE, 8x8, 4 channels (MIT); encodes videos frame by frame."""
    return DiffusersCodecConfig(
        class_name="AutoencoderKL", repo="stabilityai/sd-vae-ft-mse", subfolder=""
    )


@CODECS.register("sd3_vae")
def sd3_vae() -> DiffusersCodecConfig:
    """Stable Diffusion 3 and 3.5's image VAE, 8x8, 16 channels (Stability AI community licence)."""
    return DiffusersCodecConfig(
        class_name="AutoencoderKL", repo="stabilityai/stable-diffusion-3.5-medium"
    )
