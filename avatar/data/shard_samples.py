"""From a sample's files to what a model trains on: latents or pictures, sound, text, states, cropped alike.

A sample of 1 + s·k frames has k latents on its timeline: that of its first frame is dropped, wherever a crop begins.
"""

import io
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import av
import av.error
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image
from torch import Tensor

from avatar.conditioning import audio_timeline
from avatar.conditioning.prompts import PromptCache
from avatar.data.batch_schedule import Draw, changes, place
from avatar.data.shard_index import Entry
from avatar.data.tar import Tars
from avatar.errors import UserError
from avatar.media.frames import from_uint8
from avatar.media.regions import box_masks, mouth_box
from avatar.media.video_reader import open_video
from avatar.protocols import AudioEncoder, TextEncoder, VideoAutoencoder
from avatar.types import GLOBAL_BATCH, REGIONS, SAMPLES_PER_FRAME, STATES, Batch, Conditioning

COMMON = frozenset(
    ("meta.json", "afeat.npy", "audio.flac", "face.npy", "lips.npy", "text.npy", "txt", "state.npy", "vad.npy")
)
PICTURES = {"latents": frozenset(("latent.npy", "ref_latent.npy")), "video": frozenset(("video.mp4", "ref.png"))}
SPEAKING = STATES.index("speaking")
READING = (ValueError, OSError, KeyError, EOFError, av.error.FFmpegError)  # what damaged files raise


@dataclass
class Footage:
    """A batch whose pictures are still to be encoded."""

    video: list[UInt8[Tensor, "_ h w 3"]]  # of each clip: what comes before its crop for the encoder, then the crop
    reference: UInt8[Tensor, "b h w 3"]
    conditioning: Conditioning  # without a reference
    regions: Float[Tensor, "b m l _ _"]  # as in Batch
    keys: list[str]
    shard: slice = field(default_factory=lambda: GLOBAL_BATCH)  # as in Batch


@dataclass(frozen=True)
class Crop:
    """One clip of a batch: either latents or pictures, and its conditioning, without the reference."""

    key: str
    pictures: Float[Tensor, "c l h w"] | UInt8[Tensor, "f h w 3"]
    reference: Float[Tensor, "c 1 h w"] | UInt8[Tensor, "h w 3"]
    regions: Float[Tensor, "m l _ _"]  # shares of latent pixels; zeros where none are known or wanted
    fields: dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How samples are read.

    Args:
        pictures: "latents" or "video".
        stride, edge: of the autoencoder, in frames and in pixels.
        fingerprint: of the autoencoder that latents must be of.
        pause: frames without speech that don't end the state "speaking"; None: speech in the sound is no state.
        history: latents before a crop that the autoencoder sees when a video is encoded.
        regions: those of REGIONS that masks are made of.
    """

    pictures: str
    stride: int
    edge: int
    fingerprint: str
    audio: AudioEncoder
    text: TextEncoder
    pause: int | None
    history: int
    regions: Collection[str]

    def latents(self, entry: Entry) -> int:
        """On the timeline of a sample."""
        return (entry.frames - 1) // self.stride

    def grid(self, entry: Entry) -> tuple[int, int]:
        """Height and width of a sample's latents."""
        return entry.height // self.edge, entry.width // self.edge

    def read(self, tars: Tars, entry: Entry, draw: Draw) -> Crop:
        """A crop of a sample, the same for the same draw.

        Raises:
            One of READING: files that are gone, damaged, or not of this autoencoder.
        """
        files = tars.read(entry.shard.path, entry.key, COMMON | PICTURES[self.pictures])
        meta = json.loads(files["meta.json"])
        state = self._state(files, entry.frames)
        rng, latents = draw.rng(), self.latents(entry)
        anywhere = int(rng.integers(latents - draw.length + 1))
        start = place(draw.kind, rng, draw.length, latents, changes(state), anywhere)
        part = slice(start, start + draw.length)
        pictures, reference = (self._latents if self.pictures == "latents" else self._video)(files, meta, entry, part)
        own, mask = self._sound(files, meta, entry.frames, part)
        text, text_mask = self._text(files, meta)
        labels = torch.from_numpy(state[part].astype(np.int64))
        unsaid = torch.zeros_like(labels)
        silent = self.stride * (draw.length - 1) + self.audio.tokens(self.stride)
        silence = audio_timeline.silent_features(self.audio, self.stride * start - self.audio.left_context, silent)
        fields = {
            "audio": torch.stack([own, self.audio.window(silence, self.stride)]),
            "audio_mask": torch.stack([mask, torch.zeros_like(mask)]),
            "text": text[None],
            "text_mask": text_mask[None],
            "text_event": unsaid,
            "state": labels,
            "emotion": unsaid,
            "emotion_intensity": unsaid.float(),
            "gesture": unsaid,
        }
        inside = "" if meta["reference"] == "outside" else " with a reference of its own"
        return Crop(f"{entry.key}@{start}{inside}", pictures, reference, self._regions(files, entry, part), fields)

    def check_latents(self, latent: Mapping[str, Any] | None, whose: str) -> None:
        """Raise UserError for latents of another autoencoder, by what `meta.json` says of them."""
        if latent is None:
            raise UserError(
                f"{whose} has no latents, as others have; prepare it with encode='${{shipped}}', or set "
                "data.pictures=video to encode while training"
            )
        if (made_by := latent["autoencoder"]) != self.fingerprint:
            raise UserError(
                f"{whose} has latents of autoencoder {made_by}, but got autoencoder {self.fingerprint}; pass the one "
                "it was prepared with, prepare it again with this one, or encode while training by data.pictures=video"
            )

    def _latents(self, files: Mapping[str, bytes], meta: Mapping[str, Any], entry: Entry, part: slice):
        self.check_latents(meta["latent"], entry.key)
        whole, reference = (_array(files, f"{name}.npy") for name in ("latent", "ref_latent"))
        grid = self.grid(entry)
        if whole.shape[1:] != (1 + self.latents(entry), *grid) or reference.shape[1:] != (1, *grid):
            size = f"{entry.height} × {entry.width}"
            raise UserError(f"latents of {whole.shape} and {reference.shape} for {entry.frames} frames of {size}")
        latents, sink = (torch.from_numpy(array).float() for array in (whole[:, 1:][:, part], reference))
        if not (latents.isfinite().all() and sink.isfinite().all()):
            raise UserError("latents that are NaN or infinite")
        return latents, sink

    def _video(self, files: Mapping[str, bytes], meta: Mapping[str, Any], entry: Entry, part: slice):
        before = max(part.start - self.history, 0)
        frames = open_video(files["video.mp4"]).read(self.stride * before, self.stride * part.stop + 1)
        with Image.open(io.BytesIO(files["ref.png"])) as image:
            reference = np.asarray(image.convert("RGB"))
        if frames.shape[1:3] != (entry.height, entry.width) or reference.shape[:2] != (entry.height, entry.width):
            raise UserError(f"pictures of {frames.shape[1:3]} and {reference.shape[:2]}, unlike its index says")
        return torch.from_numpy(frames), torch.from_numpy(reference.copy())

    def _sound(
        self, files: Mapping[str, bytes], meta: Mapping[str, Any], frames: int, part: slice
    ) -> tuple[Float[Tensor, "l k d"], Bool[Tensor, " l"]]:
        """Windows of features, and which of them end before what is known of the sound does.

        Before the clip there is silence, as before a stream; after it, nothing is known.
        """
        audio, latents = self.audio, (frames - 1) // self.stride
        if meta["audio_features"] == audio.fingerprint and "afeat.npy" in files:
            features = torch.from_numpy(_array(files, "afeat.npy")).float().flatten(1)
            if features.shape != (frames, audio.dim):
                raise UserError(f"audio features of {tuple(features.shape)}, wanted {(frames, audio.dim)}")
        else:
            features = audio_timeline.features_until(
                audio, torch.from_numpy(_samples(files["audio.flac"], frames)), first=-1
            )
        if not features.isfinite().all():
            raise UserError("audio features that are NaN or infinite")
        missing = 1 + self.stride * latents + audio.right_context - len(features)
        before = audio_timeline.silent_features(audio, -audio.left_context, audio.left_context - 1)
        after = audio_timeline.silent_features(audio, len(features) - 1, max(missing, 0))
        padded = torch.cat([before, features, after])
        ends = self.stride * (1 + torch.arange(latents)) + audio.right_context  # the last frame that each hears
        known = (ends < len(features)) & ("no_audio" not in meta["repairs"])
        return audio.window(padded, self.stride)[part], known[part]

    def _regions(self, files: Mapping[str, bytes], entry: Entry, part: slice) -> Float[Tensor, "m l h w"]:
        """Shares of each latent's pixels, of the mean over its frames; without boxes of mouths they are estimated."""
        of_crop = slice(1 + self.stride * part.start, 1 + self.stride * part.stop)
        masks = torch.zeros(len(REGIONS), part.stop - part.start, *self.grid(entry))
        for name in self.regions:
            boxes = self._boxes(files, name, entry.frames)
            if boxes is None and name == "lips" and (face := self._boxes(files, "face", entry.frames)) is not None:
                boxes = mouth_box(face)
            if boxes is not None:
                covered = torch.from_numpy(box_masks(boxes[of_crop], *self.grid(entry)))
                masks[REGIONS.index(name)] = covered.unflatten(0, (-1, self.stride)).mean(dim=1)
        return masks

    def _boxes(self, files: Mapping[str, bytes], name: str, frames: int) -> Float[np.ndarray, "f 4"] | None:
        if f"{name}.npy" not in files:
            return None
        boxes = _array(files, f"{name}.npy")
        if boxes.shape != (frames, 4) or boxes.dtype.kind != "f":
            raise UserError(f"{name}.npy of {boxes.shape} ({boxes.dtype}), wanted numbers of {(frames, 4)}")
        if np.isinf(boxes).any() or (boxes[:, :2] > boxes[:, 2:]).any():
            raise UserError(
                f"{name}.npy with boxes that don't end, or do before they begin; wanted left, top, right, bottom"
            )
        return boxes

    def _text(
        self, files: Mapping[str, bytes], meta: Mapping[str, Any]
    ) -> tuple[Shaped[Tensor, "n ..."], Bool[Tensor, " n"]]:
        if meta["text_features"] == self.text.fingerprint and "text.npy" in files:
            return self.text.padded(torch.from_numpy(_array(files, "text.npy")))
        return self.text.padded(self._prompts.tokens(files.get("txt", b"").decode("utf-8")))

    def _state(self, files: Mapping[str, bytes], frames: int) -> Int[np.ndarray, " k"]:
        """Of each latent, at its middle frame."""
        if "state.npy" in files:
            state = _array(files, "state.npy").astype(int)
        elif "vad.npy" in files and self.pause is not None:
            state = SPEAKING * _bridged(_array(files, "vad.npy") > 0, self.pause)
        else:
            state = np.zeros(frames, int)
        if state.shape != (frames,) or state.min() < 0 or state.max() >= len(STATES):
            raise UserError(f"states of {state.shape}, wanted {frames} indices of {', '.join(STATES)}")
        return state[1 + self.stride // 2 :: self.stride][: (frames - 1) // self.stride]

    @cached_property
    def _prompts(self) -> PromptCache:
        return PromptCache(self.text)


def collate(crops: list[Crop]) -> Batch | Footage:
    """Crops of one length and size as a batch; shorter texts are filled up."""
    tokens = max(crop.fields["text"].shape[1] for crop in crops)
    for crop in crops:
        crop.fields.update({name: _filled(crop.fields[name], tokens) for name in ("text", "text_mask")})
    fields = {name: torch.stack([crop.fields[name] for crop in crops]) for name in crops[0].fields}
    keys = [crop.key for crop in crops]
    reference = torch.stack([crop.reference for crop in crops])
    regions = torch.stack([crop.regions for crop in crops])
    if crops[0].pictures.dtype == torch.uint8:
        cond = Conditioning(reference=torch.zeros(len(crops), 0, 1, 0, 0), **fields)
        return Footage([crop.pictures for crop in crops], reference, cond, regions, keys)
    latents = torch.stack([crop.pictures for crop in crops])
    return Batch(latents, Conditioning(reference=reference, **fields), regions, keys)


@torch.no_grad()
def encoded(footage: Footage, autoencoder: VideoAutoencoder) -> Batch:
    """Its batch of latents; one clip after the other, for what comes before their crops isn't of one length."""

    def encode(pictures: Tensor) -> Tensor:
        return autoencoder.encode(from_uint8(pictures)[None])[0]

    length = footage.conditioning.latents
    latents = torch.stack([encode(video)[:, -length:] for video in footage.video])
    sinks = torch.stack([encode(picture[None]) for picture in footage.reference])
    return Batch(latents, replace(footage.conditioning, reference=sinks), footage.regions, footage.keys)


def _array(files: Mapping[str, bytes], name: str) -> np.ndarray:
    content = io.BytesIO(files[name])
    try:
        return np.load(content)
    except Exception as error:  # a damaged header is read as Python, which fails in many ways
        raise UserError(f"{name} is no array ({error})") from error


def _samples(flac: bytes, frames: int) -> Float[np.ndarray, " s"]:
    with av.open(io.BytesIO(flac), "r") as file:
        pieces = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
    sound = np.concatenate(pieces)
    if sound.dtype != np.int16 or len(sound) != frames * SAMPLES_PER_FRAME:
        raise UserError(f"sound of {len(sound)} samples ({sound.dtype}), wanted {frames * SAMPLES_PER_FRAME} (int16)")
    return sound.astype(np.float32) / 2**15


def _bridged(voiced: Bool[np.ndarray, " f"], pause: int) -> Bool[np.ndarray, " f"]:
    """Speech with the pauses in it that are no longer than so many frames."""
    at = np.flatnonzero(voiced)
    bridged = voiced.copy()
    for first, last in itertools.pairwise(at):
        if last - first - 1 <= pause:
            bridged[first:last] = True
    return bridged


def _filled(row: Shaped[Tensor, "e n ..."], tokens: int) -> Shaped[Tensor, "e m ..."]:
    """Text, with zeros behind it."""
    return torch.cat([row, row.new_zeros(len(row), tokens - row.shape[1], *row.shape[2:])], dim=1)
