"""Muon with AdamW: which parameters each updates, and that a resumed optimiser continues exactly."""

import copy

import pytest
import torch
from torch import nn

from avatar.models.video_dit import VideoDiT
from avatar.nn.embeddings import ByteTextEncoder
from avatar.objectives.muon import HIDDEN, MuonAdamW
from avatar.objectives.optim import trainable_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def train(net: Net, optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(torch.randn(16, 4, generator=generator)) - 1).square().mean().backward()
        optimizer.step()


def test_both_parts_equal_torchs_optimisers():
    torch.manual_seed(0)
    net = Net()
    other = copy.deepcopy(net)
    train(net, MuonAdamW(net.named_parameters(), lr=1e-2, weight_decay=0.1), 5, 1)
    hidden = [block.weight for block in other.blocks]
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in other.parameters() if all(p is not h for h in hidden)]
    adam = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)

    class Both:
        def zero_grad(self):
            other.zero_grad()

        def step(self):
            muon.step()
            adam.step()

    train(other, Both(), 5, 1)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_optimiser_continues_exactly():
    torch.manual_seed(0)
    net = Net()
    optimizer = MuonAdamW(net.named_parameters(), lr=1e-2)
    train(net, optimizer, 3, 1)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, 3, 2)
    resumed = Net()
    resumed.load_state_dict(saved[0])
    again = MuonAdamW(resumed.named_parameters(), lr=1e-2)
    again.load_state_dict(saved[1])
    train(resumed, again, 3, 2)
    for a, b in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedules_change_the_learning_rate_of_both_parts():
    net = Net()
    optimizer = MuonAdamW(net.named_parameters(), lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, 1, 1)
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, before[name])


def test_muon_takes_the_linear_layers_of_the_blocks():
    net = VideoDiT(4, 8, 16, 2, 1, 1, 8, 3, ByteTextEncoder(8, 8, 1))
    hidden = {name for name, p in trainable_parameters(net) if p.ndim == 2 and HIDDEN.search(name)}
    assert {"blocks.0.attention.q.weight", "blocks.0.ffn.2.weight", "text.encoder.layers.0.linear1.weight"} <= hidden
    assert not hidden & {
        "blocks.0.modulation",
        "patches.proj.weight",
        "out.weight",
        "text.byte.weight",
        "labels.emotion.weight",
    }


@pytest.mark.parametrize("only", ["inp", "blocks"])
def test_networks_without_one_of_the_kinds_are_trained(only):
    torch.manual_seed(0)
    net = Net()
    named = [
        (name, p)
        for name, p in net.named_parameters()
        if (name.startswith("inp") or name.endswith("bias")) == (only == "inp")
    ]
    before = [p.detach().clone() for _, p in named]
    train(net, MuonAdamW(named, lr=1e-2), 1, 1)
    assert all(not torch.equal(a, b) for a, (_, b) in zip(before, named, strict=True))
