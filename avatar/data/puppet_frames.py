"""Training on frames of the puppet world, for autoencoders; frames are rendered in the loader."""

import math
from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from avatar.errors import UserError, require_int
from avatar.puppet.clip import identity_seed, make_clip
from avatar.puppet.identity import Identity
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import World
from avatar.types import REGIONS, Frames

CROPS_PER_CLIP = 4  # speech is slower than rendering, so several crops share a clip's motion, each with another puppet


class FrameBatches(Dataset):
    """Batches of crops, each with a reference of its puppet. Batch i depends only on (seed, i).

    The reference is a frame of any clip of the batch, with that clip's emotion. If it were a frame of the crop's own
    clip, a decoder that takes the reference would read the emotion from it.
    """

    def __init__(
        self,
        world: World,
        scene: Scene,
        split: str,
        seed: int,
        steps: int,
        start: int,
        batch: int,
        frames: int,
        cache: Path,
    ):
        self.world, self.scene, self.split, self.seed, self.steps, self.start = world, scene, split, seed, steps, start
        self.batch, self.frames, self.cache = batch, frames, cache

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Frames:
        rng = np.random.default_rng([self.seed, index + self.start])
        videos, references, regions, keys = [], [], [], []
        numbers = rng.integers(2**31, size=max(2, math.ceil(self.batch / CROPS_PER_CLIP)))
        clips = [
            make_clip(int(number), self.split, 4 * self.frames, cache=self.cache, directed=self.scene)
            for number in numbers
        ]
        for i in range(self.batch):
            number = identity_seed(int(rng.integers(2**31)), self.split)
            clip = replace(clips[i // CROPS_PER_CLIP], identity=Identity.from_seed(number))
            posed = replace(clip, states=clips[int(rng.integers(len(clips)))].states)
            start, other = (int(rng.integers(len(clip.states) - n)) for n in (self.frames, 1))
            videos.append(self.world.video(clip, start, start + self.frames))
            references.append(self.world.video(posed, other, other + 1))
            regions.append(self.world.regions(clip, start, start + self.frames))
            keys.append(f"{clip.key}@{start}")
        return Frames(torch.stack(videos), torch.stack(references), torch.stack(regions), keys)


class PuppetFrames(lightning.LightningDataModule):
    """Data module of puppet frames.

        python train.py objective=autoencoder data.batch=12

    Args:
        world: renders the clips.
        scene: what they show.
        frames: per crop, 1 + a multiple of the autoencoder's temporal stride.
        batch: crops per batch.
        steps: batches of a run.
        seed: of the training batches.
        workers: processes that render training batches.
        cache: folder of synthesised speech.
    """

    def __init__(
        self,
        world: World,
        scene: Scene,
        frames: int,
        batch: int,
        steps: int,
        seed: int,
        workers: int,
        cache: str,
    ):
        super().__init__()
        require_int(1, batch=batch)
        self.world, self.scene, self.frames, self.batch, self.steps = world, scene, frames, batch, steps
        self.seed, self.workers, self.cache = seed, workers, Path(cache)
        self.start = 0  # the batch with which a resumed run continues
        self.accumulate = 1

    def check(self, ranks: int) -> None:
        """Raise UserError for more than one rank."""
        if ranks > 1:
            raise UserError(
                f"got {ranks} ranks; expected 1, since an autoencoder's statistics are those of the full batch: set "
                "trainer=default trainer.devices=1"
            )

    @property
    def regions(self) -> frozenset[str]:
        """Those of REGIONS for which training clips have masks."""
        return frozenset(REGIONS)

    def describe_batch(self, ranks: int) -> str:
        """The size of the batch, in words."""
        return f"batch: {self.batch} clips of {self.frames} frames"

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.seed, self.steps, self.start)

    def val_dataloader(self) -> DataLoader:
        return self._loader("dev", 0, 2, 0)

    def _loader(self, split: str, seed: int, steps: int, start: int) -> DataLoader:
        batches = FrameBatches(self.world, self.scene, split, seed, steps, start, self.batch, self.frames, self.cache)
        return DataLoader(batches, batch_size=None, num_workers=self.workers if split == "train" else 0)
