"""The base class with the smallest possible model of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from apt.condition import Condition, EncodedText
from apt.errors import InputError
from apt.methods.apt import generate
from apt.models import MODELS, create_discriminator, create_model
from apt.models.transformer import (
    Context,
    DiffusionTransformer,
    Tokens,
    TransformerBlock,
    check_layers,
    check_rows,
    token_grid,
)


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    in_channels: int = 2
    hidden_size: int = 8
    depth: int = 3
    text_dim: int = 4

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        return token_grid(latent_shape, (1, 1, 1))

    def build(self) -> Own:
        return Own(self)


class OwnBlock(TransformerBlock):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix = nn.Linear(size, size)

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        mean = tokens.visual.mean(dim=1) + tokens.text.mean(dim=1) + context.modulation
        return Tokens(tokens.visual + self.mix(mean).sin()[:, None], tokens.text)


class Own(DiffusionTransformer):
    blocks_name = "layers"
    output_names = ("last",)

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(config.in_channels, config.hidden_size)
        self.words = nn.Linear(config.text_dim, config.hidden_size)
        self.layers = nn.ModuleList(OwnBlock(config.hidden_size) for _ in range(config.depth))
        self.last = nn.Linear(config.hidden_size, config.in_channels)

    def embed(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None
    ) -> tuple[Tokens, Context]:
        time, text = t[:, None].expand(-1, self.hidden_size), self.words(c.text.tokens)
        if rows is not None:
            time, text = time[rows], text[rows]
        visual = self.first(x.flatten(2).transpose(1, 2))
        return Tokens(visual, text), Context(time, time, rows)

    def unembed(self, h_BLD: Tensor, context: Context, x: Tensor, t: Tensor) -> Tensor:
        return self.last(h_BLD).transpose(1, 2).view_as(x)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Registered for one test."""
    monkeypatch.setitem(MODELS._builders, "own", OwnConfig)
    monkeypatch.setitem(MODELS._pretrained, "own", {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield "own"


def test_it_generates_and_discriminates_with_what_everyone_uses(own: str) -> None:
    generator, discriminator = create_model(own), create_discriminator(create_model(own, depth=4))
    c = Condition(EncodedText(torch.randn(2, 3, 4)))
    fake = generate(generator, torch.randn(2, 2, 3, 2, 2), c)
    rows = torch.tensor([1, 0])
    discriminator(fake, torch.rand(2), c, rows=rows).logits.sum().backward()
    assert not hasattr(discriminator.backbone, "last")
    for module in (generator, discriminator):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_blocks_are_recomputed_in_the_backward_pass_alone(own: str) -> None:
    model = create_model(own)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for block in model.block_list():
        block.register_forward_pre_hook(count)
    model.set_checkpointing(True)
    x, t = torch.randn(1, 2, 1, 2, 2), torch.rand(1)
    c = Condition(EncodedText(torch.randn(1, 3, 4)))
    with torch.no_grad():
        model(x, t, c)
    assert runs == 3
    loss = model(x, t, c).sum()
    assert runs == 6
    loss.backward()
    assert runs == 9


@pytest.mark.parametrize(
    ("latents", "patch", "grid"),
    [((3, 4, 6), (1, 2, 2), (3, 2, 3)), ((4, 1, 9), (2, 1, 3), (2, 1, 3))],
)
def test_token_grid(
    latents: tuple[int, int, int], patch: tuple[int, int, int], grid: tuple[int, int, int]
) -> None:
    assert token_grid(latents, patch) == grid


def test_sizes_that_no_patch_divides() -> None:
    for latents, name in (((3, 4, 4), "frames 3"), ((2, 5, 4), "height 5"), ((2, 4, 1), "width 1")):
        with pytest.raises(InputError, match=name):
            token_grid(latents, (2, 2, 2))


def test_layers_are_counted_from_1() -> None:
    check_layers([1, 3], 3)
    for layers in ([], [0], [1, 4]):
        with pytest.raises(InputError, match=r"1\.\.3"):
            check_layers(layers, 3)


def test_rows_of_timesteps_and_conditions() -> None:
    x, c = torch.zeros(3, 1, 1, 1, 4), Condition(EncodedText(torch.zeros(2, 1, 1)))
    rows = torch.tensor([0, 1, 1])
    check_rows(x, torch.zeros(2), c, rows)
    check_rows(x, torch.zeros(2, 4), c, rows, num_tokens=4)
    check_rows(x[:2], torch.zeros(2), c, None)
    for t, text, index, tokens in (
        (torch.zeros(2), c, None, None),
        (torch.zeros(3), c, None, None),
        (torch.zeros(1), c, rows, None),
        (torch.zeros(2, 4), c, rows, None),
        (torch.zeros(2, 3), c, rows, 4),
        (torch.zeros(2, 1), c, rows, 4),
    ):
        with pytest.raises(InputError, match="pass `rows`"):
            check_rows(x, t, text, index, num_tokens=tokens)
