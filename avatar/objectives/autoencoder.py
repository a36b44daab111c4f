"""Training of a video autoencoder.

Clips are decoded after the latent of *another* frame of their puppet: a stream's decoder is primed with the reference,
and the clip does not continue it. Noise is added to the latents, so that the decoder tolerates the errors of a
diffusion model, neighbouring latents decode to similar images, and the encoder gives more power to what is visible.
"""

import itertools
from collections.abc import Callable, Iterable

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer

from avatar.models import bundle
from avatar.models.autoencoders.causal_conv import CausalConvAutoencoder
from avatar.objectives import losses
from avatar.objectives.optim import Schedule, trainable_parameters, with_schedule
from avatar.objectives.weighting import RegionWeights
from avatar.protocols import VideoAutoencoder
from avatar.types import REGIONS, Frames, Latents, Pixels

START_BATCHES = 5  # their principal components initialise the autoencoder


class AutoencoderTraining(lightning.LightningModule):
    """Reconstruction objective, with loss weights of image regions.

    Args:
        autoencoder: the network to train, new or loaded from a bundle.
        optimizer: parameters → optimiser.
        noise: largest standard deviation of the noise on the normalised latents; each sample's is uniform below it.
        region_weights: loss weights of image regions.
        schedule: update → factor of the learning rate.
    """

    def __init__(
        self,
        autoencoder: CausalConvAutoencoder,
        optimizer: Callable[[Iterable], Optimizer],
        noise: float,
        region_weights: RegionWeights,
        schedule: Schedule,
    ):
        super().__init__()
        self.net, self.optimizer = autoencoder, optimizer
        self.noise, self.region_weights, self.schedule = noise, region_weights, schedule

    def on_train_start(self) -> None:
        self.net.train()  # a loaded one is in eval mode, in which its statistics would not follow its encoder
        if self.trainer.global_step == 0 and bundle.origin_of(self.net).kind == "new":
            batches = itertools.islice(iter(self.trainer.datamodule.train_dataloader()), START_BATCHES)  # pyright: ignore
            self.net.start_from(torch.cat([batch.video for batch in batches]).to(self.device))

    def training_step(self, batch: Frames, index: int) -> torch.Tensor:
        target = torch.cat([batch.reference, batch.video[:, :, 1:]], dim=2)
        video = self.net.decode(perturbed(after_references(self.net, batch), self.noise))
        loss = losses.reconstruction(video, target, self.region_weights(batch.regions))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Frames, index: int) -> None:
        video = self.net.decode(self.net.encode(batch.video))
        self.log("val/psnr", psnr(video, batch.video), prog_bar=True, batch_size=1)
        for name, mask in zip(REGIONS, batch.regions.split(1, dim=1), strict=True):
            self.log(f"val/psnr_{name}", psnr(video, batch.video, mask / mask.mean()), prog_bar=True, batch_size=1)

    def configure_optimizers(self):
        return with_schedule(self.optimizer(trainable_parameters(self.net)), self.schedule)


def after_references(net: VideoAutoencoder, batch: Frames) -> Latents:
    """Latents of clips, with the reference's latent in place of the first one."""
    return torch.cat([net.encode(batch.reference), net.encode(batch.video)[:, :, 1:]], dim=2)


def perturbed(latents: Latents, noise: float) -> Latents:
    """Latents plus noise, with a standard deviation per sample that is uniform in [0, noise).

    The first latent, the reference of a stream, stays as it is: no model generates it.
    """
    deviation = noise * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device, dtype=latents.dtype)
    later = latents[:, :, 1:]
    return torch.cat([latents[:, :, :1], later + deviation * torch.randn_like(later)], dim=2)


def psnr(video: Pixels, target: Pixels, weight: Tensor | float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of frames in [-1, 1], in dB, with pixel weights of mean 1."""
    return 10 * torch.log10(4 / (weight * (video - target).square()).mean())
