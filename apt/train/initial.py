"""The model that a run starts from: a new one, or the one that its stage names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from apt.checkpoints.info import ComponentInfo, ModelInfo, SamplingInfo
from apt.checkpoints.load import (
    ModelBundle,
    component_info,
    describe,
    describe_model,
    load_bundle,
    load_codec,
    load_model,
    load_text_encoder,
)
from apt.condition import TextEncoder
from apt.distributed.parallel import FromMain, made_here
from apt.errors import ConfigError
from apt.methods.base import MethodConfig
from apt.models.create import create_codec, create_model, create_text_encoder
from apt.pixels import LatentCodec
from apt.train.cache_parts import cached_codec, cached_text_encoder
from apt.train.config import TrainConfig
from apt.train.objects import NO_OBJECTS, Objects


def initial_bundle(
    config: TrainConfig, objects: Objects = NO_OBJECTS, from_main: FromMain = made_here
) -> ModelBundle:
    """Return the generator that a run starts from.

    Pre-training starts from random weights, drawn with `config.seed`. Later stages start from a
    model and keep its text encoder and codec; its backbone is on the meta device, with the `origin`
    of its weights.

    Args:
        config: a resolved configuration.
        objects: objects to use instead of the parts that the configuration names.
        from_main: `Parallel.from_main`, with several ranks.

    Raises:
        ConfigError: the parts do not fit each other, or there is no model to start from.
    """
    field = config.stage.start_field
    if field is None:
        return _new_bundle(config, objects)
    bundle = _started_bundle(config, objects, field, from_main)
    if config.lora.base:
        base = load_model(config.lora.base, device="meta")
        if base.config != bundle.backbone.config:
            raise ConfigError(
                f"lora.base {config.lora.base!r} has another architecture than "
                f"{config.stage.source(field)!r}; name the model that its adapters were trained on"
            )
        bundle = dataclasses.replace(bundle, backbone=base)
    return bundle


def _started_bundle(
    config: TrainConfig, objects: Objects, field: str, from_main: FromMain
) -> ModelBundle:
    cache = config.data.make_source().latent_cache()
    if field in objects.bundles:
        bundle = objects.bundles[field]
        if cache is not None:
            cached_codec(cache, bundle.info.codec)  # raises if another codec made the cache
        return bundle
    source = config.stage.source(field)
    if cache is not None:
        return _bundle_on_cache(source, cache, from_main)
    return load_bundle(source, device="meta")


def _bundle_on_cache(source: str, cache: Path, from_main: FromMain) -> ModelBundle:
    """Return the model without the parts that made the cache's latents and embeddings."""
    backbone, info = load_model(source, device="meta"), describe_model(source)
    codec: LatentCodec = cached_codec(cache, info.codec)
    if info.codec.weights is not None:
        codec = load_codec(source)  # it is small, and the finished model includes it
    if info.text_encoder.weights is None:
        texts = cached_text_encoder(cache, info.text_encoder, from_main)
        return ModelBundle(backbone, texts, codec, info)
    return ModelBundle(backbone, load_text_encoder(source), codec, info)


def _new_bundle(config: TrainConfig, objects: Objects) -> ModelBundle:
    model, stage = config.model, config.stage
    assert isinstance(stage, MethodConfig), "only generators start from random weights"
    torch.manual_seed(config.seed)
    text_encoder, text_info = _text_encoder(config, objects)
    codec, codec_info = _codec(config, objects)
    options: dict[str, Any] = model.options
    backbone = objects.model
    if backbone is None:
        backbone = create_model(model.name, **options)
    if backbone.in_channels != codec.channels:
        raise ConfigError(
            f"model {model.name!r} takes {backbone.in_channels} channels, but codec "
            f"{codec_info.architecture!r} has {codec.channels}; set --model.options in_channels "
            f"{codec.channels}"
        )
    if backbone.config.text_dim != text_encoder.embedding_dim:
        raise ConfigError(
            f"model {model.name!r} takes text of {backbone.config.text_dim} dimensions, but text "
            f"encoder {model.text_encoder!r} has {text_encoder.embedding_dim}; set --model.options "
            f"text_dim {text_encoder.embedding_dim}"
        )
    info = ModelInfo(
        stage=stage.exports_as,
        model=component_info(model.name, backbone),
        text_encoder=text_info,
        codec=codec_info,
        sample=config.data.clip,
        sampling=stage.sampling(SamplingInfo(negative_prompt=config.negative_prompt or "")),
    )
    return ModelBundle(backbone, text_encoder, codec, info)


def initial_codec(config: TrainConfig, objects: Objects) -> tuple[str, LatentCodec]:
    """Return the name of a codec and the codec: the given one, or one with random weights."""
    if objects.codec is not None:
        return config.model.codec, objects.codec
    torch.manual_seed(config.seed)
    model = config.model
    return model.codec, create_codec(model.codec, **model.codec_options)


def _text_encoder(config: TrainConfig, objects: Objects) -> tuple[TextEncoder, ComponentInfo]:
    given, model = objects.text_encoder, config.model
    if given is not None:
        return given, objects.info("text_encoder", given)
    text_encoder = create_text_encoder(model.text_encoder, **model.text_encoder_options)
    return text_encoder, component_info(model.text_encoder, text_encoder)


def _codec(config: TrainConfig, objects: Objects) -> tuple[LatentCodec, ComponentInfo]:
    """Return the codec of a new model: a trained one, or one without weights."""
    model, source = config.model, config.stage.trained_codec()
    if objects.codec is not None:
        codec = objects.codec.requires_grad_(False).eval()
        info = objects.info("codec", codec)
    elif source:
        codec, found = load_codec(source), describe(source).codec
        info = component_info(found.architecture, codec, found.weights)
    else:
        codec = create_codec(model.codec, **model.codec_options)
        info = component_info(model.codec, codec)
        if any(parameter.requires_grad for parameter in codec.parameters()):
            raise ConfigError(
                f"codec {model.codec!r} is not trained yet: train it (`diffusion-apt train "
                "digits_codec`), and name the exported folder with --stage.codec"
            )
    cache = config.data.make_source().latent_cache()
    if cache is None:
        return codec, info
    cached = cached_codec(cache, info)
    return (cached if info.weights is None else codec), info
