"""SD3's text against diffusers' pipeline: tiny, with random weights and no download."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from apt.condition import TextEncoder
from apt.errors import CheckpointError, InputError
from apt.models.architectures import TEXT_ENCODERS
from apt.models.create import create_text_encoder
from apt.models.text_sd3 import SD3TextConfig
from tests.models.tiny_sd3 import POOLED_DIM, PROMPTS, TEXT_DIM, tiny_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(root)
    return root


def load(folder, **options):
    return create_text_encoder("sd3", repo=str(folder), **{"dtype": "float32"} | options)


@pytest.mark.parametrize(("length", "prompts"), [(256, PROMPTS), (64, PROMPTS[:3])])
def test_equals_the_pipeline(pipeline, folder, length, prompts):
    """Also for a prompt that the CLIPs cut and T5 does not."""
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    encoder = load(folder, max_length=length)
    assert isinstance(encoder, TextEncoder)
    c = encoder(prompts)
    assert c.mask is None
    assert c.tokens.shape == (len(prompts), 77 + length, TEXT_DIM)
    assert c.pooled.shape == (len(prompts), POOLED_DIM)
    torch.testing.assert_close(c.tokens, tokens)
    torch.testing.assert_close(c.pooled, pooled)


def test_a_prompt_is_encoded_alone_as_among_others(folder):
    encoder = load(folder)
    together, alone = encoder(PROMPTS), encoder(PROMPTS[1:2])
    torch.testing.assert_close(together.tokens[1:2], alone.tokens)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled)


def test_what_t5_would_have_to_cut_raises_or_is_cut(pipeline, folder):
    with pytest.raises(InputError, match=r"prompt 3 has \d+ tokens, but at most 20 fit"):
        load(folder, max_length=20)(PROMPTS)
    with torch.no_grad():
        tokens, *_ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=20
        )
    torch.testing.assert_close(load(folder, max_length=20, truncate=True)(PROMPTS).tokens, tokens)


@pytest.mark.parametrize("prompts", ["a red seven", [], [3]])
def test_prompts_that_are_none(folder, prompts):
    with pytest.raises(InputError, match="sequence of at least one string"):
        load(folder)(prompts)


def test_frozen_and_in_its_dtype(folder):
    encoder = load(folder, dtype="bfloat16").train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    c, exact = encoder(PROMPTS), load(folder)(PROMPTS)
    assert c.tokens.dtype == c.pooled.dtype == torch.bfloat16
    error = (c.tokens.float() - exact.tokens).norm() / exact.tokens.norm()
    assert 0 < error < 0.05


def test_the_config_rebuilds_the_encoder(folder):
    encoder = load(folder, max_length=30, truncate=True)
    saved = json.loads(json.dumps(dataclasses.asdict(encoder.config)))
    again = create_text_encoder("sd3", **saved)
    assert again.config == encoder.config
    assert torch.equal(again(PROMPTS).tokens, encoder(PROMPTS).tokens)


def test_wrong_repositories(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "no_t5")
    shutil.rmtree(tmp_path / "no_t5" / "text_encoder_3")
    with pytest.raises(CheckpointError, match=r"text_encoder_3.*config\.json is missing"):
        load(tmp_path / "no_t5")
    shutil.copytree(folder, tmp_path / "swapped")
    shutil.rmtree(tmp_path / "swapped" / "text_encoder")
    shutil.copytree(folder / "text_encoder_3", tmp_path / "swapped" / "text_encoder")
    with pytest.raises(CheckpointError, match="holds a 't5' model, not 'clip'"):
        load(tmp_path / "swapped")


def test_t5_must_be_as_wide_as_both_clips(pipeline, folder, tmp_path):
    import transformers

    shutil.copytree(folder, tmp_path / "narrow")
    config = pipeline.text_encoder_3.config.to_dict() | {"d_model": 24}
    narrow = transformers.T5EncoderModel(transformers.T5Config(**config))
    narrow.save_pretrained(tmp_path / "narrow" / "text_encoder_3")
    with pytest.raises(CheckpointError, match="32 dimensions together, but T5 has only 24"):
        load(tmp_path / "narrow")


def test_registered_config():
    config = TEXT_ENCODERS.get("sd3")()
    assert config == SD3TextConfig()
    assert config.max_length == 256
