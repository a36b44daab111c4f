"""The clips of an evaluation: held-out puppets, their conditioning, and the videos that a system generates for them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from avatar.conditioning import image_to_video
from avatar.data.clip_encoding import ClipSet, encode_clips, frames_beyond
from avatar.diffusion.generation import ClipSampler
from avatar.metrics.distribution import Trajectory
from avatar.metrics.state_estimation import EstimatedClip, PixelReader, StateReader, VideoReader
from avatar.models.video_dit import VideoDiT
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.puppet.clip import Acting, PuppetClip
from avatar.puppet.worlds import PixelWorld, World
from avatar.types import Batch, Conditioning, Latents


class HeldOutClips:
    """Held-out clips with their conditioning, and the videos of each system for them, `c f h w` per clip."""

    def __init__(
        self,
        world: World,
        autoencoder: VideoAutoencoder,
        audio: AudioEncoder,
        text: TextEncoder,
        image: ImageEncoder | None,
        clips: ClipSet,
        cache: Path,
        workers: int,
    ):
        self.world, self.autoencoder, self.audio, self.text, self.image = world, autoencoder, audio, text, image
        self.clips, self.cache = clips, cache
        self.stride = autoencoder.temporal_stride
        encoded = encode_clips(clips, world, autoencoder, audio, text, cache, workers)
        every = torch.arange(clips.count)
        self.batch: Batch = encoded.batch(every, torch.zeros_like(every), clips.latents, self.audio, self.text)
        frames = 1 + self.stride * clips.latents
        # As long as for encoding, the audio's right context included: a clip's length is part of its seed.
        self.frames = frames + frames_beyond(self.audio, frames - 1)
        self.truth = [
            clips.make(i, self.frames, cache / "speech")
            for i in track(range(clips.count), f"simulating {clips.count} {clips.split} clips")
        ]
        self.reader: VideoReader = PixelReader(world.size) if isinstance(world, PixelWorld) else StateReader()

    def reference_motion(self, count: int, first: int) -> list[Trajectory]:
        """The true states of other clips of the split, of the same kind and length: the reference motion."""
        clips, frames = replace(self.clips, count=count, first=first), 1 + self.stride * self.clips.latents
        numbers = track(range(count), f"drawing {count} other clips' motion")
        return [clips.make(i, frames, self.cache / "speech").states[1:] for i in numbers]

    def acted(self, index: int, acting: Acting) -> PuppetClip:
        """A clip with another acting."""
        return self.clips.make(index, self.frames, self.cache / "speech", acting)

    def ground_truth(self) -> list[Tensor]:
        """Rendered from the true states."""
        frames = 1 + self.stride * self.clips.latents
        return [self.world.video(clip, 1, frames) for clip in self.truth]

    def frozen(self) -> list[Tensor]:
        """The reference, decoded and repeated."""
        frames = self.stride * self.clips.latents
        return [self._decode(i, None).expand(-1, frames, -1, -1) for i in range(self.clips.count)]

    def through_autoencoder(self) -> list[Tensor]:
        """The true latents, decoded."""
        return [self._decode(i, self.batch.latents[i : i + 1]) for i in range(self.clips.count)]

    @torch.no_grad()
    def reconstructed(self, index: int, acting: Acting) -> Tensor:
        """A clip with another acting through the autoencoder, decoded after the clip's own reference."""
        device = next((p.device for p in self.autoencoder.parameters()), torch.device("cpu"))
        video = self.world.video(self.acted(index, acting), 0, 1 + self.stride * self.clips.latents)
        return self._decode(index, self.autoencoder.encode(video[None].to(device))[:, :, 1:])

    def generate(
        self,
        net: VideoDiT,
        sampler: ClipSampler,
        cond: Conditioning,
        seed: int,
        title: str,
        clips: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Videos generated for a conditioning of the clips with these numbers (None: all), a few at a time."""
        device = next(net.parameters()).device
        numbers = torch.arange(len(cond.state)) if clips is None else torch.tensor(clips)
        made = []
        for part in track(torch.arange(len(numbers)).split(8), title):
            picked = image_to_video.with_image_conditioning(
                cond.map(lambda x, part=part: x[part].to(device)), self.autoencoder, self.image
            )
            made.append(sampler(net, picked, tuple(seed * 100_003 + int(i) for i in numbers[part])).cpu())
        latents = torch.cat(made)
        return [self._decode(int(n), latents[i : i + 1]) for i, n in enumerate(numbers)]

    def shuffled(self) -> Conditioning:
        """The conditioning with the audio of the next clip."""
        cond = self.batch.conditioning
        return replace(cond, audio=cond.audio.roll(1, 0), audio_mask=cond.audio_mask.roll(1, 0))

    def read(self, videos: list[Tensor], title: str) -> list[EstimatedClip]:
        """States estimated from the first videos."""
        pairs = list(zip(self.truth[: len(videos)], videos, strict=True))
        return [self.reader.read(clip, video, start=1) for clip, video in track(pairs, f"reading {title}")]

    @torch.no_grad()
    def _decode(self, index: int, latents: Latents | None) -> Tensor:
        """A clip decoded as in a stream, after its reference; without latents, the reference alone."""
        device = next((p.device for p in self.autoencoder.parameters()), torch.device("cpu"))
        decoder = self.autoencoder.decoder_stream()
        reference = decoder.push(self.batch.conditioning.reference[index : index + 1].to(device))
        return (reference if latents is None else decoder.push(latents.to(device)))[0].cpu()
