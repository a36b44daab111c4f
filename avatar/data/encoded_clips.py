"""Puppet clips as a model of latents sees them: encoded once, kept on disk, cropped at random for training.

A clip of 1 + s·k frames is encoded from its true start and its first latent, which stands for one frame, is dropped:
the k latents left are all of one kind, wherever a crop begins. References are single frames of the same clip, encoded
by themselves; a crop takes one from outside its window where there is one.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avatar.conditioning import audio_timeline
from avatar.conditioning.prompts import encode_prompt, strip_padding
from avatar.errors import require_int
from avatar.files import load_tensors, save_tensors
from avatar.protocols import AudioEncoder, TextEncoder, VideoAutoencoder
from avatar.puppet import speech
from avatar.puppet.clip import PuppetClip, make_clip
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import World
from avatar.types import SAMPLES_PER_FRAME, Batch, Conditioning

REFERENCES = 4  # frames of a clip that are encoded by themselves
VERSION = 5  # of what this module stores and of the puppets' looks and motion; part of the cache's key


@dataclass(frozen=True)
class ClipSet:
    """Which clips: the `count` first of a split's schedule from `first` on, each of so many latents, as directed."""

    split: str
    schedule: str
    count: int
    latents: int
    first: int = 0
    identities: int = 10_000
    scene: Scene = field(default_factory=Scene)

    def __post_init__(self) -> None:
        require_int(1, latents=self.latents, identities=self.identities)
        require_int(0, count=self.count, first=self.first)

    def make(self, index: int, frames: int, speech_cache: Path | None) -> PuppetClip:
        return make_clip(
            self.first + index,
            self.split,
            frames,
            self.schedule,
            self.identities,
            cache=speech_cache,
            directed=self.scene,
        )


@dataclass
class EncodedClips:
    """n clips of k latents, with all that conditions them."""

    latents: Float[Tensor, "n c k h w"]
    references: Float[Tensor, "n r c h w"]
    reference_at: Int[Tensor, "n r"]  # the latent that each reference's frame lies in
    features: Float[Tensor, "n roles f d"]  # of the timeline's frames, with the audio encoder's contexts around them
    other: Bool[Tensor, " n"]  # whether there is another voice
    text: Shaped[Tensor, "u tokens ..."]  # all different captions' own tokens, zeros behind the shorter ones'
    captioned: Int[Tensor, "n k"]  # which of them holds at each latent
    labels: Int[Tensor, "n 3 k"]  # state, emotion, gesture
    intensity: Float[Tensor, "n k"]
    regions: Float[Tensor, "n m k h w"]

    def __len__(self) -> int:
        return len(self.latents)

    def batch(
        self, which: Int[Tensor, " b"], start: Int[Tensor, " b"], length: int, audio: AudioEncoder, text: TextEncoder
    ) -> Batch:
        """Crops of `length` latents from clips `which`; each with the reference that lies farthest from it."""
        context = audio.left_context + audio.right_context
        stride = (self.features.shape[2] - context) // self.latents.shape[2]
        parts = [self._crop(int(n), int(s), length, audio, text, stride) for n, s in zip(which, start, strict=True)]
        latents, regions, rows = zip(*parts, strict=True)
        cond = Conditioning(**{name: _stacked([crop[name] for crop in rows]) for name in rows[0]})
        keys = [f"{n}@{s}" for n, s in zip(which.tolist(), start.tolist(), strict=True)]
        return Batch(torch.stack(latents).float(), cond, torch.stack(regions).float(), keys)

    def _crop(
        self, n: int, start: int, length: int, audio: AudioEncoder, text: TextEncoder, stride: int
    ) -> tuple[Tensor, Tensor, dict]:
        part = slice(start, start + length)
        away = (self.reference_at[n] - (start + (length - 1) / 2)).abs()
        windows = [audio.window(track.float(), stride)[part] for track in self.features[n]]
        present = torch.stack([torch.ones(length, dtype=torch.bool), self.other[n].expand(length)])
        state, emotion, gesture = self.labels[n][:, part]
        captions, event = self.captioned[n][part].unique(return_inverse=True)  # only those of the crop
        tokens, mask = zip(*(text.padded(strip_padding(caption)) for caption in self.text[captions]), strict=True)
        return (
            self.latents[n][:, part],
            self.regions[n][:, part],
            {
                "reference": self.references[n][int(away.argmax())][:, None].float(),
                "audio": torch.stack(windows),
                "audio_mask": present,
                "text": torch.stack(tokens),
                "text_mask": torch.stack(mask),
                "text_event": event,
                "state": state,
                "emotion": emotion,
                "emotion_intensity": self.intensity[n][part],
                "gesture": gesture,
            },
        )


class _Drawn(Dataset):
    """Clips on their way to the encoder: rendered in a loader's worker."""

    def __init__(self, clips: ClipSet, world: World, frames: int, extra: int, speech_cache: Path):
        self.clips, self.world, self.frames, self.extra, self.speech_cache = clips, world, frames, extra, speech_cache

    def __len__(self) -> int:
        return self.clips.count

    def __getitem__(self, index: int) -> tuple[PuppetClip, Tensor, Tensor]:
        clip = self.clips.make(index, self.frames + self.extra, self.speech_cache)
        return clip, self.world.video(clip, 0, self.frames), self.world.regions(clip, 0, self.frames)


def encode_clips(
    clips: ClipSet,
    world: World,
    autoencoder: VideoAutoencoder,
    audio: AudioEncoder,
    text: TextEncoder,
    cache: Path,
    workers: int,
    progress: Callable,
) -> EncodedClips:
    """The encoded clips, from the cache or made now; `progress` wraps the loop over clips."""
    path = cache / f"encoded-{clips.split}-{encoding_key(clips, world, autoencoder, audio, text)}.safetensors"
    if path.exists():
        return EncodedClips(**load_tensors(path, [stored.name for stored in fields(EncodedClips)]))
    stride = autoencoder.temporal_stride
    frames = 1 + stride * clips.latents
    drawn = _Drawn(clips, world, frames, frames_beyond(audio, frames - 1), cache / "speech")
    draws = torch.Generator()  # else the loader draws from the training's numbers, only when clips are encoded now
    loader = DataLoader(drawn, batch_size=None, num_workers=workers, collate_fn=None, generator=draws)
    rows, prompts = [], []
    for clip, video, regions in progress(loader):
        rows.append(_encode(clip, video, regions, autoencoder, audio))
        prompts.append([clip.captions[i] for i in clip.captioned[_middles(frames, stride)]])
    captions = {caption: number for number, caption in enumerate(dict.fromkeys(itertools.chain(*prompts)))}
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    tensors["text"] = _stacked([encode_prompt(caption, text) for caption in captions])
    tensors["captioned"] = torch.tensor([[captions[caption] for caption in row] for row in prompts])
    save_tensors(tensors, path)
    return EncodedClips(**tensors)


def frames_beyond(audio: AudioEncoder, frames: int) -> int:
    """Frames of sound after a timeline of so many that its features, right context included, depend on."""
    return -(-audio_timeline.samples_needed(audio, frames + audio.right_context) // SAMPLES_PER_FRAME) - frames


def encoding_key(
    clips: ClipSet, world: World, autoencoder: VideoAutoencoder, audio: AudioEncoder, text: TextEncoder
) -> str:
    """The cache key of encoded clips: a hash of all components' fingerprints."""
    origin = {
        "clips": asdict(clips),
        "world": world.fingerprint,
        "speech": (speech.available(), speech.VERSION),
        "autoencoder": autoencoder.fingerprint,
        "audio": audio.fingerprint,
        "text": text.fingerprint,
        "version": VERSION,
    }
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def _encode(
    clip: PuppetClip, video: Tensor, regions: Tensor, autoencoder: VideoAutoencoder, audio: AudioEncoder
) -> dict[str, Tensor]:
    """One clip's row of `EncodedClips`, but for its text."""
    stride, frames = autoencoder.temporal_stride, video.shape[1]
    device = next(autoencoder.parameters(), torch.zeros(())).device
    video = video[None].to(device)
    at = torch.linspace(0, frames - 1, REFERENCES).long()
    middle = _middles(frames, stride)
    labels = np.stack([clip.state[middle], clip.emotion[middle], clip.gesture[middle]])
    edge = autoencoder.spatial_stride
    return {
        "latents": autoencoder.encode(video)[0, :, 1:].half().cpu(),
        "references": torch.stack([autoencoder.encode(video[:, :, i : i + 1])[0, :, 0] for i in at]).half().cpu(),
        "reference_at": (at - 1).clamp(min=0) // stride,
        "features": torch.stack([_features(track, audio, frames - 1) for track in (clip.own, clip.other)]).half(),
        "other": torch.tensor(bool(np.abs(clip.other).max() > 0)),
        "labels": torch.from_numpy(labels.astype(np.int64)),
        "intensity": torch.from_numpy(clip.intensity[middle].astype(np.float32)),
        "regions": torch.nn.functional.avg_pool3d(regions[:, 1:], (stride, edge, edge)).half(),
    }


def _middles(frames: int, stride: int) -> slice:
    """The frames whose labels stand for a latent each."""
    return slice(1 + stride // 2, frames, stride)


def _stacked(rows: list[Tensor]) -> Tensor:
    """Rows in a stack, the shorter ones (with fewer captions, or fewer tokens) filled up with zeros."""
    if all(row.shape == rows[0].shape for row in rows):
        return torch.stack(rows)
    most = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row.new_zeros(most - len(row), *row.shape[1:])]) for row in rows])


def _features(track: Float[np.ndarray, " s"], audio: AudioEncoder, frames: int) -> Float[Tensor, "f d"]:
    """Features from `left_context` frames before a timeline, which starts at frame 1, to `right_context` after it."""
    before = audio_timeline.silent_features(audio, -audio.left_context, audio.left_context - 1)
    known = audio_timeline.features_until(audio, torch.from_numpy(track), first=-1)
    return torch.cat([before, known[: 1 + frames + audio.right_context]])
