"""Export of models, also to the layouts of other projects: diffusers folders and ComfyUI files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from apt.checkpoints.external import COMPONENT_FILES, is_component_file
from apt.checkpoints.info import (
    PIPELINE_FILE,
    CodecInfo,
    ComponentInfo,
    ModelInfo,
    without_folders,
    write_info,
)
from apt.checkpoints.layouts import COMFYUI_PREFIX, Family, all_families, family_of, original_layout
from apt.checkpoints.load import describe, describe_model, load_bundle, load_codec, load_model
from apt.checkpoints.reading import INDEX_SUFFIX, read_json, read_pipeline
from apt.checkpoints.save import save_bundle, save_codec
from apt.checkpoints.source import WEIGHTS_STEM, Source, locate
from apt.checkpoints.weights import cast_type, save_tensors
from apt.errors import CheckpointError, InputError
from apt.files import write_text
from apt.models.transformer import DiffusionTransformer
from apt.outputs import check_folder, check_place
from apt.untrusted import check_links

Format = Literal["apt", "diffusers", "comfyui"]

SCHEDULER = "FlowMatchEulerDiscreteScheduler"

_SCHEDULER_CONFIG = {
    "_class_name": SCHEDULER,
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
}


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    format: Format = "apt",
    dtype: torch.dtype | None = None,
    base: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model for this package, for diffusers or for ComfyUI.

    The training record in the exported apt.json names no local folders.

    Args:
        model: the folder, built-in name or Hub id of a model, as in `load_bundle`; for "apt" also
            the folder of a codec.
        out: a folder, which is created; for "comfyui" a file that ends in .safetensors.
        format: "apt": see `save_bundle`. "diffusers": a whole pipeline, with copies of the text
            encoders and VAE of `base`; with num_inference_steps=1 and guidance_scale=1, the stock
            pipeline gives the same output as ours. "comfyui": only the diffusion model, in the
            layout of its authors.
        dtype: dtype of the weights in the file; None is fp32.
        base: folder or Hub id of the pipeline that provides the other parts; None is the one that
            this model's VAE comes from.
        max_shard_size: size limit of the files in a diffusers folder, such as "5GB".

    Returns:
        The folder or file that was written.

    Raises:
        CheckpointError: for a model of no public family, a base without those parts, weights that
            are not finite, or a failure to write.
        InputError: for a place that cannot be written to, or options that exclude each other.
    """
    path = Path(out)
    _check_arguments(model, path, format, base, max_shard_size)
    if format == "apt":
        alone = describe(model)
        if isinstance(alone, CodecInfo):
            return save_codec(path, load_codec(model), without_folders(alone), dtype=dtype)
        bundle = load_bundle(model)
        bundle.info = without_folders(bundle.info)
        external = bundle.info.text_encoder.weights is None
        return save_bundle(path, bundle, dtype=dtype, external_text_encoder=external)
    # Text encoder and VAE are copied as files, never loaded.
    backbone, info = load_model(model), describe_model(model)
    family = family_of(backbone.config)
    if family is None:
        known = ", ".join(family.name for family in all_families())
        raise CheckpointError(
            f"{info.model.architecture!r} does not belong to a public family ({known}), so "
            f"{format} has no class for it; use --format apt"
        )
    try:
        if format == "comfyui":
            return _export_file(backbone, family, path, dtype)
        return _export_pipeline(backbone, info, family, path, dtype, base, max_shard_size)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot export to {str(out)!r}: {error.strerror or error}; free some space or choose "
            "another folder"
        ) from error


def _check_arguments(
    model: str | Path, out: Path, format: Format, base: str | None, max_shard_size: str
) -> None:
    """Raise InputError for errors that would otherwise occur only after loading the model."""
    if format == "comfyui":
        if out.suffix != ".safetensors":
            raise InputError(
                f"the format comfyui is a single file, so {str(out)!r} must end in .safetensors"
            )
        check_place(out)
    else:
        check_folder(out)
        if out.resolve() == Path(model).expanduser().resolve():
            raise InputError(f"{str(out)!r} is the model itself; choose another folder")
    if format == "apt" and (out / PIPELINE_FILE).is_file():
        raise InputError(
            f"{str(out)!r} is a diffusers pipeline, in which files of the format apt would be "
            "ignored; choose another folder"
        )
    if base is not None and format != "diffusers":
        raise InputError(f"base is only for the format diffusers, not {format}; leave it out")
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]B", max_shard_size.upper()):
        raise InputError(
            f'max_shard_size must be a size such as "5GB" or "500MB", got {max_shard_size!r}'
        )


def _export_file(
    backbone: DiffusionTransformer, family: Family, path: Path, dtype: torch.dtype | None
) -> Path:
    state = backbone.state_dict()
    tensors = {}
    for theirs, made_of in original_layout(state, family.rules_for(backbone.config)).items():
        parts = [state[name] for name in made_of.ours]
        if made_of.swap_halves:
            parts = [torch.cat(part.chunk(2)[::-1]) for part in parts]
        tensors[COMFYUI_PREFIX + theirs] = parts[0] if len(parts) == 1 else torch.cat(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, dtype)
    return path


def _export_pipeline(
    backbone: DiffusionTransformer,
    info: ModelInfo,
    family: Family,
    folder: Path,
    dtype: torch.dtype | None,
    base: str | None,
    max_shard_size: str,
) -> Path:
    source = _base_pipeline(info, base)
    index, parts = read_pipeline(source.folder / PIPELINE_FILE)
    if index.get("_class_name") != family.pipeline_class:
        raise CheckpointError(
            f"{source.name!r} is a {index.get('_class_name')}, expected a {family.pipeline_class}; "
            "pass --base with a pipeline of the same family"
        )
    if folder.resolve() == source.folder.resolve():
        raise InputError(f"{str(folder)!r} is the base itself; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # This file, which makes the folder a pipeline, is written last: half an export is not one.
    (folder / PIPELINE_FILE).unlink(missing_ok=True)
    _copy_components(source, parts, folder)
    _save_transformer(backbone, family, folder / "transformer", dtype, max_shard_size)
    scheduler = folder / "scheduler"
    scheduler.mkdir(exist_ok=True)
    # One step starts at t = 1 with any shift, but several steps need the model's.
    shift = {"shift": info.sampling.timestep_shift}
    _write_json(scheduler / "scheduler_config.json", _SCHEDULER_CONFIG | shift)
    write_info(folder, without_folders(_portable(info)))
    index["transformer"] = ["diffusers", family.diffusers_class]
    index["scheduler"] = ["diffusers", SCHEDULER]
    if "transformer_2" in index:
        # One step needs only the high-noise expert.
        index |= {"transformer_2": [None, None], "boundary_ratio": None}
    _write_json(folder / PIPELINE_FILE, index)
    return folder


def _base_pipeline(info: ModelInfo, base: str | None) -> Source:
    codec = info.codec.config
    name = base or codec.get("repo")
    revision = None if base else codec.get("revision")
    if name is None:
        raise CheckpointError(
            f"the codec {info.codec.architecture!r} does not come from a pipeline; pass --base "
            "with a pipeline to take text encoder and VAE from"
        )
    source = locate(name, revision)
    if not (source.folder / PIPELINE_FILE).is_file():
        raise CheckpointError(
            f"{name!r} has no {PIPELINE_FILE}, so it is not a pipeline to take text encoder and "
            "VAE from; pass --base with one"
        )
    return source


def _copy_components(source: Source, parts: Sequence[str], folder: Path) -> None:
    """Copy all parts of the pipeline other than transformers and scheduler, unchanged."""
    names = [name for name in parts if not name.startswith("transformer") and name != "scheduler"]
    source.fetch([f"{name}/{pattern}" for name in names for pattern in COMPONENT_FILES])
    for name in names:
        part = source.folder / name
        if not part.is_dir():
            raise CheckpointError(
                f"{str(source.folder)!r} lacks the folder {name!r} that its {PIPELINE_FILE} names; "
                "copy or download it again"
            )
        files = [file for file in sorted(part.iterdir()) if is_component_file(file)]
        check_links(source.folder, files)
        for file in files:
            if not file.is_file():
                raise CheckpointError(
                    f"{str(file)!r} is a folder, expected a file; copy or download the pipeline "
                    "again"
                )
            if file.name.endswith("config.json"):
                read_json(file)
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in files:
            shutil.copyfile(file, target / file.name)


def _save_transformer(
    backbone: DiffusionTransformer,
    family: Family,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    state = backbone.state_dict()
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.safetensors"), *folder.glob(f"*{INDEX_SUFFIX}")):
        old.unlink()
    # Only the sizes of what is written matter.
    empty = {key: cast_type(torch.empty_like(v, device="meta"), dtype) for key, v in state.items()}
    split = split_torch_state_dict_into_shards(
        empty,
        filename_pattern=WEIGHTS_STEM + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        save_tensors(folder / name, {key: state[key] for key in keys}, dtype)
    if split.is_sharded:
        _write_json(
            folder / f"{WEIGHTS_STEM}.safetensors{INDEX_SUFFIX}",
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename},
        )
    _write_json(folder / "config.json", family.to_diffusers(backbone.config))


def _portable(info: ModelInfo) -> ModelInfo:
    """Return the info for a pipeline's apt.json, whose parts are in the folder itself."""

    def here(part: ComponentInfo) -> ComponentInfo:
        config = {**part.config, "repo": ".", "revision": None}
        return dataclasses.replace(part, config=config, weights=None)

    return dataclasses.replace(
        info,
        model=dataclasses.replace(info.model, weights=None),
        text_encoder=here(info.text_encoder),
        codec=here(info.codec),
    )


def _write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=2) + "\n")
