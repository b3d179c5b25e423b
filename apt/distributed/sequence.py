"""Sequence parallelism: several ranks share the tokens of the same samples (DeepSpeed-Ulysses).

Each rank of a `SequenceGroup` has the same samples, noise, timesteps and text, and computes all
that is done token by token for its own tokens alone. Where tokens meet, they are exchanged by
`torch.distributed`'s all-to-all: before attention a rank gives away the heads that are not its own
and gets all tokens of those that are; after it, the other way round. So attention runs on whole
sequences, by any backend, with a share of the heads.

Where the N ranks do not divide the H heads, u = gcd(N, H) ranks share the heads, and r = N / u of
such rows share the queries: a rank attends from one row's queries, with H / u heads, to all keys.
Keys and values then go to r ranks instead of one, which is what a ring passes on too, in as many
bytes; but they are there at once, so that attention stays one call of any backend. A rank holds
2 L H / u Dh of them: for the 12 heads of Wan 1.3B on 8 ranks those of 3 heads.

Shares differ by a token at most where N does not divide the tokens. Nothing is padded or masked.

Gradients. What all ranks of the group compute alike (latents, text, logits, losses) has the true
gradient on each. What is a rank's own (its tokens) has N times its part of the loss's gradient, so
that of a parameter, whichever way it was used, the *mean* over the ranks is the true one. It is
what FSDP takes, over data and sequence alike: nothing has to know which parameters saw which
tokens.

Shapes: B samples, L tokens, of which l are this rank's, H heads, Dh channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["SequenceGroup", "TokenSplit", "gather_heads", "scatter_keys", "scatter_queries"]


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of the same samples, at least two.

    Attributes:
        group: the process group.
        rank: this process's place in it, 0 .. size - 1.
        size: N.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> SequenceGroup | None:
        """This process's place in a process group; None in a group of one."""
        size = dist.get_world_size(group)
        return None if size == 1 else cls(group, dist.get_rank(group), size)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        """Itself: copies of a network work in the same group."""
        return self

    def split(self, length: int) -> TokenSplit:
        """So many tokens in shares that differ by one at most; some are empty if there are few."""
        least, more = divmod(length, self.size)
        return TokenSplit(self, tuple(least + (rank < more) for rank in range(self.size)))

    def rows(self, num_heads: int) -> int:
        """r, of how many rows of ranks each has all heads: 1 if the ranks divide them."""
        return self.size // math.gcd(self.size, num_heads)

    def exchange(self, sent: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """All-to-all of numbers, with the gradient: `given[i]` of them to rank i, in order.

        `taken[i]` are those that come from rank i, in order.
        """
        received = functional.all_to_all_single_autograd(sent, list(taken), list(given), self.group)
        return functional.wait_tensor(received)

    def gather(self, values: Tensor) -> Tensor:
        """Values (...) of the same shape on all ranks as (N, ...), with the gradient."""
        sizes = [values.numel()] * self.size
        received = self.exchange(values.flatten().repeat(self.size), sizes, sizes)
        return received.view(self.size, *values.shape)

    def alike(self, values: Tensor) -> Tensor:
        """Values that are the same on all ranks, as they are; their gradient is the mean."""
        if not (torch.is_grad_enabled() and values.requires_grad):
            return values
        return _Alike.apply(values, self)  # type: ignore[no-any-return]


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = functional.all_reduce(grads[0].contiguous(), "sum", ctx.group.group)
        return functional.wait_tensor(total) / ctx.group.size, None


@dataclass(frozen=True)
class TokenSplit:
    """How many tokens each rank of a group has; rank after rank they are the whole sequence.

    Attributes:
        group: the ranks.
        lengths: of each its tokens.
    """

    group: SequenceGroup
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """l, of this rank."""
        return self.lengths[self.group.rank]

    @property
    def total(self) -> int:
        """L, of all."""
        return sum(self.lengths)

    def beside(self, other: TokenSplit) -> TokenSplit:
        """Two streams of tokens on each rank, one after the other."""
        pairs = zip(self.lengths, other.lengths, strict=True)
        return TokenSplit(self.group, tuple(a + b for a, b in pairs))

    def order(self, whole: Tensor, other: TokenSplit) -> Tensor:
        """Values (B, L + L') of two whole streams in the order of `beside`."""
        first, second = whole.split([self.total, other.total], dim=1)
        pieces = zip(first.split(self.lengths, 1), second.split(other.lengths, 1), strict=True)
        return torch.cat([piece for pair in pieces for piece in pair], dim=1)

    def own(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that has all tokens along `dim`, with its own memory."""
        start = sum(self.lengths[: self.group.rank])
        return whole.narrow(dim, start, self.length).contiguous()

    def whole(self, own: Tensor) -> Tensor:
        """(B, L, ...) from each rank's (B, l, ...), with the gradient."""
        size = _numbers_per_token(own)
        given = [own.numel()] * self.group.size
        taken = [size * length for length in self.lengths]
        received = self.group.exchange(own.flatten().repeat(self.group.size), given, taken)
        return _put_together(received, self.lengths, own)


def scatter_queries(q: Tensor, split: TokenSplit) -> Tensor:
    """Queries (B, l, H, Dh) to those of this rank's row with this rank's heads, (B, -, H / u, Dh).

    Their tokens are those of the row's ranks, one after the other; all L where ranks divide heads.
    """
    return _scatter(q, split, _row(split, q.shape[2]))


def scatter_keys(k: Tensor, split: TokenSplit) -> Tensor:
    """Keys or values (B, l, H, Dh) to all tokens with this rank's heads, (B, L, H / u, Dh)."""
    return _scatter(k, split, range(split.group.size))


def gather_heads(attended: Tensor, split: TokenSplit, num_heads: int) -> Tensor:
    """The way back of `scatter_queries`: this rank's tokens with all heads, (B, l, H, Dh)."""
    row = _row(split, num_heads)
    size = _numbers_per_token(attended)
    pieces = attended.split([split.lengths[rank] for rank in row], dim=1)
    given, taken = [0] * split.group.size, [0] * split.group.size
    for rank in row:
        given[rank], taken[rank] = size * split.lengths[rank], size * split.length
    sent = torch.cat([piece.flatten() for piece in pieces])
    received = split.group.exchange(sent, given, taken)
    heads = received.view(len(row), attended.shape[0], split.length, *attended.shape[2:])
    return heads.movedim(0, 2).flatten(2, 3)


def _row(split: TokenSplit, num_heads: int) -> range:
    """The ranks that share all heads of the same queries, this one among them."""
    width = split.group.size // split.group.rows(num_heads)
    start = split.group.rank // width * width
    return range(start, start + width)


def _scatter(x: Tensor, split: TokenSplit, partners: range) -> Tensor:
    """Tokens (B, l, H, Dh) to those of all partners, with this rank's heads."""
    blocks = len(_row(split, x.shape[2]))
    # A row's ranks have the blocks of heads in order, and so has every other row.
    heads = x.unflatten(2, (blocks, -1)).movedim(2, 0)
    sent = heads.flatten()
    if len(partners) > blocks:
        sent = sent.repeat(len(partners) // blocks)
    size = _numbers_per_token(heads[0])
    lengths = [n if rank in partners else 0 for rank, n in enumerate(split.lengths)]
    given = [size * split.length if rank in partners else 0 for rank in range(split.group.size)]
    received = split.group.exchange(sent, given, [size * length for length in lengths])
    return _put_together(received, lengths, heads[0])


def _put_together(received: Tensor, lengths: Sequence[int], like: Tensor) -> Tensor:
    """The tokens of each rank, flat, as one tensor (B, -, ...) of the shape of `like`."""
    size = _numbers_per_token(like)
    pieces = received.split([size * length for length in lengths])
    shaped = [
        piece.view(like.shape[0], length, *like.shape[2:])
        for piece, length in zip(pieces, lengths, strict=True)
    ]
    return torch.cat(shaped, dim=1)


def _numbers_per_token(x: Tensor) -> int:
    """Of a tensor (B, l, ...), whatever l is."""
    return x.shape[0] * math.prod(x.shape[2:])
