"""Training on preprocessed sets: `python train.py data=shards data.urls=data/myset`.

The order of clips is that of `BatchSchedule`, a function of (seed, step). Each sample is read by its offset in its
shard, so that the numbers of workers and of shards are free; batches are global, and each rank reads its shard.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from avatar.data.batch_schedule import AT_START, BatchSchedule, Draw, Placement
from avatar.data.bucketing import BatchShard, LengthBuckets, check_ranks
from avatar.data.latent_data import LatentDataModule
from avatar.data.shard_batches import VideoBatch, collate, encode_batch
from avatar.data.shard_index import Entry, Filters, Index
from avatar.data.shard_reader import ON_ERROR, SampleReader, check_captions, check_shards, latent_metadata
from avatar.data.shard_samples import PICTURES, SampleDecoder
from avatar.errors import UserError
from avatar.media.frames import to_uint8
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.types import Batch

log = logging.getLogger(__name__)


class ShardBatches(Dataset):
    """Micro-batches of one rank; frames are encoded later, by the data module."""

    def __init__(self, reader: SampleReader, schedule: BatchSchedule, start: int, stop: int, shard: BatchShard):
        self.reader, self.schedule, self.start, self.stop, self.shard = reader, schedule, start, stop, shard

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch | VideoBatch:
        step, part = self.shard.locate(self.start + index)
        return replace(collate([self.reader.crop(draw) for draw in self.schedule.batch(step)[part]]), shard=part)


class ShardClips(LatentDataModule):
    """Data module of preprocessed sets, on an autoencoder's latents.

        python train.py data=shards data.urls=[data/a,data/b] "data.filters.bounds={motion: [0.01, null]}"

    Args:
        urls: folders of sets.
        train, dev: splits; validation and sample videos use `dev`.
        filters: of samples, by their scores.
        pictures: "latents", "video" (encoded during training), or None: latents if the sets have them.
        pause: pauses of up to this many frames keep the state "speaking"; None: no states from speech activity.
        history: latents before a crop that are encoded with it, for videos.
        region_weights: loss weights of the objective; boxes are read only of regions with a weight above 0.
        on_error: "raise" for unreadable samples, or "skip" them.
        workers: processes that load training batches.
        The other arguments are those of `LatentDataModule`.

    Raises:
        UserError: no sets, splits or samples, or latents of another autoencoder; all before the first step.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        train: str,
        dev: str,
        filters: Filters,
        pictures: str | None,
        autoencoder: VideoAutoencoder,
        audio: AudioEncoder,
        text: TextEncoder,
        pause: int | None,
        history: int,
        region_weights: Mapping[str, float],
        buckets: LengthBuckets,
        placement: Placement,
        on_error: str,
        steps: int,
        seed: int,
        workers: int,
        image: ImageEncoder | None = None,
    ):
        super().__init__(autoencoder, audio, text, image, buckets, placement, steps, seed, loader_workers=workers)
        if on_error not in ON_ERROR or pictures not in (None, *PICTURES):
            raise UserError(
                f"got on_error={on_error}, pictures={pictures}; expected on_error raise or skip, and pictures latents, "
                "video or null"
            )
        if history < 0 or (pause is not None and pause < 0):
            raise UserError(f"got history={history}, pause={pause}; expected numbers of latents and frames, 0 or more")
        self.urls, self.splits, self.filters, self.pictures = urls, {"train": train, "dev": dev}, filters, pictures
        self.pause, self.history, self.region_weights = pause, history, region_weights
        self.on_error, self.workers = on_error, workers
        self.readers: dict[str, SampleReader] = {}

    @cached_property
    def entries(self) -> dict[str, list[Entry]]:
        """The samples of both splits."""
        index = Index(self.urls)
        return {name: index.entries(name, self.filters) for name in dict.fromkeys(self.splits.values())}

    @cached_property
    def _all_entries(self) -> list[Entry]:
        return [entry for part in self.entries.values() for entry in part]

    @property
    def regions(self) -> frozenset[str]:
        """Those of REGIONS for which some training samples have masks."""
        return frozenset().union(*(entry.regions for entry in self.entries[self.splits["train"]]))

    def sizes(self) -> set[tuple[int, int]]:
        """Heights and widths of its latents."""
        stride = self.autoencoder.spatial_stride
        return {(entry.height // stride, entry.width // stride) for entry in self._all_entries}

    def check(self, ranks: int) -> None:
        """Raise UserError for sets that can't be trained on with this number of ranks; rank 0 checks captions."""
        check_ranks(self.buckets, ranks, len(self.entries[self.splits["train"]]))
        check_shards({entry.shard for entry in self._all_entries}, self.on_error)
        for name, part in self.entries.items():
            self._check_sizes(name, part)
        self.buckets.check_area(max(height * width for height, width in self.sizes()))
        if self.on_error == "raise" and not rank_zero_only.rank:
            check_captions(self._all_entries, self.text)  # else a caption could fail hours after the start

    def setup(self, stage: str) -> None:
        self.readers = {
            name: SampleReader(part, self._decoder, self.on_error, self.workers) for name, part in self.entries.items()
        }

    def batches(self, split: str, seed: int, start: int, stop: int, shard: BatchShard) -> ShardBatches:
        reader, steps = self.readers[self.splits[split]], math.ceil(stop / shard.accumulate)
        schedule = BatchSchedule(self._clip_sizes(reader.entries), self.buckets, self.placement, seed, steps)
        return ShardBatches(reader, schedule, start, stop, shard)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        if isinstance(batch, VideoBatch):
            self.autoencoder.to(batch.reference.device)
            batch = encode_batch(batch, self.autoencoder)
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def first_clips(self, count: int) -> Batch | VideoBatch:
        reader, length = self.readers[self.splits["dev"]], max(self.buckets.lengths)
        sizes = self._clip_sizes(reader.entries)
        long_enough = np.flatnonzero(sizes[:, 0] >= length)
        same_size = long_enough[(sizes[long_enough, 1:] == sizes[long_enough[0], 1:]).all(1)]
        draws = [Draw(int(sample), length, AT_START, (0, 0, int(sample), 1), same_size) for sample in same_size[:count]]
        return collate([reader.crop(draw) for draw in draws])

    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        return to_uint8(video)

    def teardown(self, stage: str) -> None:
        for reader in self.readers.values():
            if summary := reader.summary():
                log.warning("%s", summary)

    def describe_batch(self, ranks: int) -> str:
        """The size of the global batch, in words."""
        return self.buckets.describe_batch(ranks, {height * width for height, width in self.sizes()})

    def _clip_sizes(self, entries: Sequence[Entry]) -> Int[np.ndarray, "n 3"]:
        """The length, height and width of each sample, in latents."""
        return np.array([(self._decoder.latents(entry), *self._decoder.grid(entry)) for entry in entries])

    @cached_property
    def _decoder(self) -> SampleDecoder:
        """The decoder of all sets, which must have the same latents."""
        sets: dict[str, list[Entry]] = {}
        for entry in self._all_entries:
            sets.setdefault(entry.shard.url, []).append(entry)
        latent = {url: latent_metadata(part) for url, part in sets.items()}
        decoder = SampleDecoder(
            self.pictures or ("latents" if any(latent.values()) else "video"),
            self.autoencoder.temporal_stride,
            self.autoencoder.spatial_stride,
            self.autoencoder.fingerprint,
            self.audio,
            self.text,
            self.pause,
            self.history,
            [name for name, added in self.region_weights.items() if added > 0],
        )
        if decoder.pictures == "latents":
            for url, metadata in latent.items():
                decoder.check_latents(metadata, url)
        return decoder

    def _check_sizes(self, split: str, entries: Sequence[Entry]) -> None:
        longest, length = max(map(self._decoder.latents, entries)), max(self.buckets.lengths)
        if length > longest:
            raise UserError(
                f"got crops of {length} latents; expected at most {longest}, the longest sample of split {split!r}: "
                "shorten buckets.lengths"
            )
        stride = self.autoencoder.spatial_stride
        if odd := [entry for entry in entries if entry.height % stride or entry.width % stride]:
            raise UserError(
                f"{odd[0].key} is {odd[0].height} × {odd[0].width}; expected multiples of {stride} for this "
                f"autoencoder: preprocess with rules.multiple={stride}"
            )
