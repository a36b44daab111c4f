"""Flow matching: trains the teacher; with a causal pattern, the teacher-forcing fine-tune that follows."""

from collections.abc import Callable, Iterable

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer

from avatar.conditioning.dropout import Dropout
from avatar.diffusion import path
from avatar.diffusion.packing import AttentionPattern, TimestepSampler
from avatar.models.video_dit import VideoDiT
from avatar.objectives import losses
from avatar.objectives.distributed import noise_like, sample_globally
from avatar.objectives.optim import Schedule, trainable_parameters, with_schedule
from avatar.objectives.sharding import shard_networks
from avatar.objectives.weighting import RegionWeights, Weighting
from avatar.types import Batch, Conditioning, Latents


class FlowMatching(lightning.LightningModule):
    """Flow-matching objective: regress the velocity of a noised clip (rectified flow, arXiv:2209.03003).

    Args:
        model: the backbone.
        pattern: its attention pattern: bidirectional or teacher-forced.
        timesteps: distribution of t.
        dropout: of conditions, for classifier-free guidance.
        optimizer: parameters → optimiser.
        region_weights: loss weights of image regions.
        weighting: loss weights of timesteps.
        schedule: update → factor of the learning rate.
        context_noise: largest standard deviation of the noise on the clean context of teacher forcing, which stands
            for the errors of a stream's own context; each sample's is uniform below it.
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
        schedule: Schedule,
        context_noise: float = 0.0,
    ):
        super().__init__()
        self.net, self.pattern, self.timesteps, self.dropout = model, pattern, timesteps, dropout
        self.optimizer, self.region_weights = optimizer, region_weights
        self.weighting, self.schedule, self.context_noise = weighting, schedule, context_noise

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self._loss(batch, self.dropout(batch.conditioning, sample_globally(torch.rand, batch.shard)))
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
        eps = noise_like(x0, batch.shard)
        v = self.pattern.velocity(self.net, path.noised(x0, eps, t), t, cond, self._context(batch))
        weight = self.region_weights(batch.regions, self.weighting.of_velocity(t))
        return losses.flow_matching(v, x0, eps, weight)

    def _context(self, batch: Batch) -> Latents:
        x0 = batch.latents
        if not self.context_noise:
            return x0
        deviation = self.context_noise * sample_globally(torch.rand, batch.shard)(len(x0), 1, device=x0.device)
        return x0 + path.per_latent(deviation) * noise_like(x0, batch.shard)

    def configure_model(self) -> None:
        shard_networks(self)

    def configure_optimizers(self):
        return with_schedule(self.optimizer(trainable_parameters(self.net)), self.schedule)
