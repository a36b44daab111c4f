"""Sample videos while training: what the network makes of held-out clips, as mp4 files and in the loggers that take
them."""

from pathlib import Path
from typing import Any

import lightning
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

from avatar.diffusion.generation import Generator
from avatar.streaming.writer import Mp4Writer
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

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.batches += 1
        if self.batches % self.every == 0:
            self._show(trainer, module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if self.batches % self.every and not trainer.interrupted:
            self._show(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]

    @torch.no_grad()
    def _show(self, trainer: Any, module: Any) -> None:
        data = trainer.datamodule
        batch = data.held_out(self.clips)
        cond = batch.conditioning.map(lambda x: x.to(module.device))
        was_training = module.net.training
        latents = self.generator(module.net.eval(), cond, tuple(range(len(batch.keys))))
        module.net.train(was_training)
        decoder, device = data.autoencoder.decoder_stream(), batch.latents.device  # where the autoencoder is
        decoder.push(batch.conditioning.reference)
        video = decoder.push(latents.to(device)).cpu()
        frames = data.to_pictures(torch.cat(list(video), dim=-1) if video.shape[-1] > 1 else video[0])
        path = self.folder / f"{self.batches:06d}.mp4"
        # A run that was resumed from before this batch makes the same video again.
        with Mp4Writer(path, frames.shape[1:3], overwrite=True) as writer:
            writer.write(frames, torch.zeros(len(frames) * SAMPLES_PER_FRAME).numpy())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.log({"samples": wandb.Video(str(path), format="mp4")})
