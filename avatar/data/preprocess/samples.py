"""Files of one sample in addition to its video: audio, reference, labels, scores, encodings, metadata."""

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from avatar.conditioning.audio_timeline import receptive_field_frames
from avatar.data.preprocess import scores
from avatar.data.preprocess.audio import SourceAudio, level_db
from avatar.data.preprocess.clips import VideoClip, write_flac
from avatar.data.preprocess.detectors import Detections
from avatar.data.preprocess.rules import Models
from avatar.data.preprocess.video_frames import FrameConversion
from avatar.media.decode import read_video
from avatar.provenance import versions
from avatar.types import FRAME_RATE, REGIONS, SAMPLES_PER_FRAME

SCHEMA = 1


@dataclass(frozen=True)
class Segment:
    """A span of a source in frames of the grid, [start, end), with its annotation and frame conversion."""

    start: int
    end: int
    person: str | None
    caption: str | None
    scores: Mapping[str, float | None]
    conversion: FrameConversion


def write(
    clip: VideoClip,
    segment: Segment,
    reference: VideoClip,
    audio: SourceAudio,
    source_info: Mapping[str, Any],
    models: Models,
) -> dict[str, Any]:
    """Write the files of a clip that depend on its source alone, without its video, and return its status line.

    Args:
        reference: the clip whose first frame is the reference of the sample; the clip itself if there is no other.
        source_info: entries of `meta.json` about the source.

    Raises:
        Rejected: "bad_caption" if the text encoder rejects the caption.
    """
    samples = _samples_of(audio, clip.start, clip.frames)
    speech = scores.speech_activity(samples)
    frames = read_video(clip.video)[0] if models.need_frames else None
    _encode(clip, segment, reference, audio, frames, models)
    write_flac(clip.file("audio.flac"), samples)
    shutil.copyfile(reference.first_frame, clip.file("ref.png"))
    np.save(clip.file("vad.npy"), speech.astype(np.uint8))
    detections = clip.detections
    for name, found in (("face", detections.faces), ("lips", detections.mouths), ("body", detections.bodies)):
        if found is not None:
            np.save(clip.file(f"{name}.npy"), found)
    if segment.caption is not None:
        clip.file("txt").write_text(segment.caption, encoding="utf-8")
    mouth_motion = detections.mouth_motion
    measured = {
        **segment.scores,
        "motion": clip.motion,
        "sharpness": clip.sharpness,
        "loudness_db": level_db(samples) if audio.sha256 else None,
        "speech": float(speech.mean()) if audio.sha256 else None,
        "sync_proxy": None if mouth_motion is None else scores.sync_proxy(samples, mouth_motion),
    }
    for name, scorer in models.scorers.items():
        assert frames is not None
        measured[name] = scorer(frames, samples)
    line = {
        "start_s": clip.start / FRAME_RATE,
        "frames": clip.frames,
        "height": segment.conversion.height,
        "width": segment.conversion.width,
        "shot": clip.shot,
        "pictures": clip.video_method,
        "person_id": segment.person,
        "regions": _regions(detections),
        "scores": {name: _finite(value) for name, value in measured.items()},
    }
    meta = line | {
        **source_info,
        "schema": SCHEMA,
        "fps": FRAME_RATE,
        "reference": "inside" if reference is clip else "outside",
        "vad": "level",
        "faces": None if detections.faces is None else {"most": detections.max_faces},
        "body": None if detections.bodies is None else {"points": detections.bodies.shape[1]},
        **models.encoders.fingerprints(),
        "versions": _versions(),
    }
    clip.file("meta.json").write_text(dumps(meta), encoding="utf-8")
    return {"status": "accepted", "stem": clip.stem.name, **line}


def dumps(content: Any) -> str:
    """Deterministic JSON on one line."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _regions(detections: Detections) -> list[str]:
    """Regions with a mask in at least one frame; eyes, and mouths without a detector, are estimated from faces."""
    faces, mouths = detections.faces, detections.mouths
    boxes = {"face": faces, "lips": faces if mouths is None else mouths, "eyes": faces}
    return [name for name in REGIONS if (found := boxes[name]) is not None and np.isfinite(found).any()]


@functools.cache
def _versions() -> dict[str, str]:
    return versions()  # cached, since it takes longer than writing a sample


def _encode(
    clip: VideoClip,
    segment: Segment,
    reference: VideoClip,
    audio: SourceAudio,
    frames: UInt8[np.ndarray, "f h w 3"] | None,
    models: Models,
) -> None:
    encoder = models.encoders.audio
    left, right = receptive_field_frames(encoder) if encoder else (0, 0)
    samples = _samples_of(audio, clip.start - left, left + clip.frames + right)
    window = slice(left, left + clip.frames)
    models.encoders.write(clip.stem, frames, reference.first_frame, samples, window, segment.caption)


def _samples_of(audio: SourceAudio, start: int, frames: int) -> Float32[np.ndarray, " s"]:
    """The samples of frames of the grid, zero-padded outside of the source."""
    first, last = start * SAMPLES_PER_FRAME, (start + frames) * SAMPLES_PER_FRAME
    samples = audio.samples[max(first, 0) : max(last, 0)]
    before = max(-first, 0)
    return np.pad(samples, (before, last - first - before - len(samples)))


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
