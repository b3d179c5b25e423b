"""Text encoders against transformers' own classes: tiny, with random weights and no download."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest
import torch

from apt.condition import TextEncoder
from apt.errors import CheckpointError, ConfigError, InputError
from apt.models.architectures import TEXT_ENCODERS
from apt.models.create import create_text_encoder
from apt.models.text_transformers import TransformersTextConfig, clean_prompt
from tests.models.tiny_tokenizers import clip_tokenizer, unigram_tokenizer

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red seven moving left", "a blue four", ""]
WIDTH = 16


def t5_model(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=80, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.5
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip_text_config(tokenizer):
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=40,
        projection_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per kind, in the layout of a diffusers repository."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    unigram, clip = unigram_tokenizer([*PROMPTS, "a green one moving up"]), clip_tokenizer()
    for name, tokenizer in (("t5", unigram), ("umt5", unigram), ("clip", clip), ("proj", clip)):
        tokenizer.save_pretrained(root / name / "tokenizer")
    t5_model("T5").save_pretrained(root / "t5" / "text_encoder")
    t5_model("UMT5").save_pretrained(root / "umt5" / "text_encoder")
    config = clip_text_config(clip)
    transformers.CLIPTextModel(config).save_pretrained(root / "clip" / "text_encoder")
    projected = transformers.CLIPTextModelWithProjection(config)
    projected.save_pretrained(root / "proj" / "text_encoder")
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=config.to_dict(), vision_config=vision.to_dict(), projection_dim=12
        )
    )
    whole.save_pretrained(root / "whole")
    clip.save_pretrained(root / "whole")
    return root


def load(folders, name, **options):
    defaults = {
        "dtype": "float32",
        "max_length": 40,
        "subfolder": "text_encoder",
        "tokenizer_subfolder": "tokenizer",
    } | options
    architecture = "clip" if name in ("clip", "proj", "whole") else name
    return create_text_encoder(architecture, repo=str(folders / name), **defaults)


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_t5_equals_the_peer_one_prompt_at_a_time(folders, name):
    encoder = load(folders, name)
    kind = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}[name]
    peer = getattr(transformers, kind).from_pretrained(folders / name / "text_encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / name / "tokenizer")
    c = encoder(PROMPTS)
    assert c.tokens.shape[2] == encoder.embedding_dim == WIDTH
    assert c.mask.shape == c.tokens.shape[:2] and c.pooled is None
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            expected = peer(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        length = expected.shape[0]
        assert c.mask[row].sum() == length
        torch.testing.assert_close(c.tokens[row, :length], expected)
        assert not c.tokens[row, length:].any()
    assert c.mask[2].sum() == 1  # an empty prompt is its end token


@pytest.mark.parametrize(
    ("name", "options"),
    [("clip", {}), ("clip", {"skip_layers": 1}), ("proj", {"projection": True})],
)
def test_clip_equals_the_peer(folders, name, options):
    encoder = load(folders, name, **options)
    kind = "CLIPTextModelWithProjection" if name == "proj" else "CLIPTextModel"
    peer = getattr(transformers, kind).from_pretrained(folders / name / "text_encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / name / "tokenizer")
    c = encoder(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            out = peer(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True)
        tokens = out.hidden_states[-2] if options.get("skip_layers") else out.last_hidden_state
        torch.testing.assert_close(c.tokens[row, : tokens.shape[1]], tokens[0])
        pooled = out.text_embeds if name == "proj" else out.pooler_output
        torch.testing.assert_close(c.pooled[row], pooled[0])
    assert c.pooled.shape == (3, 12 if name == "proj" else WIDTH)


@pytest.mark.parametrize("projection", [False, True])
def test_the_text_part_of_a_whole_clip(folders, projection):
    encoder = load(folders, "whole", subfolder="", tokenizer_subfolder="", projection=projection)
    peer = transformers.CLIPModel.from_pretrained(folders / "whole").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "whole")
    with torch.no_grad():
        out = peer.text_model(**tokenizer("a red seven", return_tensors="pt"))
        pooled = peer.text_projection(out.pooler_output) if projection else out.pooler_output
    c = encoder(["a red seven"])
    torch.testing.assert_close(c.tokens, out.last_hidden_state)
    torch.testing.assert_close(c.pooled, pooled)


def test_a_projection_that_is_not_there_is_an_error(folders):
    with pytest.raises(
        CheckpointError, match=r"do not fit CLIPTextModelWithProjection: .* missing"
    ):
        load(folders, "clip", projection=True)


def test_prompts_of_one_length_need_no_mask(folders):
    assert load(folders, "t5")(["a red seven", "a red seven"]).mask is None


def test_frozen_and_without_dropout(folders):
    encoder = load(folders, "t5")
    assert isinstance(encoder, TextEncoder)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    first, second = encoder(PROMPTS), encoder(PROMPTS)
    assert torch.equal(first.tokens, second.tokens) and not first.tokens.requires_grad


def test_dtype(folders):
    encoder = load(folders, "t5", dtype="bfloat16")
    assert encoder(PROMPTS).tokens.dtype == torch.bfloat16
    # T5 keeps some weights in fp32 by itself; the bulk must be bf16
    assert encoder.model.shared.weight.dtype == torch.bfloat16


def test_the_config_rebuilds_the_encoder(folders):
    encoder = load(folders, "clip", skip_layers=1)
    saved = json.loads(json.dumps(dataclasses.asdict(encoder.config)))
    again = create_text_encoder("clip", **saved)
    assert again.config == encoder.config
    assert torch.equal(again(PROMPTS).tokens, encoder(PROMPTS).tokens)


def test_a_long_prompt_raises_or_is_cut(folders):
    prompt = "a red seven moving left and then up again"
    encoder = load(folders, "t5", max_length=6)
    with pytest.raises(InputError, match=r"prompt 1 has \d+ tokens, but at most 6 fit"):
        encoder(["", prompt])
    cut = load(folders, "t5", max_length=6, truncate=True)(["", prompt])
    assert cut.tokens.shape[:2] == (2, 6)


@pytest.mark.parametrize("prompts", [[], "a red seven", [None], [3]])
def test_bad_prompts(folders, prompts):
    with pytest.raises(InputError, match="sequence of at least one string"):
        load(folders, "t5")(prompts)


def test_wan_s_prompts_are_cleaned_as_diffusers_does(folders):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    messy = "  a red\n\tseven &amp;amp;  four "
    assert clean_prompt(messy) == prompt_clean(messy) == "a red seven & four"
    assert TEXT_ENCODERS.get("umt5")().clean and not TEXT_ENCODERS.get("t5")().clean
    encoder = load(folders, "umt5", clean=True)
    tidy = encoder([clean_prompt(messy)]).tokens
    assert torch.equal(encoder([messy]).tokens, tidy)
    as_it_is = load(folders, "umt5", clean=False)([messy]).tokens
    assert as_it_is.shape != tidy.shape


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [  # as ftfy 6.3.1 has them, with which Wan's authors clean
        ("a cat\u2019s \u201ctoy\u201d", 'a cat\'s "toy"'),
        ("\u201eone\u201f \u02bctwo\u02bc", "\"one\" 'two'"),
        ("\u8272\u8c03\uff0c\u8fc7\u66dd\uff08\uff11\uff09", "\u8272\u8c03,\u8fc7\u66dd(1)"),
        ("it&rsquo;s", "it's"),
        ("\ufeffcafe\u0301\u3000noir\u2026", "caf\u00e9 noir\u2026"),
        ("\u00abtwo\u00bb \u00d7 \u00bd", "\u00abtwo\u00bb \u00d7 \u00bd"),
    ],
)
def test_typography_is_what_wan_was_trained_on(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


def test_options_that_do_not_fit(folders):
    with pytest.raises(InputError, match="are for 'clip' only"):
        load(folders, "t5", skip_layers=1)
    with pytest.raises(InputError, match="skip_layers must be in 0 to 2"):
        load(folders, "clip", skip_layers=3)
    with pytest.raises(InputError, match="max_length must be in 1 to 40"):
        load(folders, "clip", max_length=77)
    with pytest.raises(ConfigError, match="dtype"):
        load(folders, "clip", dtype="float8")


def test_another_architecture_is_refused(folders):
    with pytest.raises(CheckpointError, match="holds a 't5' model, not 'umt5'"):
        create_text_encoder("umt5", repo=str(folders / "t5"))


def copy_of(folders, tmp_path):
    shutil.copytree(folders / "t5", tmp_path / "t5")
    return tmp_path / "t5" / "text_encoder"


def test_damaged_folders(folders, tmp_path):
    part = copy_of(folders, tmp_path)
    weights = part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        load(tmp_path, "t5")
    weights.rename(part / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        load(tmp_path, "t5")
    (part / "config.json").write_text("{")
    (part / "pytorch_model.bin").rename(weights)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(tmp_path, "t5")
    (part / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path, "t5")


def test_a_tokenizer_in_the_files_of_stable_diffusion(folders, tmp_path):
    """vocab.json and merges.txt, without tokenizer.json."""
    expected = load(folders, "clip")(PROMPTS)
    shutil.copytree(folders / "clip", tmp_path / "clip")
    part = tmp_path / "clip" / "tokenizer"
    model = json.loads((part / "tokenizer.json").read_text())["model"]
    (part / "tokenizer.json").unlink()
    (part / "vocab.json").write_text(json.dumps(model["vocab"]))
    (part / "merges.txt").write_text("#version: 0.2\n")
    (part / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<|endoftext|>"}))
    assert torch.equal(load(tmp_path, "clip")(PROMPTS).tokens, expected.tokens)


def test_missing_tokenizer(folders, tmp_path):
    copy_of(folders, tmp_path)
    # What is left makes a tokenizer for transformers, to which all words are unknown.
    (tmp_path / "t5" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json"):
        load(tmp_path, "t5")
    shutil.rmtree(tmp_path / "t5" / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(tmp_path, "t5")


def test_weights_that_do_not_fit_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    part = copy_of(folders, tmp_path)
    state = load_file(part / "model.safetensors")
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    lacking = {key: value for key, value in state.items() if key != name}
    save_file(lacking, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 missing \({name}\)"):
        load(tmp_path, "t5")
    extra = state | {"another.weight": torch.zeros(1)}
    save_file(extra, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(another\.weight\)"):
        load(tmp_path, "t5")
    reshaped = state | {name: torch.zeros(3, 3)}
    save_file(reshaped, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 of another shape \({name}\)"):
        load(tmp_path, "t5")


def test_without_transformers_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'diffusion-apt\[hub\]'"):
        load(folders, "t5")


@pytest.mark.parametrize("name", ["t5", "umt5", "clip"])
def test_registered_configs(name):
    config = TEXT_ENCODERS.get(name)()
    assert isinstance(config, TransformersTextConfig)
    assert config.architecture == name
    assert TEXT_ENCODERS.summary(name)
