from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.condition import Condition, EncodedText
from apt.errors import InputError


def text(rows: int, words: int, *, mask: bool = False, pooled: bool = True) -> EncodedText:
    generator = torch.Generator().manual_seed(rows * 10 + words)
    return EncodedText(
        torch.randn(rows, words, 3, generator=generator),
        (torch.arange(words) < 2).expand(rows, words) if mask else None,
        torch.randn(rows, 4, generator=generator) if pooled else None,
    )


def condition(rows: int, words: int = 3) -> Condition:
    """Masked text, with values of two kinds beside it."""
    extra = {"frames": torch.randn(rows, 2, 1, 4, 4), "kind": torch.arange(rows)}
    return Condition(text(rows, words, mask=True), extra)


def same(ours: EncodedText, theirs: EncodedText) -> bool:
    pairs = [(getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours)]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_select_takes_rows_of_everything() -> None:
    c = condition(4)
    for rows in (torch.tensor([2, 0, 2]), slice(1, 3)):
        chosen = c.select(rows)
        assert c.text.mask is not None and c.text.pooled is not None
        expected = EncodedText(c.text.tokens[rows], c.text.mask[rows], c.text.pooled[rows])
        assert same(chosen.text, expected)
        assert all(torch.equal(chosen.extra[name], c.extra[name][rows]) for name in c.extra)
    plain = text(4, 3, pooled=False).select(slice(0, 1))
    assert len(plain) == 1 and plain.mask is None and plain.pooled is None


def test_to_casts_floating_point_alone() -> None:
    c = condition(2).to(dtype=torch.bfloat16)
    assert c.text.mask is not None and c.text.pooled is not None
    assert c.dtype == c.text.pooled.dtype == c.extra["frames"].dtype == torch.bfloat16
    assert c.text.mask.dtype == torch.bool and c.extra["kind"].dtype == torch.int64
    moved = condition(2).to("meta")
    assert moved.text.mask is not None and moved.text.pooled is not None
    assert moved.text.tokens.is_meta and moved.text.mask.is_meta and moved.text.pooled.is_meta
    assert moved.extra["frames"].is_meta and moved.extra["kind"].is_meta


def test_expand_shares_memory() -> None:
    one = condition(1)
    many = one.expand(5)
    assert len(many) == 5 and same(many.text, one.select(torch.zeros(5, dtype=torch.long)).text)
    assert many.text.tokens.data_ptr() == one.text.tokens.data_ptr()
    assert many.extra["frames"].shape == (5, 2, 1, 4, 4)
    assert many.extra["frames"].data_ptr() == one.extra["frames"].data_ptr()


def test_other_text_leaves_the_rest() -> None:
    c, other = condition(3), text(3, 5)
    assert c.with_text(other).text is other and c.with_text(other).extra is c.extra
    for_all = c.with_text(text(1, 5))
    assert len(for_all) == 3 and same(for_all.text, text(1, 5).expand(3))
    assert for_all.extra is c.extra


def test_concatenate_pads_to_the_longest_and_says_so() -> None:
    short, long = text(1, 2), text(2, 4)
    joined = EncodedText.concatenate([short, long])
    assert joined.tokens.shape == (3, 4, 3)
    assert torch.equal(joined.tokens[0, :2], short.tokens[0])
    assert torch.equal(joined.tokens[1:], long.tokens)
    assert joined.mask is not None and joined.pooled is not None
    assert joined.mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert short.pooled is not None and torch.equal(joined.pooled[0], short.pooled[0])


def test_concatenate_keeps_masks() -> None:
    joined = EncodedText.concatenate([text(1, 3, mask=True), text(1, 3)])
    assert joined.mask is not None
    assert joined.mask.tolist() == [[True, True, False], [True, True, True]]
    # Without padding there is no mask, and attention keeps its faster path.
    assert EncodedText.concatenate([text(1, 3), text(2, 3)]).mask is None


def test_concatenate_with_and_without_pooled() -> None:
    with pytest.raises(InputError, match="pooled"):
        EncodedText.concatenate([text(1, 2), text(1, 2, pooled=False)])
    assert EncodedText.concatenate([text(1, 2, pooled=False)]).pooled is None


def test_concatenate_joins_everything_that_is_given() -> None:
    left, right = condition(2, 3), condition(1, 5)
    joined = Condition.concatenate([left, right])
    assert same(joined.text, EncodedText.concatenate([left.text, right.text]))
    assert joined.extra["kind"].tolist() == [0, 1, 0]
    assert torch.equal(joined.extra["frames"][2:], right.extra["frames"])
    with pytest.raises(InputError, match="different inputs: frames, kind and only text"):
        Condition.concatenate([left, Condition(text(1, 3))])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_split_undoes_concatenate(lengths: list[int], pooled: bool) -> None:
    rows = [text(1, length, pooled=pooled) for length in lengths]
    again = EncodedText.concatenate(rows).split()
    assert len(again) == len(rows)
    assert all(same(ours, theirs) for ours, theirs in zip(again, rows, strict=True))


def test_split_keeps_a_mask_inside_a_prompt() -> None:
    hole = EncodedText(torch.randn(1, 4, 3), torch.tensor([[True, False, True, False]]))
    (row,) = hole.split()
    assert row.mask is not None and row.mask.tolist() == [[True, False, True]]
    assert torch.equal(row.tokens, hole.tokens[:, :3])


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match=r"\(R, S, E\)"):
        EncodedText(torch.randn(2, 3))
    with pytest.raises(InputError, match=r"mask must be \(2, 3\)"):
        EncodedText(torch.randn(2, 3, 4), torch.ones(3, 2, dtype=torch.bool))
    for shape in ((3, 4), ()):
        with pytest.raises(InputError, match=r"condition 'camera' must have 2 rows"):
            Condition(text(2, 3), {"camera": torch.zeros(shape)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        condition(1).text = text(1, 1)  # type: ignore[misc]
