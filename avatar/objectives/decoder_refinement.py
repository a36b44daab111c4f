"""Decoder refinement: the decoder learns to draw true frames from the latents that a diffusion model estimates.

Errors of a diffusion model are neither white nor independent of the content. Here true latents are noised, the teacher
estimates them in one step, and the decoder regresses the true frames. The encoder is frozen, so the latents and their
fingerprint stay the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer

from avatar.diffusion import path
from avatar.diffusion.packing import AttentionPattern, TimestepSampler
from avatar.errors import UserError
from avatar.models import bundle
from avatar.models.autoencoders.streamed import StreamedAutoencoder
from avatar.models.video_dit import VideoDiT
from avatar.objectives import losses
from avatar.objectives.autoencoder import psnr
from avatar.objectives.optim import Schedule, trainable_parameters, with_schedule
from avatar.objectives.weighting import RegionWeights
from avatar.types import Batch, Latents, Pixels


class DecoderRefinement(lightning.LightningModule):
    """Reconstruction of true frames from one-step estimates of their latents.

    Args:
        autoencoder: the trained autoencoder; only its decoder is trained.
        teacher: the diffusion model, frozen.
        pattern: its attention pattern.
        timesteps: distribution of t.
        optimizer: parameters → optimiser.
        region_weights: loss weights of image regions.
        schedule: update → factor of the learning rate.

    Raises:
        UserError: an autoencoder that is not trained, or latents of another one.
    """

    def __init__(
        self,
        autoencoder: StreamedAutoencoder,
        teacher: VideoDiT,
        pattern: AttentionPattern,
        timesteps: TimestepSampler,
        optimizer: Callable[[Iterable], Optimizer],
        region_weights: RegionWeights,
        schedule: Schedule,
    ):
        super().__init__()
        origin = bundle.origin_of(autoencoder)
        if origin.kind != "autoencoder":
            raise UserError(
                f"got an autoencoder of kind {origin.kind!r}; expected a trained one: load it from a bundle"
            )
        bundle.check_latents(teacher, autoencoder)
        # The bundle of the refined decoder belongs to the latents of the first autoencoder.
        autoencoder.origin = replace(origin, components={"autoencoder": origin.fingerprint})
        self.net, self.teacher = autoencoder.requires_grad_(False), teacher.requires_grad_(False).eval()
        for part in autoencoder.decoder_parts:
            autoencoder.get_submodule(part).requires_grad_(True)
        self.pattern, self.timesteps = pattern, timesteps
        self.optimizer, self.region_weights, self.schedule = optimizer, region_weights, schedule

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self._loss(batch, self._estimates(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(index)
            estimates = self._estimates(batch)
        video = _frames_of(batch)[0]
        for name, latents in (("estimates", estimates), ("true_latents", batch.latents)):
            self.log(f"val/psnr_{name}", psnr(self._decode(batch, latents), video), prog_bar=True, batch_size=1)

    def configure_optimizers(self):
        return with_schedule(self.optimizer(trainable_parameters(self.net)), self.schedule)

    @torch.no_grad()
    def _estimates(self, batch: Batch) -> Latents:
        """The teacher's estimates of the true latents, from one noisy copy of each clip."""
        x0, cond = batch.latents, batch.conditioning
        t = self.pattern.times(self.timesteps, x0)
        x_t = path.noised(x0, torch.randn_like(x0), t)
        return path.clean(x_t, self.pattern.velocity(self.teacher, x_t, t, cond, x0), t)

    def _decode(self, batch: Batch, latents: Latents) -> Pixels:
        """Frames of the latents, decoded after the reference, as in a stream."""
        return self.net.decode(torch.cat([batch.conditioning.reference, latents], dim=2))[:, :, 1:]

    def _loss(self, batch: Batch, latents: Latents) -> Tensor:
        video, regions = _frames_of(batch)
        return losses.reconstruction(self._decode(batch, latents), video, self.region_weights(regions))


def _frames_of(batch: Batch) -> tuple[Pixels, Tensor]:
    """The frames of a batch and their regions. Raises UserError if it has none."""
    if batch.video is None or batch.video_regions is None:
        raise UserError("got batches without frames; expected those of puppets with data.video=true: set it")
    return batch.video, batch.video_regions
