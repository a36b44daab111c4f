"""Audio-feature timing: the feature frames of a timeline, the samples that they need, and their silent padding.

Shared by training and streaming. The hops of an audio encoder form a grid that begins with frame 0 of the timeline. The
features of frames 0 to n are complete after

    640 hop ⌈n / hop⌉ + lookahead    samples of the timeline.

Before the timeline there are features of silence.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.protocols import AudioEncoder
from avatar.types import SAMPLES_PER_FRAME


def samples_needed(audio: AudioEncoder, frames: int) -> int:
    """Samples of a timeline after which the features of its first frames are complete."""
    return -(-frames // audio.hop_frames) * audio.hop_frames * SAMPLES_PER_FRAME + audio.lookahead_samples


def receptive_field_frames(audio: AudioEncoder) -> tuple[int, int]:
    """Frames of audio before and after a span of frames that its features can depend on."""
    before, after = (-(-samples // SAMPLES_PER_FRAME) for samples in (audio.left_samples, audio.lookahead_samples))
    return before + audio.hop_frames - 1, after + audio.hop_frames - 1


def silent_features(audio: AudioEncoder, first: int, frames: int) -> Float[Tensor, "f d"]:
    """Features of silence from frame `first` of a timeline on, where 0 is the first frame."""
    return audio.silence[torch.arange(first, first + frames) % audio.hop_frames]


def features_until(audio: AudioEncoder, samples: Float[Tensor, " s"], first: int) -> Float[Tensor, "f d"]:
    """Features of audio that begins at frame `first` of a timeline, after silence.

    Without the last frames, whose features depend on audio after the samples.
    """
    ahead = first % audio.hop_frames  # frames of silence that complete the first hop
    end = (
        (ahead * SAMPLES_PER_FRAME + len(samples) - audio.lookahead_samples)
        // (audio.hop_frames * SAMPLES_PER_FRAME)
        * audio.hop_frames
    )
    features = audio.encode(torch.nn.functional.pad(samples, (ahead * SAMPLES_PER_FRAME, 0)))
    return features[ahead : max(ahead, end)]
