"""Decoding of a sample's files to a crop: latents or frames, audio features, text, states.

A sample of 1 + s·k frames has k latents on its timeline: the latent of the first frame is dropped, wherever a crop
begins.
"""

import io
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import av
import av.error
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor

from avatar.conditioning import audio_timeline
from avatar.conditioning.labels import label_frames
from avatar.conditioning.prompts import PromptCache
from avatar.data.batch_schedule import Draw, changes, place
from avatar.data.shard_batches import Crop
from avatar.data.shard_index import Entry
from avatar.data.tar import TarReader
from avatar.errors import UserError
from avatar.media.regions import box_masks, eyes_box, mouth_box
from avatar.media.video_reader import open_video
from avatar.protocols import AudioEncoder, TextEncoder
from avatar.types import REGIONS, SAMPLES_PER_FRAME, STATES

COMMON = frozenset(
    ("meta.json", "afeat.npy", "audio.flac", "face.npy", "lips.npy", "text.npy", "txt", "state.npy", "vad.npy")
)
PICTURES = {"latents": frozenset(("latent.npy", "ref_latent.npy")), "video": frozenset(("video.mp4", "ref.png"))}
ESTIMATES = {"lips": mouth_box, "eyes": eyes_box}  # from the boxes of faces
SPEAKING = STATES.index("speaking")
# Raised for damaged files.
READ_ERRORS = (
    ValueError,
    OSError,
    KeyError,
    EOFError,
    RecursionError,
    av.error.FFmpegError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class SampleDecoder:
    """Decodes samples of preprocessed sets.

    Args:
        pictures: "latents" or "video".
        stride, spatial_stride: of the autoencoder, in frames and in pixels.
        fingerprint: of the autoencoder; latents of another one are rejected.
        audio, text: encoders, for samples without features of them.
        pause: pauses of up to this many frames keep the state "speaking"; None: no states from speech activity.
        history: latents before a crop that are encoded with it, for videos.
        regions: those of REGIONS whose masks are computed.
    """

    pictures: str
    stride: int
    spatial_stride: int
    fingerprint: str
    audio: AudioEncoder
    text: TextEncoder
    pause: int | None
    history: int
    regions: Collection[str]

    def latents(self, entry: Entry) -> int:
        """Number of latents on the timeline of a sample."""
        return (entry.frames - 1) // self.stride

    def grid(self, entry: Entry) -> tuple[int, int]:
        """Height and width of a sample's latents."""
        return entry.height // self.spatial_stride, entry.width // self.spatial_stride

    def crop(self, tars: TarReader, entry: Entry, draw: Draw) -> Crop:
        """Decode a crop of a sample; equal draws give equal crops.

        Raises:
            READ_ERRORS: files that are missing, damaged, or of another autoencoder.
        """
        files = tars.read(entry.shard.path, entry.key, COMMON | PICTURES[self.pictures])
        meta = read_metadata(files)
        state = self._states(files, entry.frames)
        rng, latents = draw.rng(), self.latents(entry)
        anywhere = int(rng.integers(latents - draw.length + 1))
        start = place(draw.kind, rng, draw.length, latents, changes(state), anywhere)
        part = slice(start, start + draw.length)
        video, reference = (self._latents if self.pictures == "latents" else self._frames)(files, meta, entry, part)
        own, mask = self._audio_windows(files, meta, entry.frames, part)
        text, text_mask = self._text(files, meta)
        labels = torch.from_numpy(state[part].astype(np.int64))
        unspecified = torch.zeros_like(labels)
        frames = self.stride * (draw.length - 1) + self.audio.tokens(self.stride)
        silence = audio_timeline.silent_features(self.audio, self.stride * start - self.audio.left_context, frames)
        fields = {
            "audio": torch.stack([own, self.audio.window(silence, self.stride)]),
            "audio_mask": torch.stack([mask, torch.zeros_like(mask)]),
            "text": text[None],
            "text_mask": text_mask[None],
            "text_event": unspecified,
            "state": labels,
            "emotion": unspecified,
            "emotion_intensity": unspecified.float(),
            "gesture": unspecified,
        }
        inside = "" if meta["reference"] == "outside" else " with a reference of its own"
        return Crop(f"{entry.key}@{start}{inside}", video, reference, self._regions(files, entry, part), fields)

    def check_latents(self, latent: Mapping[str, Any] | None, owner: str) -> None:
        """Raise UserError unless the metadata of latents names this autoencoder."""
        if latent is None:
            raise UserError(
                f"{owner} has no latents, as others have; preprocess it with encode='${{shipped}}', or set "
                "data.pictures=video to encode during training"
            )
        if (got := latent["autoencoder"]) != self.fingerprint:
            raise UserError(
                f"{owner} has latents of autoencoder {got}; expected autoencoder {self.fingerprint}: pass the one it "
                "was preprocessed with, preprocess it again, or encode during training by data.pictures=video"
            )

    def _latents(self, files: Mapping[str, bytes], meta: Mapping[str, Any], entry: Entry, part: slice):
        self.check_latents(meta["latent"], entry.key)
        latents, reference = (_load_array(files, f"{name}.npy") for name in ("latent", "ref_latent"))
        expected, grid = 1 + self.latents(entry), self.grid(entry)
        if latents.shape[1:] != (expected, *grid) or reference.shape[1:] != (1, *grid):
            raise UserError(
                f"got latents of {latents.shape} and {reference.shape}; expected {expected} and 1 of {grid} for "
                f"{entry.frames} frames of {entry.height} × {entry.width}"
            )
        crop, sink = (torch.from_numpy(array).float() for array in (latents[:, 1:][:, part], reference))
        if not (crop.isfinite().all() and sink.isfinite().all()):
            raise UserError("got latents with NaN or infinite values")
        return crop, sink

    def _frames(self, files: Mapping[str, bytes], meta: Mapping[str, Any], entry: Entry, part: slice):
        first = max(part.start - self.history, 0)
        frames = open_video(files["video.mp4"]).read(self.stride * first, self.stride * part.stop + 1)
        with Image.open(io.BytesIO(files["ref.png"])) as image:
            reference = np.asarray(image.convert("RGB"))
        size = (entry.height, entry.width)
        if frames.shape[1:3] != size or reference.shape[:2] != size:
            raise UserError(
                f"got images of {frames.shape[1:3]} and {reference.shape[:2]}; expected {size} by the index"
            )
        return torch.from_numpy(frames), torch.from_numpy(reference.copy())

    def _audio_windows(
        self, files: Mapping[str, bytes], meta: Mapping[str, Any], frames: int, part: slice
    ) -> tuple[Float[Tensor, "l k d"], Bool[Tensor, " l"]]:
        """Feature windows of a crop, and a mask of those that end before the known audio does.

        Silence precedes the clip, as in a stream; windows that reach beyond the clip are masked.
        """
        audio, latents = self.audio, (frames - 1) // self.stride
        if meta["audio_features"] == audio.fingerprint and "afeat.npy" in files:
            features = torch.from_numpy(_load_array(files, "afeat.npy")).float().flatten(1)
            if features.shape != (frames, audio.dim):
                raise UserError(f"got audio features of {tuple(features.shape)}; expected {(frames, audio.dim)}")
        else:
            samples = torch.from_numpy(_decode_flac(files["audio.flac"], frames))
            with _encoder_errors("audio"):
                features = audio_timeline.features_until(audio, samples, first=-1)
        if not features.isfinite().all():
            raise UserError("got audio features with NaN or infinite values")
        padded = audio_timeline.pad_features(audio, features, self.stride * latents)
        ends = self.stride * (1 + torch.arange(latents)) + audio.right_context  # the last frame of each window
        known = (ends < len(features)) & ("no_audio" not in meta["repairs"])
        return audio.window(padded, self.stride)[part], known[part]

    def _regions(self, files: Mapping[str, bytes], entry: Entry, part: slice) -> Float[Tensor, "m l h w"]:
        """Share of each region in the latent pixels; boxes of eyes, and of mouths that are missing, are estimated."""
        of_crop = slice(1 + self.stride * part.start, 1 + self.stride * part.stop)
        masks = torch.zeros(len(REGIONS), part.stop - part.start, *self.grid(entry))
        for name in self.regions:
            boxes = self._boxes(files, name, entry.frames)
            if boxes is None and name in ESTIMATES and (face := self._boxes(files, "face", entry.frames)) is not None:
                boxes = ESTIMATES[name](face)
            if boxes is not None:
                covered = torch.from_numpy(box_masks(boxes[of_crop], *self.grid(entry)))
                masks[REGIONS.index(name)] = covered.unflatten(0, (-1, self.stride)).mean(dim=1)
        return masks

    def _boxes(self, files: Mapping[str, bytes], name: str, frames: int) -> Float[np.ndarray, "f 4"] | None:
        if f"{name}.npy" not in files:
            return None
        boxes = _load_array(files, f"{name}.npy")
        if boxes.shape != (frames, 4) or boxes.dtype.kind != "f":
            raise UserError(f"got {name}.npy of {boxes.shape} ({boxes.dtype}); expected floats of {(frames, 4)}")
        if np.isinf(boxes).any() or (boxes[:, :2] > boxes[:, 2:]).any():
            raise UserError(f"got {name}.npy with infinite or inverted boxes; expected left, top, right, bottom")
        return boxes

    def _text(
        self, files: Mapping[str, bytes], meta: Mapping[str, Any]
    ) -> tuple[Shaped[Tensor, "n ..."], Bool[Tensor, " n"]]:
        if meta["text_features"] == self.text.fingerprint and "text.npy" in files:
            return self.text.padded(torch.from_numpy(_load_array(files, "text.npy")))
        caption = files.get("txt", b"").decode("utf-8")
        with _encoder_errors("text"):
            return self.text.padded(self._prompts.tokens(caption))

    def _states(self, files: Mapping[str, bytes], frames: int) -> Int[np.ndarray, " k"]:
        """The state of each latent, at its middle frame."""
        if "state.npy" in files:
            state = _load_array(files, "state.npy").astype(int)
        elif "vad.npy" in files and self.pause is not None:
            state = SPEAKING * _bridge_pauses(_load_array(files, "vad.npy") > 0, self.pause)
        else:
            state = np.zeros(frames, int)
        if state.shape != (frames,) or state.min() < 0 or state.max() >= len(STATES):
            raise UserError(f"got states of {state.shape}; expected {frames} indices of {', '.join(STATES)}")
        return state[label_frames(frames, self.stride)][: (frames - 1) // self.stride]

    @cached_property
    def _prompts(self) -> PromptCache:
        return PromptCache(self.text)


def read_metadata(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Read and check the `meta.json` of a sample. Raises UserError for values of another type."""
    meta = json.loads(files["meta.json"])
    if not isinstance(meta, dict):
        raise UserError(f"got meta.json with {meta!r:.40}; expected the fields of a sample")
    latent = meta["latent"]
    if latent is not None and not (isinstance(latent, dict) and isinstance(latent.get("autoencoder"), str)):
        raise UserError(
            f"got the latent {latent!r:.40} in meta.json; expected null or the fingerprint of an autoencoder"
        )
    if not isinstance(meta["repairs"], list):
        raise UserError(f"got repairs {meta['repairs']!r:.40} in meta.json; expected a list")
    return meta


@contextmanager
def _encoder_errors(part: str) -> Iterator[None]:
    """Let bugs of an encoder stop the run: they are not those of a damaged file, which could be skipped."""
    try:
        yield
    except UserError:
        raise
    except READ_ERRORS as error:
        raise RuntimeError(f"the {part} encoder failed") from error


def _load_array(files: Mapping[str, bytes], name: str) -> np.ndarray:
    content = io.BytesIO(files[name])
    try:
        return np.load(content)
    except Exception as error:  # numpy parses headers as Python literals, so damaged ones raise anything
        raise UserError(f"got {name}, which is not a readable array ({error})") from error


def _decode_flac(flac: bytes, frames: int) -> Float[np.ndarray, " s"]:
    with av.open(io.BytesIO(flac), "r") as file:
        pieces = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
    samples, expected = np.concatenate(pieces), frames * SAMPLES_PER_FRAME
    if samples.dtype != np.int16 or len(samples) != expected:
        raise UserError(f"got audio of {len(samples)} samples ({samples.dtype}); expected {expected} (int16)")
    return samples.astype(np.float32) / 2**15


def _bridge_pauses(voiced: Bool[np.ndarray, " f"], pause: int) -> Bool[np.ndarray, " f"]:
    """Speech activity in which pauses of up to `pause` frames count as speech."""
    at = np.flatnonzero(voiced)
    bridged = voiced.copy()
    for first, last in itertools.pairwise(at):
        if last - first - 1 <= pause:
            bridged[first:last] = True
    return bridged
