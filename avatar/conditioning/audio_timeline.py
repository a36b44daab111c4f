"""Which features a timeline has, and which sound they wait for; one answer for training and for streaming.

The grid of an audio encoder's hops begins with the timeline's frame 0. The features of frames 0 to n are known once

    640 hop ⌈n / hop⌉ + reach    samples of the timeline

have come. Before the timeline stand features of silence.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.protocols import AudioEncoder
from avatar.types import SAMPLES_PER_FRAME


def samples_needed(audio: AudioEncoder, frames: int) -> int:
    """Samples of a timeline after which the features of its first `frames` frames are known."""
    return -(-frames // audio.hop_frames) * audio.hop_frames * SAMPLES_PER_FRAME + audio.lookahead_samples


def receptive_field_frames(audio: AudioEncoder) -> tuple[int, int]:
    """Frames of sound before a stretch of frames and after it that the features of the stretch depend on at most."""
    before, after = (-(-samples // SAMPLES_PER_FRAME) for samples in (audio.left_samples, audio.lookahead_samples))
    return before + audio.hop_frames - 1, after + audio.hop_frames - 1


def silent_features(audio: AudioEncoder, first: int, frames: int) -> Float[Tensor, "f d"]:
    """Features of silent frames from frame `first` of a timeline on; its own first one is 0."""
    return audio.silence[torch.arange(first, first + frames) % audio.hop_frames]


def features_until(audio: AudioEncoder, samples: Float[Tensor, " s"], first: int) -> Float[Tensor, "f d"]:
    """Features of sound that begins at frame `first` of a timeline, behind silence.

    The last frames are left out, whose features depend on sound beyond the samples.
    """
    ahead = first % audio.hop_frames  # frames of silence that complete the first hop
    end = (
        (ahead * SAMPLES_PER_FRAME + len(samples) - audio.lookahead_samples)
        // (audio.hop_frames * SAMPLES_PER_FRAME)
        * audio.hop_frames
    )
    features = audio.encode(torch.nn.functional.pad(samples, (ahead * SAMPLES_PER_FRAME, 0)))
    return features[ahead : max(ahead, end)]
