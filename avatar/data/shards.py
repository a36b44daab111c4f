"""Batches from prepared sets: `python train.py data=shards data.urls=data/myset`.

The order is `sampling.Plan`'s, a function of (seed, step). Each clip is read by its place in its shard, so workers and
shards may be of any number; a batch is that of all ranks, of which each one reads its part.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avatar.conditioning import image_to_video
from avatar.data.batch_schedule import AT_START, BatchSchedule, Draw, Placement
from avatar.data.bucketing import BatchShard, LengthBuckets, check_ranks
from avatar.data.shard_index import Entry, Filters, Index
from avatar.data.shard_reader import ON_ERROR, SampleReader, check_captions, check_shards, latent_of
from avatar.data.shard_samples import PICTURES, Footage, Recipe, collate, encoded
from avatar.errors import UserError
from avatar.media.frames import to_uint8
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.types import Batch

log = logging.getLogger(__name__)


class ShardBatches(Dataset):
    """One share of all batches; what is still pictures is encoded by the data module."""

    def __init__(self, reader: SampleReader, plan: BatchSchedule, start: int, stop: int, share: BatchShard):
        self.reader, self.plan, self.start, self.stop, self.share = reader, plan, start, stop, share

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch | Footage:
        step, part = self.share.locate(self.start + index)
        return replace(collate([self.reader.crop(draw) for draw in self.plan.batch(step)[part]]), shard=part)


class ShardClips(lightning.LightningDataModule):
    """Training and validation batches of prepared sets, on an autoencoder's latents.

    Args:
        urls: folders of sets.
        train, dev: splits; validation takes its four batches, and samples to look at, from `dev`.
        pictures: "latents", "video" (encoded while training), or None: latents if all sets have them.
        pause: frames without speech that don't end the state "speaking"; None: speech in the sound is no state.
        history: latents before a crop that the autoencoder sees when a video is encoded.
        region_weights: what the objective adds to the weight of each of REGIONS; of those of 0, no boxes are read.
        on_error: "raise" or "skip" what can't be read.
        steps: batches of one run, each made in `buckets.accumulate` passes.
        image: the image encoder of image-to-video networks, for others None.

    Raises:
        OSError, ValueError: no sets, splits, samples, or not of this autoencoder; all before the first step.
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
        super().__init__()
        if on_error not in ON_ERROR or pictures not in (None, *PICTURES):
            raise UserError(f"on_error={on_error}, pictures={pictures}; wanted raise or skip; latents, video or null")
        if history < 0 or (pause is not None and pause < 0):
            raise UserError(f"history={history}, pause={pause}; wanted numbers of latents and frames, 0 or more")
        self.urls, self.train, self.dev, self.filters, self.pictures = urls, train, dev, filters, pictures
        self.autoencoder, self.audio, self.text, self.image = autoencoder.eval(), audio, text, image
        self.pause, self.history, self.region_weights = pause, history, region_weights
        self.buckets, self.placement, self.on_error = buckets, placement, on_error
        self.steps, self.seed, self.workers = steps, seed, workers
        self.start = 0  # the pass that a resumed run goes on with
        self.readers: dict[str, SampleReader] = {}

    @cached_property
    def entries(self) -> dict[str, list[Entry]]:
        """The samples of both splits."""
        index = Index(self.urls)
        return {name: index.entries(name, self.filters) for name in dict.fromkeys((self.train, self.dev))}

    @cached_property
    def _everything(self) -> list[Entry]:
        return [entry for part in self.entries.values() for entry in part]

    @property
    def regions(self) -> frozenset[str]:
        """Those of REGIONS that some of the training samples have masks of."""
        return frozenset().union(*(entry.regions for entry in self.entries[self.train]))

    def sizes(self) -> set[tuple[int, int]]:
        """Heights and widths of its latents."""
        stride = self.autoencoder.spatial_stride
        return {(entry.height // stride, entry.width // stride) for entry in self._everything}

    def check(self, ranks: int) -> None:
        """Raise UserError for what can't be trained on by so many ranks; captions are the first rank's to look at."""
        check_ranks(self.buckets, ranks, len(self.entries[self.train]))
        check_shards({entry.shard for entry in self._everything}, self.on_error)
        for name, part in self.entries.items():
            self._check_sizes(name, part, self._recipe)
        self.buckets.check_area(max(height * width for height, width in self.sizes()))
        if self.on_error == "raise" and not rank_zero_only.rank:
            check_captions(self._everything, self.text)  # none shall prove too long after hours

    def setup(self, stage: str) -> None:
        self.readers = {
            name: SampleReader(part, self._recipe, self.on_error, self.workers) for name, part in self.entries.items()
        }

    def train_dataloader(self) -> DataLoader:
        return self._loader(
            self.train, self.seed, self.start, self.steps * self.accumulate, self.accumulate, self.workers
        )

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.dev, 0, 0, 4, 1, 0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.encoded(batch)

    def encoded(self, batch: Batch | Footage) -> Batch:
        """The batch with its pictures encoded, if it has any, and its conditioning completed, where its tensors are."""
        if isinstance(batch, Footage):
            self.autoencoder.to(batch.reference.device)
            batch = replace(encoded(batch, self.autoencoder), shard=batch.shard)
        return replace(
            batch, conditioning=image_to_video.with_image_conditioning(batch.conditioning, self.autoencoder, self.image)
        )

    def held_out(self, clips: int, device: torch.device) -> Batch:
        """The beginnings of the first clips of the dev split, as long as crops get, all of one size, on this device."""
        reader = self.readers[self.dev]
        sizes = self._sizes(reader.entries, reader.recipe)
        length = max(self.buckets.lengths)
        long_enough = np.flatnonzero(sizes[:, 0] >= length)
        alike = long_enough[(sizes[long_enough, 1:] == sizes[long_enough[0], 1:]).all(1)]
        draws = [Draw(int(sample), length, AT_START, (0, 0, int(sample), 1), alike) for sample in alike[:clips]]
        crops = collate([reader.crop(draw) for draw in draws])
        return self.encoded(self.transfer_batch_to_device(crops, device, 0))

    def to_pictures(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f h w 3"]:
        """Decoded frames to look at."""
        return to_uint8(video)

    def teardown(self, stage: str) -> None:
        for reader in self.readers.values():
            if summary := reader.summary():
                log.warning("%s", summary)

    def describe_batch(self, ranks: int) -> str:
        """What an update learns from."""
        return self.buckets.describe_batch(ranks, {height * width for height, width in self.sizes()})

    @property
    def accumulate(self) -> int:
        """Passes per batch."""
        return self.buckets.accumulate

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader(self, split: str, seed: int, start: int, passes: int, accumulate: int, workers: int) -> DataLoader:
        reader, stop = self.readers[split], start + passes
        steps = math.ceil(stop / accumulate)
        plan = BatchSchedule(self._sizes(reader.entries, reader.recipe), self.buckets, self.placement, seed, steps)
        rank = self.trainer.global_rank if self.trainer else 0
        batches = ShardBatches(reader, plan, start, stop, BatchShard(rank, self._ranks, accumulate))
        return DataLoader(batches, batch_size=None, num_workers=workers)

    def _sizes(self, entries: Sequence[Entry], recipe: Recipe) -> Int[np.ndarray, "n 3"]:
        """Of each sample its latents, and their height and width."""
        return np.array([(recipe.latents(entry), *recipe.grid(entry)) for entry in entries])

    @cached_property
    def _recipe(self) -> Recipe:
        """How samples are read, by what each set says of its latents."""
        sets: dict[str, list[Entry]] = {}
        for entry in self._everything:
            sets.setdefault(entry.shard.url, []).append(entry)
        latent = {url: latent_of(part) for url, part in sets.items()}
        recipe = Recipe(
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
        if recipe.pictures == "latents":
            for url, made in latent.items():
                recipe.check_latents(made, url)
        return recipe

    def _check_sizes(self, split: str, entries: Sequence[Entry], recipe: Recipe) -> None:
        longest, wanted = max(map(recipe.latents, entries)), max(self.buckets.lengths)
        if wanted > longest:
            raise UserError(
                f"crops of {wanted} latents, but the longest sample of split {split!r} has {longest}; make the lengths "
                "of the buckets shorter"
            )
        edge = self.autoencoder.spatial_stride
        if odd := [entry for entry in entries if entry.height % edge or entry.width % edge]:
            raise UserError(
                f"{odd[0].key} is {odd[0].height} × {odd[0].width}, but the autoencoder takes multiples of {edge}; "
                f"prepare with rules.multiple={edge}"
            )
