"""Sample videos while training: what the network makes of held-out clips, as mp4 files and in the loggers that take
them."""

from pathlib import Path
from typing import Any

import lightning
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

from avatar.diffusion.generation import Generator
from avatar.media.mp4_writer import Mp4Writer
from avatar.models.hub import on
from avatar.types import SAMPLES_PER_FRAME


class VideoLog(lightning.Callback):
    """Every so many batches and at the end, the first clips of the dev set side by side, always with the same noise.

    Args:
        generator: how the network makes a clip.
        every: batches between two videos.
        clips: shown side by side.
    """

    def __init__(self, generator: Generator, folder: str, every: int, clips: int):
        self.generator, self.folder, self.every, self.clips = generator, Path(folder), every, clips
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.batches, more = divmod(index + 1, trainer.datamodule.accumulate)
        if not more and self.batches % self.every == 0:
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
        latents = self.generator(module.net.eval(), cond, tuple(range(len(batch.keys))))
        module.net.train(was_training)
        if not trainer.is_global_zero:
            return  # had a hand in it where the network is sharded
        # Behind the reference, as a whole, for not every decoder streams; and clip by clip, for frames are large.
        autoencoder = on(module.device, data.autoencoder)
        whole = torch.cat([cond.reference, latents], dim=2)
        video = [autoencoder.decode(clip)[0, :, 1:].cpu() for clip in whole.split(1)]
        frames = data.to_pictures(torch.cat(video, dim=-1) if video[0].shape[-1] > 1 else video[0])
        path = self.folder / f"{self.batches:06d}.mp4"
        # A run that was resumed from before this batch makes the same video again.
        with Mp4Writer(path, frames.shape[1:3], overwrite=True) as writer:
            writer.write(frames, torch.zeros(len(frames) * SAMPLES_PER_FRAME).numpy())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.log({"samples": wandb.Video(str(path), format="mp4")})
