"""Base of the data modules of latents: loaders of several lengths, image-to-video conditioning, held-out clips."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avatar.conditioning import image_to_video
from avatar.data.batch_schedule import Placement
from avatar.data.bucketing import BatchShard, LengthBuckets
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.types import Batch

VALIDATION_BATCHES = 4


class LatentDataModule(lightning.LightningDataModule, ABC):
    """Training and validation batches of latents; subclasses provide the clips.

    Args:
        autoencoder, audio, text: encoders of the clips.
        image: image encoder of image-to-video networks; None for others.
        buckets: lengths and sizes of batches.
        placement: of crops in their clips.
        steps: batches of a run, each of `buckets.accumulate` micro-batches.
        seed: of the training batches.
        loader_workers: processes that load training batches.
    """

    def __init__(
        self,
        autoencoder: VideoAutoencoder,
        audio: AudioEncoder,
        text: TextEncoder,
        image: ImageEncoder | None,
        buckets: LengthBuckets,
        placement: Placement,
        steps: int,
        seed: int,
        loader_workers: int,
    ):
        super().__init__()
        self.autoencoder, self.audio, self.text, self.image = autoencoder.eval(), audio, text, image
        self.buckets, self.placement = buckets, placement
        self.steps, self.seed, self.loader_workers = steps, seed, loader_workers
        self.start = 0  # the micro-batch with which a resumed run continues

    @abstractmethod
    def batches(self, split: str, seed: int, start: int, stop: int, shard: BatchShard) -> Dataset:
        """Micro-batches `start` to `stop` of a split, "train" or "dev", for one rank."""

    @abstractmethod
    def first_clips(self, count: int) -> Any:
        """The first `count` clips of the dev split, of one size, as a batch in memory."""

    @abstractmethod
    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        """Decoded frames as RGB images."""

    @property
    def accumulate(self) -> int:
        """Micro-batches per batch."""
        return self.buckets.accumulate

    def train_dataloader(self) -> DataLoader:
        stop = self.start + self.steps * self.accumulate
        batches = self.batches("train", self.seed, self.start, stop, self._shard(self.accumulate))
        return DataLoader(batches, batch_size=None, num_workers=self.loader_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.batches("dev", 0, 0, VALIDATION_BATCHES, self._shard(1)), batch_size=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return replace(
            batch, conditioning=image_to_video.with_image_conditioning(batch.conditioning, self.autoencoder, self.image)
        )

    def held_out(self, clips: int, device: torch.device) -> Batch:
        """The first clips of the dev split, encoded, on a device."""
        batch = self.transfer_batch_to_device(self.first_clips(clips), device, 0)
        return self.on_after_batch_transfer(batch, 0)

    def _shard(self, accumulate: int) -> BatchShard:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BatchShard(rank, ranks, accumulate)
