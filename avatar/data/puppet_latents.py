"""Training on latents of the puppet world: batches of several lengths from clips that are encoded once."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from avatar.data.batch_schedule import ON_CHANGE, UNIFORM, Placement, changes, place
from avatar.data.bucketing import BatchShard, LengthBuckets, check_ranks
from avatar.data.clip_encoding import ClipSet, encode_clips, frames_beyond
from avatar.data.encoded_clips import EncodedClips
from avatar.data.latent_data import LatentDataModule
from avatar.errors import UserError
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.puppet.worlds import World
from avatar.types import REGIONS, Batch

GLOBAL_BATCHES = BatchShard()


class LatentBatches(Dataset):
    """Micro-batches of crops. Batch i depends only on (seed, i): its length, its clips, and the starts of its crops."""

    def __init__(
        self,
        clips: EncodedClips,
        buckets: LengthBuckets,
        audio: AudioEncoder,
        text: TextEncoder,
        seed: int,
        start: int,
        stop: int,
        placement: Placement = UNIFORM,
        shard: BatchShard = GLOBAL_BATCHES,
        swapped: float = 0.0,
        frames: "CropFrames | None" = None,
    ):
        self.swapped, self.frames = swapped, frames
        self.clips, self.buckets, self.audio, self.text = clips, buckets, audio, text
        self.seed, self.start, self.stop = seed, start, stop
        self.placement, self.shard = placement, shard
        self.changes = [changes(labels) for labels in clips.labels.numpy()]
        self.changing = np.flatnonzero([len(at) for at in self.changes])

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch:
        step, part = self.shard.locate(self.start + index)
        rng = np.random.default_rng([self.seed, step])
        length, count = self.buckets.draw(rng)
        latents = self.clips.latents.shape[2]
        which = rng.integers(len(self.clips), size=count)
        start = rng.integers(latents - length + 1, size=count)
        for n, kind in enumerate(self.placement.kinds(rng, length, count)):
            if kind == ON_CHANGE and len(self.changing):
                which[n] = rng.choice(self.changing)
            start[n] = place(int(kind), rng, length, latents, self.changes[which[n]], int(start[n]))
        swapped = rng.random(count) < self.swapped if self.swapped else np.zeros(count, bool)
        which, start, swapped = (torch.from_numpy(numbers[part]) for numbers in (which, start, swapped))
        batch = replace(self.clips.batch(which, start, length, self.audio, self.text, swapped), shard=part)
        return batch if self.frames is None else self.frames.added(batch, which, start, length)


@dataclass(frozen=True)
class CropFrames:
    """The frames of crops, rendered again.

    Args:
        clips: the set that the crops are from.
        world: renders the clips.
        frames: length of the clips when they were encoded, which is a part of their seed.
        stride: frames per latent.
        speech_cache: folder of synthesised speech.
    """

    clips: ClipSet
    world: World
    frames: int
    stride: int
    speech_cache: Path

    def added(self, batch: Batch, which: Int[Tensor, " b"], start: Int[Tensor, " b"], length: int) -> Batch:
        """The batch with the frames of its crops and their regions."""
        rows = [self._rendered(*crop, length) for crop in zip(which.tolist(), start.tolist(), strict=True)]
        video, regions = zip(*rows, strict=True)
        return replace(batch, video=torch.stack(video), video_regions=torch.stack(regions))

    def _rendered(self, which: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        clip = self.clips.make(which, self.frames, self.speech_cache)
        first = 1 + self.stride * start  # the first frame of a clip has a latent of its own, which is dropped
        part = first, first + self.stride * length
        return self.world.video(clip, *part), self.world.regions(clip, *part)


class PuppetLatents(LatentDataModule):
    """Data module of the puppet world, on an autoencoder's latents.

        python train.py data.train.count=500 scene=full

    Args:
        world: renders the clips.
        train, dev: the clips to encode.
        cache: folder of synthesised speech and encoded clips.
        swapped_references: share of training crops whose reference shows another emotion, so that it does not reveal
            the label.
        workers: processes that render clips to encode.
        video: whether batches contain their frames, for objectives of pixels.
        The other arguments are those of `LatentDataModule`.

    Raises:
        UserError: clips that are shorter than crops, or a share outside of [0, 1].
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
        placement: Placement = UNIFORM,
        image: ImageEncoder | None = None,
        swapped_references: float = 0.0,
        video: bool = False,
    ):
        super().__init__(autoencoder, audio, text, image, buckets, placement, steps, seed, loader_workers=int(video))
        self.sets = {"train": train, "dev": dev}
        for name, clips in self.sets.items():
            if (longest := max(buckets.lengths)) > clips.latents:
                raise UserError(
                    f"got crops of {longest} latents; expected at most {clips.latents}, the length of the {name} "
                    "clips: lengthen them, or shorten buckets.lengths"
                )
        if not 0 <= swapped_references <= 1:
            raise UserError(f"got data.swapped_references={swapped_references}; expected a share in [0, 1]")
        self.world, self.workers, self.cache = world, workers, Path(cache)
        self.swapped_references, self.video = swapped_references, video

    def check(self, ranks: int) -> None:
        """Raise UserError for data that can't be trained on with this number of ranks, before anything is encoded."""
        check_ranks(self.buckets, ranks, min(clips.count for clips in self.sets.values()))

    def prepare_data(self) -> None:
        """Encode clips that are not in the cache, on one rank of each node."""
        for clips in self.sets.values():
            self._encode(clips)

    def setup(self, stage: str) -> None:
        self.clips = {name: self._encode(clips) for name, clips in self.sets.items()}

    def sizes(self) -> set[tuple[int, int]]:
        """Heights and widths of its latents."""
        height, width = self.world.shape
        return {(height // self.autoencoder.spatial_stride, width // self.autoencoder.spatial_stride)}

    def describe_batch(self, ranks: int) -> str:
        """The size of the global batch, in words."""
        return self.buckets.describe_batch(ranks)

    @property
    def regions(self) -> frozenset[str]:
        """Those of REGIONS for which training clips have masks."""
        return frozenset(REGIONS)

    def batches(self, split: str, seed: int, start: int, stop: int, shard: BatchShard) -> LatentBatches:
        return LatentBatches(
            self.clips[split],
            self.buckets,
            self.audio,
            self.text,
            seed,
            start,
            stop,
            self.placement,
            shard,
            self.swapped_references if split == "train" else 0.0,
            self._frames(self.sets[split]) if self.video else None,
        )

    def first_clips(self, count: int) -> Batch:
        dev = self.clips["dev"]
        which = torch.arange(min(count, len(dev)))
        return dev.batch(which, torch.zeros_like(which), dev.latents.shape[2], self.audio, self.text)

    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        return self.world.to_images(video)

    def _frames(self, clips: ClipSet) -> CropFrames:
        stride = self.autoencoder.temporal_stride
        frames = 1 + stride * clips.latents
        length = frames + frames_beyond(self.audio, frames - 1)
        return CropFrames(clips, self.world, length, stride, self.cache / "speech")

    def _encode(self, clips: ClipSet) -> EncodedClips:
        return encode_clips(clips, self.world, self.autoencoder, self.audio, self.text, self.cache, self.workers)
