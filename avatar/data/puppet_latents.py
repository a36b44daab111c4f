"""Batches of puppet latents, of several lengths, drawn from clips that are encoded once."""

from pathlib import Path

import lightning
import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avatar.data.bucketing import LengthBuckets, check_ranks
from avatar.data.encoded import ClipSet, EncodedClips, encoded_clips
from avatar.data.sampling import EVENLY, ON_CHANGE, Placement, changes, place
from avatar.data.worlds import World
from avatar.types import AudioEncoder, Batch, TextEncoder, VideoAutoencoder


class LatentBatches(Dataset):
    """Batch i is a function of (seed, i) alone: its length, its clips, and where they are cropped; or a rank's part."""

    def __init__(
        self,
        clips: EncodedClips,
        buckets: LengthBuckets,
        audio: AudioEncoder,
        seed: int,
        start: int,
        stop: int,
        placement: Placement = EVENLY,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.clips, self.buckets, self.audio = clips, buckets, audio
        self.seed, self.start, self.stop = seed, start, stop
        self.placement, self.part = placement, slice(rank, None, ranks)
        self.changes = [changes(states) for states in clips.labels[:, 0].numpy()]
        self.changing = np.flatnonzero([len(at) for at in self.changes])

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([self.seed, self.start + index])
        length, count = self.buckets.draw(rng)
        latents = self.clips.latents.shape[2]
        which = rng.integers(len(self.clips), size=count)
        start = rng.integers(latents - length + 1, size=count)
        for n, kind in enumerate(self.placement.kinds(rng, length, count)):
            if kind == ON_CHANGE and len(self.changing):
                which[n] = rng.choice(self.changing)
            start[n] = place(int(kind), rng, length, latents, self.changes[which[n]], int(start[n]))
        which, start = (torch.from_numpy(drawn[self.part]) for drawn in (which, start))
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
        placement: Placement = EVENLY,
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
        self.placement = placement
        self.start = 0  # where a resumed run goes on

    def setup(self, stage: str) -> None:
        check_ranks(self.buckets, self.trainer.world_size if self.trainer else 1)
        self.clips = {name: self._encoded(clips) for name, clips in self.sets.items()}

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.seed, self.start, self.start + self.steps)

    def val_dataloader(self) -> DataLoader:
        return self._loader("dev", 0, 0, 4)

    def _loader(self, name: str, seed: int, start: int, stop: int) -> DataLoader:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = LatentBatches(
            self.clips[name], self.buckets, self.audio, seed, start, stop, self.placement, rank, ranks
        )
        return DataLoader(batches, batch_size=None)

    def held_out(self, clips: int) -> Batch:
        """The first whole clips of the dev set."""
        dev = self.clips["dev"]
        which = torch.arange(min(clips, len(dev)))
        return dev.batch(which, torch.zeros_like(which), dev.latents.shape[2], self.audio)

    def to_pictures(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        """Decoded frames to look at."""
        return self.world.pictures(video)

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
