"""Decoder distillation: a small decoder regresses the frames of a large one (as TAEHV, github.com/madebyollin/taehv).

The large autoencoder is frozen; its frames of the same latents are the target. As in `autoencoder`, clips are
decoded after the latent of another frame, and a little noise is added to the latents of the small decoder.
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
from avatar.objectives.autoencoder import START_BATCHES, after_references, perturbed, psnr
from avatar.objectives.optim import Schedule, trainable_parameters, with_schedule
from avatar.objectives.weighting import RegionWeights
from avatar.types import Frames, Latents, Pixels


class DecoderDistillation(lightning.LightningModule):
    """Reconstruction of the teacher's frames, with loss weights of image regions.

    Args:
        autoencoder: the small decoder, with the teacher's encoder.
        teacher: the large autoencoder, frozen.
        optimizer: parameters → optimiser.
        noise: largest standard deviation of the noise on the latents of the small decoder, as in `autoencoder`.
        region_weights: loss weights of image regions.
        schedule: update → factor of the learning rate.

    Raises:
        UserError: the small decoder was built for the latents of another autoencoder.
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
        expected, got = bundle.origin_of(autoencoder).fingerprint, bundle.origin_of(teacher).fingerprint
        if expected != got:
            raise UserError(f"got teacher {got}; expected autoencoder {expected}, whose latents the decoder is for")
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
        video = self.net.decode(perturbed(latents, self.noise))
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
        latents = after_references(self.net, batch)
        return latents, self.teacher.decode(latents)
