from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt.condition import TextEncoder
from apt.errors import InputError
from apt.models import create_text_encoder
from apt.models.text_bytes import ByteTextEncoder, _bucket, _parts


def encoder(**options: object) -> ByteTextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = create_text_encoder(
            "bytes", **{"width": 16, "depth": 2, "num_heads": 2, "num_buckets": 512, **options}
        )
    assert isinstance(made, ByteTextEncoder) and isinstance(made, TextEncoder)
    return made


def encode(text: str, model: ByteTextEncoder | None = None) -> Tensor:
    """Tokens (S, E) of one prompt."""
    return (model or encoder())([text]).tokens[0]


def test_one_token_per_word_and_one_that_leads() -> None:
    c = encoder()(["a red seven", "b", ""])
    assert c.tokens.shape == (3, 4, 16)
    assert c.mask is not None and c.pooled is not None
    assert c.mask.tolist() == [[True] * 4, [True, True, False, False], [True, False, False, False]]
    assert c.pooled.shape == (3, 16)
    torch.testing.assert_close(c.pooled[0], c.tokens[0].sum(dim=0) / 4**0.5)
    torch.testing.assert_close(c.pooled[1], c.tokens[1, :2].sum(dim=0) / 2**0.5)


def test_no_mask_where_nothing_is_padded() -> None:
    assert encoder()(["a red seven", "the blue one"]).mask is None
    assert encoder()(["", ""]).mask is None


def test_prompts_do_not_see_each_other() -> None:
    """Neither other prompts nor longer words beside a word change it."""
    model = encoder()
    prompts = ["a red seven", "extraordinarily long words in this one", ""]
    together = model(prompts)
    for i, prompt in enumerate(prompts):
        alone = model([prompt])
        length = alone.tokens.shape[1]
        torch.testing.assert_close(together.tokens[i, :length], alone.tokens[0])
        assert together.pooled is not None and alone.pooled is not None
        torch.testing.assert_close(together.pooled[i], alone.pooled[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("red seven", "blue seven"),
        ("red seven", "seven red"),
        ("on", "no"),
        ("ab", "abb"),
        ("Red", "red"),
        ("é", "e"),
        ("a b", "ab"),
    ],
)
def test_different_prompts_differ(one: str, other: str) -> None:
    first, second = encode(one), encode(other)
    assert first.shape != second.shape or not torch.allclose(first, second, atol=1e-3)


def test_spaces_do_not_matter() -> None:
    assert torch.equal(encode("a red\tseven"), encode("  a  red \n seven "))


def test_a_word_is_the_same_wherever_it_stands() -> None:
    model = encoder()
    words = [word.encode() for word in ("seven", "red", "seven")]
    vectors = model._encode_words(words)
    assert torch.equal(vectors[0], vectors[2])
    assert not torch.allclose(vectors[0], vectors[1])


def test_empty_prompts_have_one_token() -> None:
    assert encode("").shape == encode("   ").shape == (1, 16)


def test_every_weight_trains() -> None:
    model = encoder(max_length=3, max_word_bytes=5)
    c = model(["a red seven", "b"])
    assert c.mask is not None
    weight = torch.randn(c.tokens.shape, generator=torch.Generator().manual_seed(0))
    (c.tokens * weight)[c.mask].square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    grad = model.embedding.weight.grad
    assert grad is not None
    read = 4 + 1 + 3 + 5 + 1  # words, and the trigrams of <a>, <red>, <seven>, <b>
    # One-letter words are their own trigram.
    assert len(grad.abs().sum(1).nonzero()) == read - 2


def test_one_word_stands_out_in_the_pooled_vector() -> None:
    """A caption's one word must reach the modulation: a plain mean hides it at this width."""
    model = encoder(width=128)
    pooled = model(["a red seven moving left", "a red three moving left", "the blue end"]).pooled
    assert pooled is not None
    near, far = (pooled[0] - pooled[1]).norm(), (pooled[0] - pooled[2]).norm()
    assert 0.3 * far < near < far
    assert near > 0.4 * pooled[0].norm()


def test_words_are_found_by_their_spelling_in_every_process() -> None:
    """Python's own hash is salted: a model saved by one process would be noise in the next."""
    assert [_bucket(part, 4096) for part in _parts(b"seven")] == [
        2563,
        2564,
        1264,
        2942,
        3661,
        2907,
    ]


def test_relatives_share_parts() -> None:
    """A word that training never showed is still near words with a similar spelling."""
    model = encoder(width=4096, depth=0)  # so wide that chance likeness is small
    seven, sevens, blue = model._encode_words([b"seven", b"sevens", b"blue"])
    assert torch.cosine_similarity(seven, sevens, dim=0) > 0.1
    assert abs(torch.cosine_similarity(seven, blue, dim=0)) < 0.05


@pytest.mark.parametrize("text", ["ein schönes Blau", "赤い七", "семь", "🙂"])
def test_the_alphabet(text: str) -> None:
    assert encode(text).isfinite().all()
    with pytest.raises(InputError, match=r"U\+[0-9A-F]{4}.*ASCII"):
        encoder(alphabet="ascii")(["fine", text])
    encoder(alphabet="ascii")(["plain ASCII, with ~!?"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\x00b", r"U\+0000"),
        ("a \x1b[31m red", r"U\+001B"),
        ("\ud800", r"U\+D800"),
        ("one two three four", "4 words, but at most 3"),
        ("aaaaaaaaa", "9 bytes, but at most 8"),
        ("ééééé", "10 bytes, but at most 8"),
    ],
)
def test_prompts_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoder(max_length=3, max_word_bytes=8)([text])


def test_limits_are_inclusive() -> None:
    model = encoder(max_length=3, max_word_bytes=8)
    assert encode("aaaaaaaa b c", model).shape == (4, 16)
    assert model.max_length == 3 and model.embedding_dim == 16


def test_empty_prompts_give_every_weight_a_gradient() -> None:
    """Sharded ranks must agree on the gradients, also where captions were dropped."""
    encoder = create_text_encoder("bytes")
    assert isinstance(encoder, torch.nn.Module)
    encoder(["", ""]).tokens.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
