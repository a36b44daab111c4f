"""Sample videos during training: generated for held-out clips, saved as MP4 files and logged to Weights & Biases."""

from pathlib import Path
from typing import Any

import lightning
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

from avatar.diffusion.generation import ClipSampler
from avatar.media.mp4_writer import Mp4Writer
from avatar.models.hub import on
from avatar.types import SAMPLES_PER_FRAME


class VideoLog(lightning.Callback):
    """Generates the first clips of the dev set side by side, always from the same noise.

    Args:
        sampler: the sampler.
        folder: where the MP4 files are written, each named by the number of batches.
        every: batches between two videos; one more follows at the end of the run.
        clips: number of clips, side by side.
    """

    def __init__(self, sampler: ClipSampler, folder: str, every: int, clips: int):
        self.sampler, self.folder, self.every, self.clips = sampler, Path(folder), every, clips
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.batches, remaining = divmod(index + 1, trainer.datamodule.accumulate)
        if not remaining and self.batches % self.every == 0:
            self._show(trainer, module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if self.batches % self.every and not trainer.interrupted:
            self._show(trainer, module)

    @torch.no_grad()
    def _show(self, trainer: Any, module: Any) -> None:
        data = trainer.datamodule
        batch = data.held_out(self.clips, module.device)
        cond = batch.conditioning
        was_training = module.net.training
        latents = self.sampler(module.net.eval(), cond, tuple(range(len(batch.keys))))
        module.net.train(was_training)
        if not trainer.is_global_zero:
            return  # the other ranks only take part in generation, for sharded networks
        # One call per clip with the reference first, since not every decoder streams; clip by clip to save memory.
        autoencoder = on(module.device, data.autoencoder)
        timeline = torch.cat([cond.reference, latents], dim=2)
        video = [autoencoder.decode(clip)[0, :, 1:].cpu() for clip in timeline.split(1)]
        frames = data.to_images(torch.cat(video, dim=-1) if video[0].shape[-1] > 1 else video[0])
        path = self.folder / f"{self.batches:06d}.mp4"
        # A run resumed from an earlier batch writes the same video again.
        with Mp4Writer(path, frames.shape[1:3], overwrite=True) as writer:
            writer.write(frames, torch.zeros(len(frames) * SAMPLES_PER_FRAME).numpy())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.log({"samples": wandb.Video(str(path), format="mp4")})
