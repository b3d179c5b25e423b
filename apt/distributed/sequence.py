"""Sequence parallelism: several ranks share the tokens of the same samples (DeepSpeed-Ulysses).

All ranks of a `SequenceGroup` have the same samples, noise, timesteps and text. Each rank computes
token-wise operations for its own tokens only. Attention needs all tokens, so the ranks exchange
them with `torch.distributed`'s all-to-all. Before attention, a rank sends the heads of other ranks
away and receives all tokens of its own heads; after it, the other way round. Attention thus runs on
whole sequences, with any backend, on a share of the heads.

If N ranks do not divide the H heads, u = gcd(N, H) ranks form a row that shares the heads, and the
r = N / u rows share the queries: a rank attends from one row's queries, with H / u heads, to all
keys. Each key and value then goes to r ranks instead of one. A ring sends as many bytes, but here
all of them arrive at once, so attention remains one call of any backend. A rank holds 2 L H / u Dh
numbers of keys and values: those of 3 heads for Wan 1.3B, which has 12, on 8 ranks.

If N does not divide the tokens, the shares differ by at most one token, without padding or masks.

Gradients. Tensors that all ranks of the group compute alike (latents, text, logits, losses) have
the true gradient on each rank. Tensors of one rank (its tokens) have N times their part of the
gradient. Either way, the *mean* of a parameter's gradients over the ranks is the true gradient.
FSDP takes this mean over data and sequence ranks alike, so no code has to know which parameters saw
which tokens.

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
    """Two or more ranks that share the tokens of the same samples.

    Attributes:
        group: the process group.
        rank: this process's rank in it, 0 .. size - 1.
        size: N.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> SequenceGroup | None:
        """Return the sequence group of a process group; None if it has one rank."""
        size = dist.get_world_size(group)
        return None if size == 1 else cls(group, dist.get_rank(group), size)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        """Return itself, because copies of a network use the same group."""
        return self

    def split(self, length: int) -> TokenSplit:
        """Split `length` tokens into shares that differ by at most one; some may be empty."""
        least, more = divmod(length, self.size)
        return TokenSplit(self, tuple(least + (rank < more) for rank in range(self.size)))

    def rows(self, num_heads: int) -> int:
        """Return r, the number of rows, each of which has all heads; 1 if N divides the heads."""
        return self.size // math.gcd(self.size, num_heads)

    def exchange(self, sent: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """Exchange numbers by a differentiable all-to-all.

        In rank order, `given[i]` numbers go to rank i, and `taken[i]` come from it.
        """
        received = functional.all_to_all_single_autograd(sent, list(taken), list(given), self.group)
        return functional.wait_tensor(received)

    def gather(self, values: Tensor) -> Tensor:
        """Gather values (...), of the same shape on all ranks, as (N, ...); differentiable."""
        sizes = [values.numel()] * self.size
        received = self.exchange(values.flatten().repeat(self.size), sizes, sizes)
        return received.view(self.size, *values.shape)

    def alike(self, values: Tensor) -> Tensor:
        """Return values that are the same on all ranks unchanged; average their gradient."""
        if not (torch.is_grad_enabled() and values.requires_grad):
            return values
        return _Alike.apply(values, self)


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = functional.all_reduce(grads[0].contiguous(), "sum", ctx.group.group)
        return functional.wait_tensor(total) / ctx.group.size, None


@dataclass(frozen=True)
class TokenSplit:
    """The number of tokens of each rank of a group; in rank order, they form the whole sequence.

    Attributes:
        group: the ranks.
        lengths: number of tokens of each rank.
    """

    group: SequenceGroup
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """l, the number of tokens of this rank."""
        return self.lengths[self.group.rank]

    @property
    def total(self) -> int:
        """L, the number of tokens of all ranks."""
        return sum(self.lengths)

    def beside(self, other: TokenSplit) -> TokenSplit:
        """Return the split of two streams that each rank concatenates."""
        pairs = zip(self.lengths, other.lengths, strict=True)
        return TokenSplit(self.group, tuple(a + b for a, b in pairs))

    def order(self, whole: Tensor, other: TokenSplit) -> Tensor:
        """Return values (B, L + L') of two whole streams in the order of `beside`."""
        first, second = whole.split([self.total, other.total], dim=1)
        pieces = zip(first.split(self.lengths, 1), second.split(other.lengths, 1), strict=True)
        return torch.cat([piece for pair in pieces for piece in pair], dim=1)

    def own(self, whole: Tensor, dim: int = 1) -> Tensor:
        """Return a copy of this rank's part of a tensor that has all tokens along `dim`."""
        start = sum(self.lengths[: self.group.rank])
        return whole.narrow(dim, start, self.length).contiguous()

    def whole(self, own: Tensor) -> Tensor:
        """Return (B, L, ...) from each rank's (B, l, ...); differentiable."""
        size = _numbers_per_token(own)
        given = [own.numel()] * self.group.size
        taken = [size * length for length in self.lengths]
        received = self.group.exchange(own.flatten().repeat(self.group.size), given, taken)
        return _put_together(received, self.lengths, own)


def scatter_queries(q: Tensor, split: TokenSplit) -> Tensor:
    """Turn queries (B, l, H, Dh) into (B, -, H / u, Dh): the row's tokens, this rank's heads.

    The tokens are those of the row's ranks, in rank order; all L if N divides the heads.
    """
    return _scatter(q, split, _row(split, q.shape[2]))


def scatter_keys(k: Tensor, split: TokenSplit) -> Tensor:
    """Turn keys or values (B, l, H, Dh) into (B, L, H / u, Dh): all tokens, this rank's heads."""
    return _scatter(k, split, range(split.group.size))


def gather_heads(attended: Tensor, split: TokenSplit, num_heads: int) -> Tensor:
    """Invert `scatter_queries`: return this rank's tokens with all heads, (B, l, H, Dh)."""
    row = _row(split, num_heads)
    size = _numbers_per_token(attended)
    given, taken = [0] * split.group.size, [0] * split.group.size
    for rank in row:
        given[rank], taken[rank] = size * split.lengths[rank], size * split.length
    if attended.shape[0] == 1:
        sent = attended.flatten()
    else:
        pieces = attended.split([split.lengths[rank] for rank in row], dim=1)
        sent = torch.cat([piece.flatten() for piece in pieces])
    received = split.group.exchange(sent, given, taken)
    heads = received.view(len(row), attended.shape[0], split.length, *attended.shape[2:])
    return heads.movedim(0, 2).flatten(2, 3)


def _row(split: TokenSplit, num_heads: int) -> range:
    """Return this rank's row: the ranks that share the heads of the same queries."""
    width = split.group.size // split.group.rows(num_heads)
    start = split.group.rank // width * width
    return range(start, start + width)


def _scatter(x: Tensor, split: TokenSplit, partners: range) -> Tensor:
    """Turn tokens (B, l, H, Dh) into those of all partners, with this rank's heads."""
    blocks = len(_row(split, x.shape[2]))
    # The ranks of every row have the blocks of heads in the same order.
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
    """Return the flat tokens of each rank as one tensor (B, -, ...), shaped otherwise as `like`."""
    if like.shape[0] == 1:  # already in order
        return received.view(1, sum(lengths), *like.shape[2:])
    size = _numbers_per_token(like)
    pieces = received.split([size * length for length in lengths])
    shaped = [
        piece.view(like.shape[0], length, *like.shape[2:])
        for piece, length in zip(pieces, lengths, strict=True)
    ]
    return torch.cat(shaped, dim=1)


def _numbers_per_token(x: Tensor) -> int:
    """Return how many numbers each token position of a tensor (B, l, ...) has."""
    return x.shape[0] * math.prod(x.shape[2:])
