"""Audio-feature timing: the feature frames of a timeline, the samples that they need, and their silent padding.

Shared by training and streaming. The hops of an audio encoder form a grid that begins with frame 0 of the timeline. The
features of frames 0 to n are complete after

    640 hop ⌈n / hop⌉ + lookahead    samples of the timeline.

Before the timeline there are features of silence.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.protocols import AudioEncoder
from avatar.types import SAMPLES_PER_FRAME


def samples_needed(audio: AudioEncoder, frames: int) -> int:
    """Samples of a timeline after which the features of its first frames are complete."""
    return math.ceil(frames / audio.hop_frames) * audio.hop_frames * SAMPLES_PER_FRAME + audio.lookahead_samples


def receptive_field_frames(audio: AudioEncoder) -> tuple[int, int]:
    """Frames of audio before and after a span of frames that its features can depend on."""
    before, after = (
        math.ceil(samples / SAMPLES_PER_FRAME) for samples in (audio.left_samples, audio.lookahead_samples)
    )
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


def pad_features(audio: AudioEncoder, features: Float[Tensor, "f d"], frames: int) -> Float[Tensor, "p d"]:
    """Features of a clip with the contexts of its first and last latent, for `AudioEncoder.window`.

    Args:
        features: of frame -1, whose latent is not on the timeline, and the frames after it, as far as they are known.
        frames: on the timeline, from frame 0.

    Returns:
        Features of left_context + frames + right_context frames: silence before the clip and after the known features.
    """
    end = 1 + frames + audio.right_context
    before = silent_features(audio, -audio.left_context, audio.left_context - 1)
    after = silent_features(audio, len(features) - 1, max(end - len(features), 0))
    return torch.cat([before, features[:end], after])
