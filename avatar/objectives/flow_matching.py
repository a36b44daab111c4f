"""Flow matching: the teacher's training, and with a causal pattern the teacher-forcing fine-tune that follows it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from avatar.diffusion import path
from avatar.diffusion.packing import Pattern, TimestepSampler
from avatar.models.video_dit import VideoDiT
from avatar.objectives import losses
from avatar.objectives.parts import drawn, mean_over_ranks
from avatar.objectives.sharding import shard_networks
from avatar.types import WHOLE, Batch, Conditioning, Times


@dataclass(frozen=True)
class Dropout:
    """How often each modality is taken away in training, independently, so that guidance has something to subtract."""

    audio: float = 0.1
    text: float = 0.1
    labels: float = 0.1

    def __call__(self, cond: Conditioning, part: slice = WHOLE) -> Conditioning:
        """The conditioning of a part of a batch, with what is dropped of it."""
        b, device = len(cond.reference), cond.reference.device
        uniform = drawn(torch.rand, part)
        return cond.without(
            **{name: uniform(b, device=device) < getattr(self, name) for name in ("audio", "text", "labels")}
        )


def lip_weights(batch: Batch, lip_weight: float) -> Float[Tensor, "b 1 l h w"]:
    """Loss weights that grow with the share of mouth in a latent pixel, with mean 1 over each pass of all ranks."""
    weight = 1 + lip_weight * batch.lips[:, None]
    return weight / mean_over_ranks(weight.mean())


class FlowMatching(lightning.LightningModule):
    """Noise a clip, predict the velocity, compare.

    Args:
        model: the backbone; `pattern` says what it sees.
        lip_weight: added to the loss weight of latents that are all mouth.
        weighting: the loss weight of each time, such as `losses.even` or `losses.min_snr`.
        steps: of the run, for the learning rate's schedule.
    """

    def __init__(
        self,
        model: VideoDiT,
        pattern: Pattern,
        timesteps: TimestepSampler,
        dropout: Dropout,
        optimizer: Callable[[Iterable], Optimizer],
        lip_weight: float,
        steps: int,
        weighting: Callable[[Times], Times] = losses.even,
    ):
        super().__init__()
        self.weighting = weighting
        self.net, self.pattern, self.timesteps, self.dropout = model, pattern, timesteps, dropout
        self.optimizer, self.lip_weight, self.steps = optimizer, lip_weight, steps

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self._loss(batch, self.dropout(batch.conditioning, batch.part))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(index)
            loss = self._loss(batch, batch.conditioning)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch.latents), sync_dist=True)

    def _loss(self, batch: Batch, cond: Conditioning) -> Tensor:
        x0 = batch.latents
        t = self.pattern.times(drawn(self.timesteps, batch.part), x0)
        eps = drawn(torch.randn, batch.part)(*x0.shape, device=x0.device)
        v = self.pattern.velocity(self.net, path.noised(x0, eps, t), t, cond, x0)
        weight = lip_weights(batch, self.lip_weight) * path.per_latent(self.weighting(t))
        return losses.flow_matching(v, x0, eps, weight)

    def configure_model(self) -> None:
        shard_networks(self)

    def configure_optimizers(self):
        return scheduled(self.optimizer(learned(self.net)), self.steps)


def learned(net: nn.Module) -> list[nn.Parameter]:
    """The weights of a network that aren't frozen."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def scheduled(optimizer: Optimizer, steps: int) -> dict:
    """An optimiser whose learning rate warms up over the first twentieth of a run and falls to a tenth by its end."""

    def factor(step: int) -> float:
        done = step / max(steps, 1)
        return min(1.0, done / 0.05 + 1e-2) * (1.0 if done < 0.5 else max(0.1, 1 - 1.8 * (done - 0.5)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
