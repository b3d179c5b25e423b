"""One pass over real, perturbed and generated samples: equal to three, and what it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apt.condition import Condition
from apt.errors import InputError
from apt.kernels import perturbed_batch
from apt.losses import ApproximateR1
from apt.methods.apt import discriminator_loss
from apt.models import Discriminator, create_discriminator
from apt.models.discriminator import discriminate_groups
from apt.rng import Draw
from tests.memory import peak_bytes, saved_bytes
from tests.models.nets import POOLED_DIM, inputs, tiny_mmdit
from tests.processes import start_main

KEY = Draw(3, 5, 7, "perturbation")
ROWS = 3  # real samples, and rows of conditions


def tiny(head: str = "attention", **overrides: Any) -> Discriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_discriminator(tiny_mmdit(pooled_dim=POOLED_DIM, **overrides), head=head)


def penalised(logits: list[Tensor]) -> Tensor:
    """A loss with gradients through all groups and both copies of the pair (APT Eq. 10)."""
    real, perturbed, fake = logits
    penalty = (real[: len(perturbed)] - perturbed).square().mean()
    adversarial = nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()
    return adversarial + 100 * penalty


def pair(
    discriminator: Discriminator, real: Tensor, fake: Tensor, t: Tensor, c: Any, **r1: Any
) -> Tensor:
    """Eq. 10 in one pass."""
    return discriminator_loss(discriminator, real, fake, t, c, KEY, r1=ApproximateR1(**r1))[0]


def gradients(discriminator: Discriminator, loss: Tensor, *others: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*discriminator.parameters(), *others]))


@pytest.mark.parametrize("head", ["attention", "conv3d"])
@pytest.mark.parametrize("modulation", ["shared", "block"])
@pytest.mark.parametrize("num_perturbed", [ROWS, 1])
def test_it_equals_three_calls(head, modulation, num_perturbed):
    discriminator = tiny(head, modulation=modulation)
    real, t, c = inputs(ROWS, lengths=[5, 2, 3])
    fake = inputs(ROWS, seed=9)[0]
    real.requires_grad_()
    fake.requires_grad_()
    ours = pair(discriminator, real, fake, t, c, sigma=0.3, fraction=num_perturbed / ROWS)

    batch = perturbed_batch(real, fake, 0.3, KEY, num_perturbed=num_perturbed)
    parts = batch.split([ROWS, num_perturbed, ROWS])
    apart = [discriminator(x, t[: len(x)], c.select(slice(0, len(x)))).logits for x in parts]
    expected = penalised(apart)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    pairs = zip(
        gradients(discriminator, ours, real, fake),
        gradients(discriminator, expected, real, fake),
        strict=True,
    )
    for got, want in pairs:
        assert ((got - want).norm() / want.norm()).item() < 1e-4


def test_groups_by_name():
    discriminator = tiny()
    x, t, c = inputs(ROWS)
    none = torch.zeros(0, dtype=torch.int64)
    groups = {"b": torch.tensor([2, 0]), "none": none, "a": torch.tensor([1])}
    found = discriminate_groups(discriminator, x, t, c, groups)
    assert list(found) == ["b", "none", "a"] and found["none"].logits.shape == (0,)
    expected = discriminator(x, t, c, rows=torch.tensor([2, 0, 1]))
    assert torch.equal(torch.cat([one.logits for one in found.values()]), expected.logits)
    for layer, features in enumerate(expected.features):
        assert torch.equal(torch.cat([one.features[layer] for one in found.values()]), features)
    with pytest.raises(InputError, match=r"'a': 1.* must add up to the 3 samples"):
        discriminate_groups(discriminator, x, t, c, {"a": groups["a"]})


def rows_computed(discriminator: Discriminator, names: list[str]) -> dict[str, int]:
    """Count, from now on, the rows that these layers of the backbone process."""
    counts = dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[name] += len(args[0])

        return hook

    assert isinstance(discriminator.backbone, nn.Module)
    for name in names:
        discriminator.backbone.get_submodule(name).register_forward_pre_hook(count(name))
    return counts


@pytest.mark.parametrize("modulation", ["shared", "block"])
def test_conditions_are_computed_once_for_all_groups(modulation):
    discriminator = tiny(modulation=modulation)
    names = ["time_in.linear1", "time_in.linear2", "text_in", "pooled_in.0"]
    if modulation == "shared":
        names.append("time_modulation")
    else:
        names += [f"blocks.{i}.streams.{j}.modulation" for i in range(3) for j in range(2)]
    counts = rows_computed(discriminator, names)
    tokens = rows_computed(discriminator, ["patch_in"])
    x, t, c = inputs(ROWS)
    pair(discriminator, x, x, t, c)
    assert counts == dict.fromkeys(names, ROWS)
    assert tokens == {"patch_in": 3 * ROWS}


def repeated(c: Condition) -> Condition:
    return c.select(torch.arange(ROWS).repeat(3))


def test_memory_against_three_copies_of_the_conditions():
    """Modulation is most of the difference: two more rows of it for each, in every block."""
    discriminator = tiny(modulation="block", hidden_size=96, num_heads=6)
    x, t, c = inputs(ROWS, size=(1, 2, 2), words=1)
    copies = repeated(c)

    def shared() -> Tensor:
        return pair(discriminator, x, x, t, c)

    def copied() -> Tensor:
        batch = perturbed_batch(x, x, 0.1, KEY)
        return penalised(list(discriminator(batch, t.repeat(3), copies).logits.chunk(3)))

    torch.testing.assert_close(shared(), copied())
    table = 6 * 96 * 4  # bytes of a row of modulation; two streams in each of three blocks
    extra = 2 * ROWS * 6 * table
    weights = next(discriminator.parameters())
    assert saved_bytes(copied, without=weights) - saved_bytes(shared, without=weights) > extra / 2
    assert peak_bytes(copied) - peak_bytes(shared) > extra / 2


def test_sharded_weights_are_gathered_once_for_all_groups(tmp_path: Path) -> None:
    """By two ranks: once in the forward and once in the backward pass of each block."""
    ranks = [
        start_main("tests.models.pair_gathers", rank, tmp_path, folder=tmp_path)
        for rank in range(2)
    ]
    for running in ranks:
        done = running.wait_for()
        assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        blocks = found["blocks"]
        # The rest of D, which is one more, stays gathered from its first use on, and so does the
        # last block, whose backward pass comes next.
        assert found["pair"] == {"forward": blocks + 1, "backward": blocks - 1}
        assert found["apart"] == {"forward": 3 * (blocks - 1) + 2, "backward": 3 * blocks - 1}
