"""A small decoder learns to draw what a large one draws (TAEHV's idea, github.com/madebyollin/taehv).

The large autoencoder is frozen. Its frames of the same latents are the target, so that any latents will do; as in
`autoencoder`, half of the clips are decoded behind the latent of another frame, and the small decoder sees its latents
with a little noise upon them.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer

from avatar.errors import UserError
from avatar.models import bundle
from avatar.models.autoencoders.distilled import DistilledAutoencoder
from avatar.objectives import losses
from avatar.objectives.autoencoder import START_BATCHES, behind_references, psnr
from avatar.objectives.optim import Schedule, trainable_parameters, with_schedule
from avatar.objectives.weighting import RegionWeights
from avatar.types import Frames, Latents, Pixels


class DecoderDistillation(lightning.LightningModule):
    """Reconstruction of the teacher's frames, with more weight on regions of the picture.

    Args:
        autoencoder: the small decoder, with the teacher's encoder.
        teacher: the whole autoencoder.
        noise: standard deviation of what is added to the normalised latents that the small decoder sees.
        region_weights: on regions of the picture.
        optimizer: parameters → optimiser.
    """

    def __init__(
        self,
        autoencoder: DistilledAutoencoder,
        teacher: Any,
        optimizer: Callable[[Iterable], Optimizer],
        noise: float,
        region_weights: RegionWeights,
        schedule: Schedule,
    ):
        super().__init__()
        wanted, got = bundle.origin_of(autoencoder).fingerprint, bundle.origin_of(teacher).fingerprint
        if wanted != got:
            raise UserError(f"a decoder for latents of autoencoder {wanted} with teacher {got}; make it for this one")
        self.net, self.teacher = autoencoder, teacher.requires_grad_(False).eval()
        self.optimizer = optimizer
        self.noise, self.region_weights, self.schedule = noise, region_weights, schedule

    @torch.no_grad()
    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            batches = itertools.islice(iter(self.trainer.datamodule.train_dataloader()), START_BATCHES)  # pyright: ignore
            latents = [self.net.encode(batch.video.to(self.device)) for batch in batches]
            self.net.start_from(torch.cat(latents), torch.cat([self.teacher.decode(z) for z in latents]))

    def training_step(self, batch: Frames, index: int) -> Tensor:
        latents, target = self._example(batch)
        video = self.net.decode(latents + self.noise * torch.randn_like(latents))
        loss = losses.reconstruction(video, target, self.region_weights(batch.regions))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Frames, index: int) -> None:
        latents = self.net.encode(batch.video)
        video = self.net.decode(latents)
        for name, target in (("val/psnr", batch.video), ("val/psnr_teacher", self.teacher.decode(latents))):
            self.log(name, psnr(video, target), prog_bar=True, batch_size=1)

    def configure_optimizers(self):
        return with_schedule(self.optimizer(trainable_parameters(self.net)), self.schedule)

    @torch.no_grad()
    def _example(self, batch: Frames) -> tuple[Latents, Pixels]:
        latents = behind_references(self.net, batch)
        return latents, self.teacher.decode(latents)
