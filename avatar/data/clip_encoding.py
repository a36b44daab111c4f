"""Encoding of puppet clips to latents, audio features and text tokens, cached on disk.

A clip of 1 + s·k frames is encoded from its true start, and its first latent, which covers one frame, is dropped: all
the k latents that are left cover s frames, wherever a crop begins. References are single frames,
encoded by themselves: REFERENCES frames of the same clip, of which a crop uses one from outside of its window, and the
same number of *swapped* ones, which show the same puppet with another emotion.
"""

import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avatar.conditioning import audio_timeline
from avatar.conditioning.labels import label_frames
from avatar.conditioning.prompts import encode_prompt
from avatar.data.encoded_clips import EncodedClips, stack_padded
from avatar.errors import require_int
from avatar.files import load_tensors, save_tensors
from avatar.protocols import AudioEncoder, TextEncoder, VideoAutoencoder
from avatar.puppet import speech
from avatar.puppet.clip import Acting, PuppetClip, make_clip
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import World
from avatar.types import SAMPLES_PER_FRAME

REFERENCES = 4  # frames of a clip that are encoded by themselves
MAX_STEPS = 20  # clips that are tried for another emotion
VERSION = 8  # of this encoding and of the puppets' appearance and motion; part of the cache key


@dataclass(frozen=True)
class ClipSet:
    """A set of puppet clips: `count` clips of a split's schedule.

    Args:
        split: train, dev or test; their identities and sentences differ.
        schedule: of the states in a clip, such as "mixed".
        count: number of clips.
        latents: per clip.
        first: index of the first clip.
        identities: number of different puppets.
        scene: what the clips show.

    Raises:
        UserError: a size that is not an integer or too small.
    """

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

    def make(self, index: int, frames: int, speech_cache: Path | None, acting: Acting | None = None) -> PuppetClip:
        """Simulate a clip of the set, or a counterfactual of it (see `make_clip`)."""
        return make_clip(
            self.first + index,
            self.split,
            frames,
            self.schedule,
            self.identities,
            cache=speech_cache,
            directed=self.scene,
            acting=acting,
        )


class _RenderedClips(Dataset):
    """Clips to encode, rendered in the workers of a loader."""

    def __init__(self, clips: ClipSet, world: World, frames: int, extra: int, speech_cache: Path):
        self.clips, self.world, self.frames, self.extra, self.speech_cache = clips, world, frames, extra, speech_cache

    def __len__(self) -> int:
        return self.clips.count

    def __getitem__(self, index: int) -> tuple[PuppetClip, Tensor, Tensor, Tensor]:
        clip = self.clips.make(index, self.frames + self.extra, self.speech_cache)
        swapped = replace(clip, states=self._states_of_another_emotion(index, clip))
        images = [self.world.video(swapped, at, at + 1) for at in reference_frames(self.frames)]
        video, regions = (make(clip, 0, self.frames) for make in (self.world.video, self.world.regions))
        return clip, video, regions, torch.stack(images)

    def _states_of_another_emotion(self, index: int, clip: PuppetClip) -> Float[np.ndarray, "f s"]:
        """The states of the next clip of the set that begins with another emotion; the clip's own if there is none."""
        for step in range(1, min(self.clips.count, MAX_STEPS)):
            other = self.clips.make((index + step) % self.clips.count, self.frames + self.extra, self.speech_cache)
            if other.emotion[0] != clip.emotion[0]:
                return other.states
        return clip.states


def encode_clips(
    clips: ClipSet,
    world: World,
    autoencoder: VideoAutoencoder,
    audio: AudioEncoder,
    text: TextEncoder,
    cache: Path,
    workers: int,
) -> EncodedClips:
    """Encode clips, or load them from the cache.

    Args:
        cache: folder of encoded clips; synthesised speech is stored in its subfolder `speech`.
        workers: processes that render.
    """
    path = cache / f"encoded-{clips.split}-{encoding_key(clips, world, autoencoder, audio, text)}.safetensors"
    if path.exists():
        return EncodedClips(**load_tensors(path, [stored.name for stored in fields(EncodedClips)]))
    stride = autoencoder.temporal_stride
    frames = 1 + stride * clips.latents
    rendered = _RenderedClips(clips, world, frames, frames_beyond(audio, frames - 1), cache / "speech")
    draws = torch.Generator()  # else the loader draws from the global generator, but only when clips are encoded now
    loader = DataLoader(rendered, batch_size=None, num_workers=workers, collate_fn=None, generator=draws)
    rows, prompts = [], []
    for clip, video, regions, swapped in track(loader, f"encoding {clips.count} {clips.split} clips"):
        rows.append(_encode_clip(clip, video, regions, swapped, autoencoder, audio))
        prompts.append([clip.captions[i] for i in clip.captioned[label_frames(frames, stride)]])
    captions = {caption: number for number, caption in enumerate(dict.fromkeys(itertools.chain(*prompts)))}
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    tensors["text"] = stack_padded([encode_prompt(caption, text) for caption in captions])
    tensors["captioned"] = torch.tensor([[captions[caption] for caption in row] for row in prompts])
    save_tensors(tensors, path)
    return EncodedClips(**tensors)


def reference_frames(frames: int) -> list[int]:
    """The frames of a clip that are encoded as references."""
    return np.linspace(0, frames - 1, REFERENCES).astype(int).tolist()


def frames_beyond(audio: AudioEncoder, frames: int) -> int:
    """Frames of audio after a timeline of `frames` frames that its features, right context included, depend on."""
    samples = audio_timeline.samples_needed(audio, frames + audio.right_context)
    return math.ceil(samples / SAMPLES_PER_FRAME) - frames


def encoding_key(
    clips: ClipSet, world: World, autoencoder: VideoAutoencoder, audio: AudioEncoder, text: TextEncoder
) -> str:
    """The cache key of encoded clips: a hash of all components' fingerprints."""
    origin = {
        "clips": asdict(clips),
        "world": world.fingerprint,
        "speech": (speech.best_backend(), speech.VERSION),
        "autoencoder": autoencoder.fingerprint,
        "audio": audio.fingerprint,
        "text": text.fingerprint,
        "version": VERSION,
    }
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def _encode_clip(
    clip: PuppetClip,
    video: Tensor,
    regions: Tensor,
    swapped: Tensor,
    autoencoder: VideoAutoencoder,
    audio: AudioEncoder,
) -> dict[str, Tensor]:
    """Encode a clip to its row of `EncodedClips`, without text."""
    stride, frames = autoencoder.temporal_stride, video.shape[1]
    device = next(autoencoder.parameters(), torch.zeros(())).device
    video = video[None].to(device)
    at = torch.tensor(reference_frames(frames))
    own, other = [video[:, :, i : i + 1] for i in at], swapped[:, None].to(device)
    middle = label_frames(frames, stride)
    labels = np.stack([clip.state[middle], clip.emotion[middle], clip.gesture[middle]])
    known = (
        audio_timeline.features_until(audio, torch.from_numpy(track), first=-1) for track in (clip.own, clip.other)
    )
    spatial_stride = autoencoder.spatial_stride
    return {
        "latents": autoencoder.encode(video)[0, :, 1:].half().cpu(),
        "references": torch.stack([autoencoder.encode(image)[0, :, 0] for image in own]).half().cpu(),
        "swapped": torch.stack([autoencoder.encode(image)[0, :, 0] for image in other]).half().cpu(),
        "reference_at": (at - 1).clamp(min=0) // stride,
        "features": torch.stack(
            [audio_timeline.pad_features(audio, features, frames - 1) for features in known]
        ).half(),
        "other": torch.tensor(bool(np.abs(clip.other).max() > 0)),
        "labels": torch.from_numpy(labels.astype(np.int64)),
        "intensity": torch.from_numpy(clip.intensity[middle].astype(np.float32)),
        "regions": torch.nn.functional.avg_pool3d(regions[:, 1:], (stride, spatial_stride, spatial_stride)).half(),
    }
