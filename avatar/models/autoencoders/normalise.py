"""Normalisation of latents to zero mean and unit variance per channel, for all autoencoders.

    z = (x - mean) / std,    x = mean + std z

Published autoencoders have fixed statistics; ours updates running statistics in training.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.types import Latents

PerChannel = Float[Tensor, "c 1 1 1"]


def normalised(x: Latents, mean: PerChannel, std: PerChannel) -> Latents:
    """(x - mean) / std, per channel."""
    return (x - mean) / std


class Normalise(nn.Module):
    """Normalisation by constants, which are buffers of the weights.

    Args:
        mean, std: one number per channel each, std > 0.

    Raises:
        UserError: different lengths, or a std that is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor):
        super().__init__()
        mean, std = (torch.as_tensor(values, dtype=torch.float32) for values in (mean, std))
        if len(mean) != len(std) or not (std.is_meta or (std > 0).all()):
            raise UserError(
                f"got {len(mean)} means and {len(std)} standard deviations; expected as many, each std > 0: change them"
            )
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, values.clone().view(-1, 1, 1, 1))

    def forward(self, x: Latents) -> Latents:
        return normalised(x, self.mean, self.std)

    def inverse(self, z: Latents) -> Latents:
        return z * self.std + self.mean


class RunningNormalise(nn.Module):
    """Normalisation by running statistics of the training data; no gradients pass through the statistics.

    Args:
        channels: channels of the latents.
        momentum: the least weight of a batch in the running statistics.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float = 0.02):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("variance", torch.ones(channels, 1, 1, 1))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Latents) -> Latents:
        if self.training:
            self._update(x.detach().to(self.mean.dtype))  # autocast may have narrowed it
        return normalised(x, self.mean, self.variance.sqrt())

    def _update(self, x: Latents) -> None:
        self.batches += 1
        weight = torch.clamp(1 / self.batches, min=self.momentum)  # a plain mean at first, an exponential one later
        variance, mean = torch.var_mean(x, dim=(0, 2, 3, 4), correction=0)
        self.mean.lerp_(mean.view_as(self.mean), weight)
        self.variance.lerp_(variance.view_as(self.variance), weight)
