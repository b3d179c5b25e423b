from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apt.train.state import model_state, optimizer_state

OPTIMIZERS = {
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, alpha=0.9),
    "rmsprop eps 0": lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=0.0, momentum=0.5),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_model_state_shares_storage():
    net = nn.Linear(3, 2)
    state = model_state(net)
    state["bias"].fill_(5)
    assert net.bias.tolist() == [5, 5]
    assert not state["bias"].requires_grad


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_asking_a_fresh_optimiser_changes_nothing(name: str):
    torch.manual_seed(0)
    asked, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(asked.state_dict())
    asked_optimizer = OPTIMIZERS[name](asked.parameters())
    plain_optimizer = OPTIMIZERS[name](plain.parameters())
    gradient = torch.ones_like(asked.weight)
    asked.weight.grad = gradient
    state = optimizer_state(asked, asked_optimizer)
    assert list(state) == ["weight", "bias"]
    assert all(v.count_nonzero() == 0 for s in state.values() for v in s.values())
    assert asked.weight.grad is gradient and asked.bias.grad is None
    assert asked_optimizer.param_groups[0]["lr"] == 1e-2
    asked_optimizer.zero_grad()
    for seed in range(3):
        step(asked, asked_optimizer, seed)
        step(plain, plain_optimizer, seed)
    assert torch.equal(asked.weight, plain.weight) and torch.equal(asked.bias, plain.bias)
    for parameter, other in zip(asked.parameters(), plain.parameters(), strict=True):
        theirs = plain_optimizer.state[other]
        for key, value in optimizer_state(asked, asked_optimizer)[
            "weight" if parameter is asked.weight else "bias"
        ].items():
            assert torch.equal(value, theirs[key]), key


def test_state_in_use_is_kept_when_part_is_missing():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = OPTIMIZERS["rmsprop"](net.parameters())
    net[1].requires_grad_(False)
    step(net, optimizer, 0)
    before = copy.deepcopy(optimizer.state[net[0].weight])
    state = optimizer_state(net, optimizer)
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(state["0.weight"]["square_avg"], before["square_avg"])
    assert torch.equal(state["0.weight"]["step"], before["step"])
    assert state["1.weight"]["square_avg"].count_nonzero() == 0


def test_writing_into_the_state_resumes_the_optimiser():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = OPTIMIZERS["rmsprop"](net.parameters())
    step(net, optimizer, 0)
    other = copy.deepcopy(net)
    other_optimizer = OPTIMIZERS["rmsprop"](other.parameters())
    fresh = optimizer_state(other, other_optimizer)
    for name, values in optimizer_state(net, optimizer).items():
        for key, value in values.items():
            fresh[name][key].copy_(value)
    step(net, optimizer, 1)
    step(other, other_optimizer, 1)
    assert torch.equal(net.weight, other.weight)


def test_a_strangers_parameter_is_refused():
    optimizer = OPTIMIZERS["rmsprop"](nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match=r"2 of the optimiser's 2 parameters"):
        optimizer_state(nn.Linear(3, 2), optimizer)
