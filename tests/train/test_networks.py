from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from apt.errors import CheckpointError, InputError
from apt.train.networks import EMA, model_state, optimizer_state


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=dtype)
        self.norm = nn.BatchNorm1d(3, dtype=dtype)
        self.frozen = nn.Parameter(torch.randn(2, dtype=dtype), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def disturb(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name != "frozen":
                value.copy_(10 * torch.randn(value.shape, generator=generator))


def test_equals_the_definition_in_fp64():
    net = Net()
    ema = EMA(net, 0.9)
    expected = net.layer.weight.detach().double()
    for seed in range(5):
        disturb(net, seed)
        ema.update(net)
        expected = 0.9 * expected + 0.1 * net.layer.weight.detach().double()
    found = ema.state_dict()["layer.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_warm_up_forgets_where_it_began():
    net = Net()
    ema = EMA(net, 0.9, warmup=True)
    expected, first = net.layer.weight.detach().double(), 1.0
    for update in range(120):
        disturb(net, update)
        ema.update(net, update)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * net.layer.weight.detach().double()
        first *= decay
        if update == 9:
            assert first < 1e-4 < 0.9**10
    found = ema.state_dict()["layer.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Over its warm-up, it averages as without one.
    plain = EMA(net, 0.9)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    plain.load_state_dict(before)
    disturb(net, 200)
    ema.update(net, 120)
    plain.update(net, 120)
    assert torch.equal(ema.state_dict()["layer.weight"], plain.state_dict()["layer.weight"])


def test_equals_torch_averaged_model():
    net = Net()
    peer = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    peer.update_parameters(net)  # the first call copies
    ema = EMA(net, 0.995)
    for seed in range(3):
        disturb(net, seed)
        ema.update(net)
        peer.update_parameters(net)
    for name, value in peer.module.named_parameters():
        if name != "frozen":
            assert torch.equal(ema.state_dict()[name], value), name


def test_buffers_are_copied_and_temporary_ones_left_out():
    net = Net()
    ema = EMA(net, 0.5)
    disturb(net, 1)
    net.norm.num_batches_tracked.fill_(7)
    ema.update(net)
    state = ema.state_dict()
    assert torch.equal(state["norm.running_mean"], net.norm.running_mean)
    assert state["norm.num_batches_tracked"].item() == 7
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    assert "table" not in state


def test_averages_in_fp32_what_bf16_would_lose():
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    net.weight.data.fill_(1.0)
    ema = EMA(net, 0.999)
    net.weight.data.fill_(2.0)
    ema.update(net)
    assert ema.state_dict()["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.state_dict()["weight"].item(), 1.001)
    ema.copy_to(net)
    assert net.weight.dtype == torch.bfloat16 and net.weight.item() == 1.0


def test_is_independent_of_the_module_and_of_autograd():
    net = Net()
    ema = EMA(net, 0.9)
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    disturb(net, 3)
    assert all(torch.equal(v, before[k]) for k, v in ema.state_dict().items())
    assert not any(v.requires_grad for v in ema.state_dict().values())


def test_applied_lends_the_average_and_gives_the_weights_back_bit_for_bit():
    net = Net(torch.bfloat16)
    ema = EMA(net, 0.5)
    disturb(net, 4)
    ema.update(net)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), ema.applied(net):
        lent = ema.state_dict()["layer.weight"].to(torch.bfloat16)
        assert torch.equal(net.layer.weight, lent)
        assert not torch.equal(net.layer.weight, weights["layer.weight"])
        raise RuntimeError("stop")
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert net.layer.weight.requires_grad


def test_state_round_trip_is_strict():
    ema, other = EMA(Net(), 0.9), EMA(Net(), 0.9)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(v, ema.state_dict()[k]) for k, v in other.state_dict().items())
    state = ema.state_dict()
    del state["layer.bias"]
    with pytest.raises(CheckpointError, match=r"layer\.bias"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"'layer\.bias' is torch\.float32 \(2,\), expected"):
        other.load_state_dict(state | {"layer.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"torch\.float64"):
        other.load_state_dict(state | {"layer.bias": torch.zeros(3, dtype=torch.float64)})


def test_lent_averages_are_left_to_whoever_moves_them():
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    ema, expected = EMA(net, 0.9), EMA(plain, 0.9)
    lent = ema.lend(net)
    assert {id(p) for p in lent} == {id(p) for p in net.parameters() if p.requires_grad}
    assert lent[net.layer.weight] is ema.state_dict()["layer.weight"]
    for module in (net, plain):
        disturb(module, 1)
    ema.update(net)
    expected.update(plain)
    for name, value in expected.state_dict().items():
        moved = not any(ema.state_dict()[name] is average for average in lent.values())
        assert torch.equal(ema.state_dict()[name], value) is moved, name


def test_a_weight_with_two_names_is_lent_once():
    net = Net()
    net.tied = net.layer.weight
    ema = EMA(net, 0.9)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    average = ema.lend(net)[net.tied]
    assert average is ema.state_dict()["tied"]
    disturb(net, 1)
    ema.update(net)
    assert torch.equal(average, before["tied"])
    assert not torch.equal(ema.state_dict()["layer.weight"], before["layer.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_decay_outside_its_range(decay: float):
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        EMA(Net(), decay)


def test_what_does_not_train_takes_no_memory_and_no_update():
    net = Net(torch.bfloat16)
    ema = EMA(net, 0.5)
    assert "frozen" not in ema.state_dict()
    before = net.frozen.clone()
    disturb(net, 1)
    ema.update(net)
    with ema.applied(net):
        assert torch.equal(net.frozen, before)
    assert torch.equal(net.frozen, before)
    assert ema.state_dict()["layer.weight"].dtype == torch.float32


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
