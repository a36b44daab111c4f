"""Muon with AdamW: which parameters each updates, ranks, and that a resumed optimiser continues exactly."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from avatar.models.video_dit import VideoDiT
from avatar.nn.embeddings import ByteTextEncoder
from avatar.objectives.distributed import world_size
from avatar.objectives.muon import HIDDEN, MuonAdamW, orthogonalise_over_ranks, orthogonalised
from avatar.objectives.optim import trainable_parameters
from tests import ranks


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


def test_both_parts_agree_with_torchs_optimisers():
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
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # torch's orthogonalises in bf16; 5 updates are 5e-2


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    matrix = 100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix, steps=10)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ found @ v.T
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


def check_ranks_agree() -> None:
    """On each rank, that the shared orthogonalisation of odd numbers of matrices equals that of one process."""
    dist.init_process_group("gloo")
    assert world_size() == 2
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(4, 3 + n, generator=generator) for n in range(5)]
    for found, matrix in zip(orthogonalise_over_ranks(matrices), matrices, strict=True):
        assert torch.equal(found, orthogonalised(matrix))


def test_ranks_share_the_orthogonalisation():
    ranks.run(2, ("tests.objectives.test_muon:check_ranks_agree", []))


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
