"""Evaluate diffusers pipelines, including the published peers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apt.checkpoints.external import first_line, import_hub_extra, quiet_library
from apt.checkpoints.info import PIPELINE_FILE
from apt.checkpoints.reading import read_json, read_pipeline
from apt.checkpoints.source import Source, locate, weights_digest
from apt.device import explained_memory, find_device
from apt.errors import CheckpointError, InputError
from apt.evaluate.peers import Peer
from apt.generate_options import DIFFUSERS_NAMES, GenerateOptions
from apt.samples import SampleKey
from apt.untrusted import check_links, read_entries

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS = ".safetensors"
_CALLS = {own: name for name, own in DIFFUSERS_NAMES.items()}


def load_pipeline(
    place: str,
    options: GenerateOptions,
    *,
    fps: float | None = None,
    device: torch.device | str | None = None,
    dtype: str = "float32",
) -> PipelineModel:
    """Load any pipeline from text to images or videos.

    Args:
        place: a folder or a Hub id.
        options: how to sample; unset ones are the pipeline's defaults.
        fps: of its videos.
        device: None uses a GPU if there is one.
        dtype: of the weights.

    Raises:
        CheckpointError: a pipeline that does not exist or cannot be loaded.
        InputError: an option that it does not take, or videos without a frame rate.
        MissingPackageError: diffusers is not installed.
    """
    source = _fetched(locate(place))
    pipeline = _load(source, dtype)
    content = source.revision or weights_digest(source.folder)
    settings = {"model": place, "model_content": content, "dtype": dtype}
    return PipelineModel(pipeline, options, settings, fps=fps, device=device)


def load_peer(
    peer: Peer,
    options: GenerateOptions,
    *,
    unet: Path | None = None,
    device: torch.device | str | None = None,
    dtype: str | None = None,
) -> PipelineModel:
    """Load a published model with its card's settings, which `options` override.

    Arguments and errors are those of `load_pipeline`; `unet` is a file that replaces the one that
    the peer names. Also raises InputError for another number of steps if the peer fixes its
    timesteps, and for weights that are published as a pickle if `unet` is not given.
    """
    if "timesteps" in peer.call and options.num_steps not in (None, peer.num_steps):
        raise InputError(
            f"{peer.about}, runs only at timesteps {peer.call['timesteps']}; leave num_steps out"
        )
    file = _unet_file(peer, unet)
    own = GenerateOptions(
        num_steps=peer.num_steps,
        cfg_scale=peer.guidance_scale,
        height=peer.side,
        width=peer.side,
    )
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    dtype = dtype or peer.dtype
    source = _fetched(locate(peer.repo))
    pipeline = _load(source, dtype)
    settings: dict[str, Any] = {
        "model": peer.repo,
        "model_content": source.revision or weights_digest(source.folder),
        "dtype": dtype,
        "licence": peer.licence,
    }
    if file is not None:
        settings["unet"] = weights_digest(file)
        _fill(pipeline.unet, file)
    if peer.scheduler is not None:
        kind = getattr(import_hub_extra("diffusers"), peer.scheduler)
        changes = dict(peer.scheduler_options)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    return PipelineModel(pipeline, own.replace(given), settings, call=peer.call, device=device)


class PipelineModel:
    """A pipeline that generates samples; see `apt.evaluate.models.SampleModel`.

    Each sample has its own generator on the CPU, seeded with the sample's seed, so it does not
    depend on other samples.

    Args:
        pipeline: a diffusers pipeline.
        options: how to sample; unset ones are the pipeline's defaults.
        settings: what else determines its samples.
        call: further options of its call.
        fps: of its videos.
        device: None uses a GPU if there is one.

    Raises InputError for an option that it does not take, or videos without a frame rate.
    """

    def __init__(
        self,
        pipeline: Any,
        options: GenerateOptions,
        settings: Mapping[str, Any],
        *,
        call: Mapping[str, Any] | None = None,
        fps: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        accepted = inspect.signature(pipeline.__call__).parameters
        self._kind = type(pipeline).__name__
        self._call = _call_options(self._kind, options, accepted) | dict(call or {})
        default = accepted["num_frames"].default if "num_frames" in accepted else 1
        self.frames = self._call.get("num_frames", default)
        if self.frames > 1 and fps is None:
            raise InputError(
                f"{settings['model']} makes videos but does not define a frame rate; add one, as "
                "in NAME,fps=16"
            )
        self.fps = 1.0 if fps is None else fps
        self.batch_size = 1
        self.settings: Mapping[str, Any] = {
            **settings,
            "pipeline": self._kind,
            "scheduler": type(pipeline.scheduler).__name__,
            "num_steps": self._default("num_inference_steps", accepted),
            "cfg_scale": self._default("guidance_scale", accepted),
            "fps": self.fps,
            "call": self._call,
        }
        with explained_memory(f"loading {settings['model']!r}", "try --dtype bfloat16"):
            self._pipeline = pipeline.to(find_device(device))
        self._pipeline.set_progress_bar_config(disable=True)

    def _default(self, name: str, accepted: Mapping[str, inspect.Parameter]) -> Any:
        return self._call.get(name, accepted[name].default if name in accepted else None)

    def stream(self, keys: Sequence[SampleKey]) -> Iterator[Tensor]:
        """See `SampleModel`."""
        return (self._sample(prompt, seed) for prompt, seed in keys)

    def _sample(self, prompt: str, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        with explained_memory(f"generating with {self._kind}", "try --dtype bfloat16"):
            try:
                made = self._pipeline(
                    prompt=prompt, generator=generator, output_type="np", **self._call
                )
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{self._kind} rejects {prompt!r} with {self._call}: {error}"
                ) from error
        # A video is (1, T, H, W, 3), an image (1, H, W, 3).
        pixels = np.asarray(made.frames if hasattr(made, "frames") else made.images)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        if not np.isfinite(pixels).all():
            raise InputError(
                f"{self._kind} returned values that are not finite for {prompt!r}; try --dtype "
                "bfloat16 or float32"
            )
        return torch.from_numpy((pixels * 255).round().clip(0, 255).astype(np.uint8))


def _call_options(
    kind: str, options: GenerateOptions, accepted: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Return options as the pipeline names them. Raises InputError for one it does not take."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name == "batch_size":
            continue
        name = _CALLS.get(field.name, field.name)
        if field.name == "frames" and name not in accepted and value == 1:
            continue
        if field.name in ("sampler", "timesteps") or name not in accepted:
            known = [own for own in _OPTIONS if _CALLS.get(own, own) in accepted]
            raise InputError(
                f"diffusers' {kind} takes no option {field.name!r}; it takes {', '.join(known)}"
            )
        found[name] = value
    return found


_OPTIONS = ("num_steps", "cfg_scale", "negative_prompt", "frames", "height", "width")


def _fetched(source: Source) -> Source:
    """Download the files of the pipeline's parts, and no others; return the source."""
    index = source.folder / PIPELINE_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{source.name!r} has no {PIPELINE_FILE}, so it is not a diffusers pipeline; give a "
            "model of this package without 'diffusers:'"
        )
    _, parts = read_pipeline(index)
    source.fetch([PIPELINE_FILE, *(f"{name}/*" for name in parts)])
    return source


def _load(source: Source, dtype: str) -> Any:
    diffusers = import_hub_extra("diffusers")
    with (
        staged_pipeline(source.folder) as stage,
        quiet_library("diffusers"),
        explained_memory(f"loading {source.name!r}", "try --dtype bfloat16"),
    ):
        try:
            return diffusers.DiffusionPipeline.from_pretrained(
                str(stage),
                torch_dtype=_DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        # Someone else's configuration can make the library raise anything.
        except Exception as error:
            reason = first_line(error).replace(str(stage), str(source.folder))
            raise CheckpointError(
                f"diffusers cannot load the pipeline {source.name!r}: {reason}"
            ) from error


@contextmanager
def staged_pipeline(folder: Path) -> Iterator[Path]:
    """Yield a folder with a pipeline's checked configurations and links to its other files.

    Raises CheckpointError for a configuration that names code, damaged headers, links that lead out
    of the folder, or a file that cannot be written.
    """
    index, parts = read_pipeline(folder / PIPELINE_FILE)
    with ExitStack() as stack:
        try:
            stage = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="apt-")))
            (stage / PIPELINE_FILE).write_text(json.dumps(index), encoding="utf-8")
            for part in parts:
                (stage / part).mkdir()
                files = [f for f in sorted((folder / part).glob("*")) if f.suffix in _KINDS]
                check_links(folder, files)
                for file in files:
                    _stage(file, stage / part / file.name)
        except OSError as error:
            raise CheckpointError(
                f"cannot prepare {str(folder)!r} ({error.strerror or error}); free some space, or "
                "set TMPDIR to a disk with free space"
            ) from error
        yield stage


_KINDS = (".json", ".model", _SAFETENSORS, ".txt")
_TABLES = ("added_tokens.json", "tokenizer.json", "vocab.json")
"""Vocabularies, whose words may be anything, so they are linked unchecked."""


def _stage(file: Path, place: Path) -> None:
    if file.suffix == ".json" and file.name not in _TABLES:
        place.write_text(json.dumps(read_json(file)), encoding="utf-8")
        return
    if file.suffix == _SAFETENSORS:
        read_entries(file)
    place.symlink_to(file.resolve())


def _unet_file(peer: Peer, given: Path | None) -> Path | None:
    """Return the file of a peer's own UNet, or None if it has none."""
    if peer.unet is None:
        if given is not None:
            raise InputError(f"{peer.about}, has no UNet of its own; leave unet out")
        return None
    if given is None and not peer.unet.name.endswith(_SAFETENSORS):
        raise InputError(
            f"{peer.about}, is published as a pickle ({peer.unet.repo}, {peer.unet.name}), which "
            "can run code and is never loaded; if you trust it, convert it to safetensors and "
            "give that file with unet=FILE"
        )
    if given is None:
        source = locate(peer.unet.repo)
        source.fetch([peer.unet.name])
        given = source.folder / peer.unet.name
    if given.suffix != _SAFETENSORS or not given.is_file():
        raise CheckpointError(f"{str(given)!r} is missing, or not a {_SAFETENSORS} file")
    return given


def _fill(unet: torch.nn.Module, file: Path) -> None:
    """Load all weights from a file. Raises CheckpointError unless it has exactly these."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        unet.load_state_dict(load_file(file))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(file)!r} does not fit the pipeline's UNet: {error}") from error
