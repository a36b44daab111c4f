"""Batches of puppet latents, of several lengths, drawn from clips that are encoded once."""

from pathlib import Path

import lightning
import numpy as np
import torch
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from avatar.data.bucketing import LengthBuckets
from avatar.data.encoded import ClipSet, EncodedClips, encoded_clips
from avatar.data.worlds import World
from avatar.types import AudioEncoder, Batch, TextEncoder, VideoAutoencoder


class LatentBatches(Dataset):
    """Batch i is a function of (seed, i) alone: its length, its clips, and where they are cropped."""

    def __init__(
        self, clips: EncodedClips, buckets: LengthBuckets, audio: AudioEncoder, seed: int, start: int, stop: int
    ):
        self.clips, self.buckets, self.audio = clips, buckets, audio
        self.seed, self.start, self.stop = seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([self.seed, self.start + index])
        length, count = self.buckets.draw(rng)
        latents = self.clips.latents.shape[2]
        which = torch.from_numpy(rng.integers(len(self.clips), size=count))
        start = torch.from_numpy(rng.integers(latents - length + 1, size=count))
        return self.clips.batch(which, start, length, self.audio)


class PuppetLatents(lightning.LightningDataModule):
    """Training and validation batches of the puppet world, on an autoencoder's latents.

    Args:
        train, dev: the clips to encode.
        steps: batches of one run.
        cache: folder for synthesised speech and encoded clips.
    """

    def __init__(
        self,
        world: World,
        autoencoder: VideoAutoencoder,
        audio: AudioEncoder,
        text: TextEncoder,
        train: ClipSet,
        dev: ClipSet,
        buckets: LengthBuckets,
        steps: int,
        seed: int,
        workers: int,
        cache: str,
    ):
        super().__init__()
        self.world, self.autoencoder, self.audio, self.text = world, autoencoder.eval(), audio, text
        self.sets = {"train": train, "dev": dev}
        for name, clips in self.sets.items():
            if (longest := max(buckets.lengths)) > clips.latents:
                raise ValueError(
                    f"crops of {longest} latents from {name} clips of {clips.latents}; make these longer, or the "
                    "lengths of the buckets shorter"
                )
        self.buckets, self.steps, self.seed, self.workers, self.cache = buckets, steps, seed, workers, Path(cache)
        self.start = 0  # where a resumed run goes on

    def setup(self, stage: str) -> None:
        self.clips = {name: self._encoded(clips) for name, clips in self.sets.items()}

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.seed, self.start, self.start + self.steps)

    def val_dataloader(self) -> DataLoader:
        return self._loader("dev", 0, 0, 4)

    def _loader(self, name: str, seed: int, start: int, stop: int) -> DataLoader:
        batches = LatentBatches(self.clips[name], self.buckets, self.audio, seed, start, stop)
        return DataLoader(batches, batch_size=None)

    def _encoded(self, clips: ClipSet) -> EncodedClips:
        return encoded_clips(
            clips,
            self.world,
            self.autoencoder,
            self.audio,
            self.text,
            self.cache,
            self.workers,
            lambda loader: track(loader, f"encoding {clips.count} {clips.split} clips"),
        )
