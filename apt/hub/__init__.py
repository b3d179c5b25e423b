"""Models on disk: a folder of `apt.json` and safetensors, read strictly, never from pickles.

    apt.json                   what the model is: see `ModelInfo`
    transformer.safetensors    the backbone
    text_encoder.safetensors   the text encoder, if its weights belong to this model
    codec.safetensors          the latent codec, likewise

A folder can also be a pipeline of diffusers (`PIPELINE_FILE`), with or without an apt.json. Folders
come from the Hub and go there; `apt.models.bundle` builds the model that one describes.
"""

from __future__ import annotations

from apt.hub.download import download
from apt.hub.folders import PIPELINE_FILE, Source, list_pretrained, locate
from apt.hub.info import (
    CODEC_FILE,
    FORMAT,
    INFO_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    CodecInfo,
    ComponentInfo,
    ModelInfo,
    SampleInfo,
    SamplingInfo,
    read_description,
    read_info,
    write_info,
)
from apt.hub.weights import check_safetensors, load_weights, save_weights

__all__ = [
    "CODEC_FILE",
    "FORMAT",
    "INFO_FILE",
    "PIPELINE_FILE",
    "TEXT_ENCODER_FILE",
    "TRANSFORMER_FILE",
    "CodecInfo",
    "ComponentInfo",
    "ModelInfo",
    "SampleInfo",
    "SamplingInfo",
    "Source",
    "check_safetensors",
    "download",
    "list_pretrained",
    "load_weights",
    "locate",
    "read_description",
    "read_info",
    "save_weights",
    "write_info",
]
