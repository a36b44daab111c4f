"""Encoded clips of the puppet world in memory, and their crops as batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from avatar.conditioning.prompts import strip_padding
from avatar.protocols import AudioEncoder, TextEncoder
from avatar.types import Batch, Conditioning


@dataclass
class EncodedClips:
    """n clips of k latents with their conditioning, r references of each kind, and u different captions."""

    latents: Float[Tensor, "n c k h w"]
    references: Float[Tensor, "n r c h w"]  # frames of the clip
    swapped: Float[Tensor, "n r c h w"]  # frames of the same puppet with another emotion
    reference_at: Int[Tensor, "n r"]  # the latent that contains the frame of each reference
    features: Float[Tensor, "n roles f d"]  # of the timeline's frames, with the audio encoder's contexts
    other: Bool[Tensor, " n"]  # whether the clip has another voice
    text: Shaped[Tensor, "u tokens ..."]  # of each caption, padded with zeros to the longest
    captioned: Int[Tensor, "n k"]  # the caption of each latent
    labels: Int[Tensor, "n 3 k"]  # state, emotion, gesture
    intensity: Float[Tensor, "n k"]  # of the emotion
    regions: Float[Tensor, "n m k h w"]  # share of each of REGIONS in each latent pixel

    def __len__(self) -> int:
        return len(self.latents)

    def batch(
        self,
        which: Int[Tensor, " b"],
        start: Int[Tensor, " b"],
        length: int,
        audio: AudioEncoder,
        text: TextEncoder,
        swapped: Bool[Tensor, " b"] | None = None,
    ) -> Batch:
        """Crops of `length` latents from latent `start` of clips `which`, with references.

        The reference is the clip's frame that is most distant from the crop or, where `swapped`, one with another
        emotion.
        """
        swapped = torch.zeros(len(which), dtype=torch.bool) if swapped is None else swapped
        context = audio.left_context + audio.right_context
        stride = (self.features.shape[2] - context) // self.latents.shape[2]
        crops = zip(which.tolist(), start.tolist(), swapped.tolist(), strict=True)
        parts = [self._crop(*crop, length, audio, text, stride) for crop in crops]
        latents, regions, rows = zip(*parts, strict=True)
        cond = Conditioning(**{name: stack_padded([crop[name] for crop in rows]) for name in rows[0]})
        keys = [f"{n}@{s}" for n, s in zip(which.tolist(), start.tolist(), strict=True)]
        return Batch(torch.stack(latents).float(), cond, torch.stack(regions).float(), keys)

    def _crop(
        self, n: int, start: int, swapped: bool, length: int, audio: AudioEncoder, text: TextEncoder, stride: int
    ) -> tuple[Tensor, Tensor, dict]:
        part = slice(start, start + length)
        distance = (self.reference_at[n] - (start + (length - 1) / 2)).abs()
        reference = (self.swapped if swapped else self.references)[n][int(distance.argmax())]
        windows = [audio.window(track.float(), stride)[part] for track in self.features[n]]
        present = torch.stack([torch.ones(length, dtype=torch.bool), self.other[n].expand(length)])
        state, emotion, gesture = self.labels[n][:, part]
        captions, event = self.captioned[n][part].unique(return_inverse=True)  # only those of the crop
        tokens, mask = zip(*(text.padded(strip_padding(caption)) for caption in self.text[captions]), strict=True)
        return (
            self.latents[n][:, part],
            self.regions[n][:, part],
            {
                "reference": reference[:, None].float(),
                "audio": torch.stack(windows),
                "audio_mask": present,
                "text": padded_to_power_of_two(tokens),
                "text_mask": padded_to_power_of_two(mask),
                "text_event": event,
                "state": state,
                "emotion": emotion,
                "emotion_intensity": self.intensity[n][part],
                "gesture": gesture,
            },
        )


def padded_to_power_of_two(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows, and zeros up to a power of two: so batches have few shapes, and a compiled network few graphs."""
    missing = (1 << (len(rows) - 1).bit_length()) - len(rows)
    return torch.stack([*rows, *[torch.zeros_like(rows[0])] * missing])


def stack_padded(rows: list[Tensor]) -> Tensor:
    """Stack rows; those with fewer captions or fewer tokens are padded with zeros."""
    if all(row.shape == rows[0].shape for row in rows):
        return torch.stack(rows)
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row.new_zeros(longest - len(row), *row.shape[1:])]) for row in rows])
