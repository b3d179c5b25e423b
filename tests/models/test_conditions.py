from __future__ import annotations

import dataclasses

import pytest
import torch

from apt.errors import InputError
from apt.models import TextCondition


def condition(rows: int, words: int, *, mask: bool = False, pooled: bool = True) -> TextCondition:
    generator = torch.Generator().manual_seed(rows * 10 + words)
    return TextCondition(
        torch.randn(rows, words, 3, generator=generator),
        (torch.arange(words) < 2).expand(rows, words) if mask else None,
        torch.randn(rows, 4, generator=generator) if pooled else None,
    )


def test_select_takes_rows_of_all_parts() -> None:
    c = condition(4, 3, mask=True)
    assert len(c) == 4 and c.mask is not None and c.pooled is not None
    for rows in (torch.tensor([2, 0, 2]), slice(1, 3)):
        chosen = c.select(rows)
        assert torch.equal(chosen.tokens, c.tokens[rows])
        assert chosen.mask is not None and torch.equal(chosen.mask, c.mask[rows])
        assert chosen.pooled is not None and torch.equal(chosen.pooled, c.pooled[rows])
    plain = condition(4, 3, pooled=False).select(slice(0, 1))
    assert len(plain) == 1 and plain.mask is None and plain.pooled is None


def test_to_casts_embeddings_and_not_the_mask() -> None:
    c = condition(2, 3, mask=True).to(dtype=torch.bfloat16)
    assert c.mask is not None and c.pooled is not None
    assert c.tokens.dtype == c.pooled.dtype == torch.bfloat16
    assert c.mask.dtype == torch.bool
    moved = condition(2, 3, mask=True).to("meta")
    assert moved.mask is not None and moved.pooled is not None
    assert moved.tokens.is_meta and moved.mask.is_meta and moved.pooled.is_meta


def test_detach_cuts_the_graph() -> None:
    tokens, pooled = torch.randn(1, 2, 3).requires_grad_(), torch.randn(1, 4).requires_grad_()
    c = TextCondition(tokens * 2, None, pooled * 2).detach()
    assert c.pooled is not None
    assert not c.tokens.requires_grad and not c.pooled.requires_grad
    assert torch.equal(c.tokens, tokens * 2)


def test_concatenate_pads_to_the_longest_and_says_so() -> None:
    short, long = condition(1, 2), condition(2, 4)
    joined = TextCondition.concatenate([short, long])
    assert joined.tokens.shape == (3, 4, 3)
    assert torch.equal(joined.tokens[0, :2], short.tokens[0])
    assert torch.equal(joined.tokens[1:], long.tokens)
    assert joined.mask is not None and joined.pooled is not None
    assert joined.mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert short.pooled is not None and torch.equal(joined.pooled[0], short.pooled[0])


def test_concatenate_keeps_masks() -> None:
    joined = TextCondition.concatenate([condition(1, 3, mask=True), condition(1, 3)])
    assert joined.mask is not None
    assert joined.mask.tolist() == [[True, True, False], [True, True, True]]
    # Without padding there is no mask, and attention keeps its faster path.
    assert TextCondition.concatenate([condition(1, 3), condition(2, 3)]).mask is None


def test_concatenate_with_and_without_pooled() -> None:
    with pytest.raises(InputError, match="pooled"):
        TextCondition.concatenate([condition(1, 2), condition(1, 2, pooled=False)])
    assert TextCondition.concatenate([condition(1, 2, pooled=False)]).pooled is None


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match=r"\(R, S, E\)"):
        TextCondition(torch.randn(2, 3))
    with pytest.raises(InputError, match=r"mask must be \(2, 3\)"):
        TextCondition(torch.randn(2, 3, 4), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(dataclasses.FrozenInstanceError):
        condition(1, 1).tokens = torch.zeros(1, 1, 3)  # type: ignore[misc]
