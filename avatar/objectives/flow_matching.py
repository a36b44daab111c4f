"""Flow matching: the teacher's training, and with a causal pattern the teacher-forcing fine-tune that follows it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avatar.diffusion import path
from avatar.diffusion.packing import AttentionPattern, TimestepSampler
from avatar.models.video_dit import VideoDiT
from avatar.objectives import losses
from avatar.objectives.distributed import sample_globally
from avatar.objectives.sharding import shard_networks
from avatar.objectives.weighting import RegionWeights, Weighting
from avatar.types import WHOLE_BATCH, Batch, Conditioning


@dataclass(frozen=True)
class Dropout:
    """How often each modality is taken away in training, independently, so that guidance has something to subtract."""

    audio: float = 0.1
    text: float = 0.1
    labels: float = 0.1

    def __call__(self, cond: Conditioning, part: slice = WHOLE_BATCH) -> Conditioning:
        """The conditioning of a part of a batch, with what is dropped of it."""
        b, device = len(cond.reference), cond.reference.device
        uniform = sample_globally(torch.rand, part)
        return cond.without(
            **{name: uniform(b, device=device) < getattr(self, name) for name in ("audio", "text", "labels")}
        )


class FlowMatching(lightning.LightningModule):
    """Noise a clip, predict the velocity, compare.

    Args:
        model: the backbone; `pattern` says what it sees.
        region_weights: on regions of the picture.
        weighting: of times.
        steps: of the run, for the learning rate's schedule.
    """

    def __init__(
        self,
        model: VideoDiT,
        pattern: AttentionPattern,
        timesteps: TimestepSampler,
        dropout: Dropout,
        optimizer: Callable[[Iterable], Optimizer],
        region_weights: RegionWeights,
        weighting: Weighting,
        steps: int,
    ):
        super().__init__()
        self.net, self.pattern, self.timesteps, self.dropout = model, pattern, timesteps, dropout
        self.optimizer, self.region_weights, self.weighting, self.steps = optimizer, region_weights, weighting, steps

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self._loss(batch, self.dropout(batch.conditioning, batch.shard))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(index)
            loss = self._loss(batch, batch.conditioning)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch.latents), sync_dist=True)

    def _loss(self, batch: Batch, cond: Conditioning) -> Tensor:
        x0 = batch.latents
        t = self.pattern.times(sample_globally(self.timesteps, batch.shard), x0)
        eps = sample_globally(torch.randn, batch.shard)(*x0.shape, device=x0.device)
        v = self.pattern.velocity(self.net, path.noised(x0, eps, t), t, cond, x0)
        weight = self.region_weights(batch.regions) * path.per_latent(self.weighting.of_velocity(t))
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
