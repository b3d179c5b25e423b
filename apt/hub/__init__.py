"""Models on disk: a folder of `apt.json` and safetensors, read strictly, never from pickles.

    apt.json                   what the model is: see `ModelInfo`
    transformer.safetensors    the backbone
    text_encoder.safetensors   the text encoder, if its weights belong to this model

`apt.models.bundle` builds the model that a folder describes.
"""

from __future__ import annotations

from apt.hub.download import download
from apt.hub.folders import list_pretrained, resolve
from apt.hub.info import (
    FORMAT,
    INFO_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    ComponentInfo,
    ModelInfo,
    SampleInfo,
    SamplingInfo,
    Stage,
    read_info,
    write_info,
)
from apt.hub.weights import check_safetensors, load_weights, save_weights

__all__ = [
    "FORMAT",
    "INFO_FILE",
    "TEXT_ENCODER_FILE",
    "TRANSFORMER_FILE",
    "ComponentInfo",
    "ModelInfo",
    "SampleInfo",
    "SamplingInfo",
    "Stage",
    "check_safetensors",
    "download",
    "list_pretrained",
    "load_weights",
    "read_info",
    "resolve",
    "save_weights",
    "write_info",
]
