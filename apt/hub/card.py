"""The model card, made from apt.json: what a model is, where it comes from, and how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt.checkpoints.info import PIPELINE_FILE, CodecInfo, ModelInfo
from apt.checkpoints.source import split_hub_id
from apt.hub.client import page
from apt.models.architectures import CODECS, MODELS, TEXT_ENCODERS
from apt.registry import Registry

CARD_FILE = "README.md"
LIBRARY = "diffusion-apt"

# Licences that the Hub knows by these names; all others are "other", with a name and a link.
_KNOWN_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "openrail++")


def make_card(
    info: ModelInfo | CodecInfo, repo_id: str, folder: Path, *, license: str | None = None
) -> str:
    """Return the text of a model card, with metadata that the Hub understands.

    The base model and its licence come from the record of training, which each stage carries over
    from the model that it started from.

    Args:
        info: contents of apt.json.
        repo_id: repository that the model is pushed to, for the snippets.
        folder: folder of the model; shows whether diffusers can load it.
        license: licence of these weights; None takes that of the base model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    history = list(_history(info.training))
    base: Mapping[str, Any] = next((s for s in reversed(history) if "source" in s), {})
    base_id = base.get("source") if split_hub_id(str(base.get("source", ""))) else None
    carried_from = None if license else base_id
    license = license or base.get("license")
    in_diffusers = (folder / PIPELINE_FILE).is_file()
    image = info.sample.frames == 1
    tags = [LIBRARY, "adversarial-post-training", *(["one-step"] if info.stage == "apt" else [])]
    data = ModelCardData(
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        library_name="diffusers" if in_diffusers else LIBRARY,
        pipeline_tag=(
            None if isinstance(info, CodecInfo) else "text-to-image" if image else "text-to-video"
        ),
        tags=tags,
        **_licence(license, carried_from),
    )
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        _summary(info, base_id, base.get("revision")),
        "## Use it",
        *_needed_modules(info),
        _snippets(info, repo_id, in_diffusers),
        "## How it was made",
        _recipe(history),
        "## Data",
        _data_note(info, history),
        *_figures(info.training),
        "## Licence",
        _licence_note(license, carried_from),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _needed_modules(info: ModelInfo | CodecInfo) -> list[str]:
    """Return a section that names the modules to import first; empty if no part needs one."""
    parts: list[tuple[Registry[Any], str]] = [(CODECS, info.codec.architecture)]
    if not isinstance(info, CodecInfo):
        parts.append((MODELS, info.model.architecture))
        parts.append((TEXT_ENCODERS, info.text_encoder.architecture))
    modules = {name: module for registry, name in parts if (module := _module(registry, name))}
    if not modules:
        return []
    names = ", ".join(f"`{name}`" for name in modules)
    lines = "\n".join(f"import {module}" for module in dict.fromkeys(modules.values()))
    return [
        f"Some of its parts do not belong to the package ({names}). First import the code that "
        "registers them, which is not published with the weights:\n\n"
        f"```python\n{lines}\n```\n\n"
        f"On the command line: `diffusion-apt generate --import {next(iter(modules.values()))} ...`"
    ]


def _module(registry: Registry[Any], name: str) -> str | None:
    """Return the module outside the package that a part comes from; None if unknown or ours."""
    if name not in registry.names():
        return name.rpartition(".")[0] or None  # an object is named by the path of its class
    module = str(getattr(registry.get(name), "__module__", ""))
    return None if not module or module.partition(".")[0] == "apt" else module


def _history(training: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the stages of training, newest first."""
    stage: Any = training
    while isinstance(stage, Mapping) and stage:
        yield stage
        stage = stage.get("started_from")


def _licence(license: str | None, carried_from: str | None) -> dict[str, Any]:
    if license is None:
        return {}
    if license.lower() in _KNOWN_LICENCES:
        return {"license": license.lower()}
    link = {"license_link": page(carried_from)} if carried_from else {}
    return {"license": "other", "license_name": license, **link}


def _licence_note(license: str | None, carried_from: str | None) -> str:
    if license is None:
        return "Not stated: ask the author."
    return f"{license}, carried over from {carried_from}." if carried_from else f"{license}."


def _summary(info: ModelInfo | CodecInfo, base_id: str | None, commit: str | None) -> str:
    size = info.sample
    rate = f" at {size.fps:g} fps" if size.fps else ""  # 0: clips kept their own rates
    what = "Images" if size.frames == 1 else f"Videos of {size.frames} frames{rate}"
    summary = info.summary or f"a model of the stage {info.stage!r}"
    start = f", made from [{base_id}]({page(base_id)})" if base_id else ""
    at = f" at commit `{commit}`" if base_id and commit else ""
    summary = f"{summary[:1].upper()}{summary[1:]}"
    what = f"{what}, {size.width}x{size.height}"
    if isinstance(info, CodecInfo):
        return f"{summary}; architecture `{info.codec.architecture}`. {what}."
    return (
        f"{summary}{start}{at}. {what}; "
        f"architecture `{info.model.architecture}`. Steps: {info.sampling.num_steps}; "
        f"guidance: {info.sampling.cfg_scale:g}."
    )


def _snippets(info: ModelInfo | CodecInfo, repo_id: str, in_diffusers: bool) -> str:
    if isinstance(info, CodecInfo):
        return (
            "```python\nimport apt  # pip install diffusion-apt\n\n"
            f'codec = apt.load_codec("{repo_id}")\n'
            "latents = codec.encode(pixels)  # (B, 3, T, H, W) in [-1, 1]\n```"
        )
    ours = (
        "```python\nimport apt  # pip install diffusion-apt[hub]\n\n"
        f'pipeline = apt.OneStepPipeline.from_pretrained("{repo_id}")\n'
        'video = pipeline("a prompt", seed=0)  # uint8 (1, frames, height, width, 3)\n```'
    )
    if not in_diffusers:
        return ours
    size = info.sample
    frames = "" if size.frames == 1 else f"    num_frames={size.frames},\n"
    result = "images[0]" if size.frames == 1 else "frames[0]"
    guidance = info.sampling.cfg_scale
    stock = (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{repo_id}")\n'
        f'output = pipeline(\n    "a prompt",\n{frames}    height={size.height},\n'
        f"    width={size.width},\n    num_inference_steps={info.sampling.num_steps},\n"
        f"    guidance_scale={guidance:g},\n).{result}\n```"
    )
    return f"{ours}\n\nStock diffusers runs the same weights:\n\n{stock}"


def _recipe(history: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {stage.get('recipe')} | {stage.get('updates', '')} | {stage.get('batch_size', '')} | "
        f"{stage.get('seed', '')} | {stage.get('weights', '')} |"
        for stage in reversed(history)
        if "recipe" in stage
    ]
    if not rows:
        return "The weights are those of the base model."
    head = "| recipe | updates | batch size | seed | weights |\n| --- | --- | --- | --- | --- |"
    table = "\n".join([head, *rows])
    title = "Stages of `diffusion-apt train`, first to last; `apt.json` has every value."
    return f"{title}\n\n{table}"


def _data_note(info: ModelInfo | CodecInfo, history: Sequence[Mapping[str, Any]]) -> str:
    sources = [
        stage["config"]["data"].get("source")
        for stage in history
        if isinstance(stage.get("config"), Mapping)
        and isinstance(stage["config"].get("data"), Mapping)
    ]
    size = info.sample
    shape = f"{size.frames} frames of {size.width}x{size.height}"
    if "digits" in sources:
        return f"Built-in moving digits, made by `diffusion-apt data digits`: {shape}."
    if isinstance(info, CodecInfo):
        return f"Trained on samples of {shape}, which are not published with the codec."
    return (
        f"Post-trained on captioned samples of {shape}, which are not published with the model. "
        "The page of the base model says what that was trained on."
    )


def _figures(training: Mapping[str, Any]) -> list[str]:
    figures = training.get("figures")
    if not isinstance(figures, Mapping) or not figures:
        return []
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    return ["## Figures", "\n".join(["| measure | value |", "| --- | --- |", *rows])]
