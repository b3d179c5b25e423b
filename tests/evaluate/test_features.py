"""The built-in networks, on tiny random weights of the classes that they load."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import Tensor

from apt.errors import CheckpointError
from apt.evaluate.clip_score import clip_similarity
from apt.evaluate.features import CLIP_MEAN, CLIP_STD, FDR_FEATURES, FEATURES
from apt.evaluate.inception import WEIGHTS_SHA256, WEIGHTS_URL, load_inception
from tests.models.tiny_tokenizers import clip_tokenizer

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 60,
}


def clip_model() -> Any:
    ends = {"bos_token_id": 53, "eos_token_id": 54}
    config = transformers.CLIPConfig(
        text_config=TEXT | ends, vision_config=VISION, projection_dim=12
    )
    return transformers.CLIPModel(config)


def siglip_model() -> Any:
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    )


def mae_model() -> Any:
    decoder = {
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 8,
    }
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**VISION, **decoder))


def convnext_model() -> Any:
    return transformers.ConvNextV2ForImageClassification(
        transformers.ConvNextV2Config(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1])
    )


def dino_model() -> Any:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(**{**VISION, "image_size": 56, "mlp_ratio": 1})
    )


MODELS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "clip": (clip_model, {}),
    "siglip2": (siglip_model, {}),
    "mae": (mae_model, {}),
    "convnextv2": (convnext_model, {"size": 32}),
    "dinov2": (dino_model, {"size": 32}),
}


@pytest.fixture
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_for_each_picture(name: str, pictures: Tensor, tmp_path: Path) -> None:
    build, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build().save_pretrained(tmp_path)
    features = FEATURES.create(name, weights=str(tmp_path), **options)
    assert features.size == 32
    rows = features(pictures)
    assert rows.shape == (3, 16) and rows.dtype == torch.float32 and not rows.requires_grad
    # MAE shuffles its patches, which only rounding may tell.
    torch.testing.assert_close(features(pictures[1:2].float()), rows[1:2], rtol=1e-4, atol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 1e-4


def test_six_representations_are_registered() -> None:
    assert len(FDR_FEATURES) == 6
    assert set(FDR_FEATURES) <= set(FEATURES.names())


def test_weights_of_another_network(tmp_path: Path) -> None:
    clip_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        FEATURES.create("dinov2", weights=str(tmp_path))


def test_clip_score_is_the_cosine_of_clips_embeddings(pictures: Tensor, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clip_model().eval()
    model.save_pretrained(tmp_path)
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    prompts = ["a dog", "cat", "x " * 200]
    similarity = clip_similarity(str(tmp_path))
    assert similarity.size == 32
    scaled = pictures.float() / 255
    pixels = (scaled - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").input_ids
        assert ids.shape[1] <= 77
        with torch.no_grad():
            output = model(
                input_ids=ids, pixel_values=pixels[number : number + 1].permute(0, 3, 1, 2)
            )
        expected = torch.cosine_similarity(output.image_embeds, output.text_embeds)
        found = similarity(pictures, prompts)[number : number + 1]
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)


class TestInceptionsWeights:
    def test_without_network_the_place_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

        def no_network(*_: Any, **__: Any) -> None:
            raise OSError("no network")

        monkeypatch.setattr(socket, "create_connection", no_network)
        monkeypatch.setattr(socket, "getaddrinfo", no_network)
        with pytest.raises(CheckpointError) as told:
            load_inception()
        message = str(told.value)
        place = tmp_path / "hub" / "checkpoints" / Path(WEIGHTS_URL).name
        assert WEIGHTS_URL in message and str(place) in message and "no network" in message
        assert list(place.parent.iterdir()) == []

    def test_other_content_is_refused_before_it_is_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(CheckpointError, match=r"not Inception's weights \(SHA-256 differs\)"):
            load_inception(path)
        with pytest.raises(CheckpointError, match="cannot read Inception's weights"):
            load_inception(tmp_path / "none.pth")
        assert len(WEIGHTS_SHA256) == 64 and WEIGHTS_SHA256[:8] in WEIGHTS_URL
