"""Batches of puppet latents, of several lengths, drawn from clips that are encoded once."""

from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avatar.conditioning import image_to_video
from avatar.data.batch_schedule import EVENLY, ON_CHANGE, Placement, changes, place
from avatar.data.bucketing import BatchShard, LengthBuckets, check_ranks
from avatar.data.encoded_clips import ClipSet, EncodedClips, encode_clips
from avatar.errors import UserError
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.puppet.worlds import World
from avatar.types import REGIONS, Batch

GLOBAL_BATCHES = BatchShard()


class LatentBatches(Dataset):
    """Batch i is a function of (seed, i) alone: its length, its clips, and where they are cropped; of it, a share."""

    def __init__(
        self,
        clips: EncodedClips,
        buckets: LengthBuckets,
        audio: AudioEncoder,
        text: TextEncoder,
        seed: int,
        start: int,
        stop: int,
        placement: Placement = EVENLY,
        share: BatchShard = GLOBAL_BATCHES,
    ):
        self.clips, self.buckets, self.audio, self.text = clips, buckets, audio, text
        self.seed, self.start, self.stop = seed, start, stop
        self.placement, self.share = placement, share
        self.changes = [changes(states) for states in clips.labels[:, 0].numpy()]
        self.changing = np.flatnonzero([len(at) for at in self.changes])

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch:
        step, part = self.share.locate(self.start + index)
        rng = np.random.default_rng([self.seed, step])
        length, count = self.buckets.draw(rng)
        latents = self.clips.latents.shape[2]
        which = rng.integers(len(self.clips), size=count)
        start = rng.integers(latents - length + 1, size=count)
        for n, kind in enumerate(self.placement.kinds(rng, length, count)):
            if kind == ON_CHANGE and len(self.changing):
                which[n] = rng.choice(self.changing)
            start[n] = place(int(kind), rng, length, latents, self.changes[which[n]], int(start[n]))
        which, start = (torch.from_numpy(drawn[part]) for drawn in (which, start))
        return replace(self.clips.batch(which, start, length, self.audio, self.text), shard=part)


class PuppetLatents(lightning.LightningDataModule):
    """Training and validation batches of the puppet world, on an autoencoder's latents.

    Args:
        train, dev: the clips to encode.
        steps: batches of one run, each made in `buckets.accumulate` passes.
        image: the image encoder of image-to-video networks, for others None.
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
        image: ImageEncoder | None = None,
    ):
        super().__init__()
        self.world, self.autoencoder, self.audio, self.text = world, autoencoder.eval(), audio, text
        self.image = image
        self.sets = {"train": train, "dev": dev}
        for name, clips in self.sets.items():
            if (longest := max(buckets.lengths)) > clips.latents:
                raise UserError(
                    f"crops of {longest} latents from {name} clips of {clips.latents}; make these longer, or the "
                    "lengths of the buckets shorter"
                )
        self.buckets, self.steps, self.seed, self.workers, self.cache = buckets, steps, seed, workers, Path(cache)
        self.placement = placement
        self.start = 0  # the pass that a resumed run goes on with

    def check(self, ranks: int) -> None:
        """Raise UserError for what can't be trained on by so many ranks, before anything is encoded."""
        check_ranks(self.buckets, ranks, min(clips.count for clips in self.sets.values()))

    def prepare_data(self) -> None:
        """Encode what isn't yet, on one rank of each node."""
        for clips in self.sets.values():
            self._encoded(clips)

    def setup(self, stage: str) -> None:
        self.clips = {name: self._encoded(clips) for name, clips in self.sets.items()}

    def sizes(self) -> set[tuple[int, int]]:
        """Height and width of its latents."""
        height, width = self.world.shape
        return {(height // self.autoencoder.spatial_stride, width // self.autoencoder.spatial_stride)}

    def describe_batch(self, ranks: int) -> str:
        """What an update learns from."""
        return self.buckets.describe_batch(ranks)

    @property
    def regions(self) -> frozenset[str]:
        """Those of REGIONS that training clips have masks of."""
        return frozenset(REGIONS)

    @property
    def accumulate(self) -> int:
        """Passes per batch."""
        return self.buckets.accumulate

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.seed, self.start, self.steps * self.accumulate, self.accumulate)

    def val_dataloader(self) -> DataLoader:
        return self._loader("dev", 0, 0, 4, 1)

    def _loader(self, name: str, seed: int, start: int, passes: int, accumulate: int) -> DataLoader:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        share = BatchShard(rank, ranks, accumulate)
        batches = LatentBatches(
            self.clips[name], self.buckets, self.audio, self.text, seed, start, start + passes, self.placement, share
        )
        return DataLoader(batches, batch_size=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return replace(
            batch, conditioning=image_to_video.with_image_conditioning(batch.conditioning, self.autoencoder, self.image)
        )

    def held_out(self, clips: int, device: torch.device) -> Batch:
        """The first whole clips of the dev set, on this device."""
        dev = self.clips["dev"]
        which = torch.arange(min(clips, len(dev)))
        batch = dev.batch(which, torch.zeros_like(which), dev.latents.shape[2], self.audio, self.text)
        return self.on_after_batch_transfer(self.transfer_batch_to_device(batch, device, 0), 0)

    def to_pictures(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        """Decoded frames to look at."""
        return self.world.pictures(video)

    def _encoded(self, clips: ClipSet) -> EncodedClips:
        return encode_clips(
            clips,
            self.world,
            self.autoencoder,
            self.audio,
            self.text,
            self.cache,
            self.workers,
            lambda loader: track(loader, f"encoding {clips.count} {clips.split} clips"),
        )
