"""The files of one sample beside its pictures: sound, reference, labels, scores, encodings."""

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
from avatar.data.preprocess.clips import VideoClip, write_sound
from avatar.data.preprocess.detectors import Detections
from avatar.data.preprocess.picture import Form
from avatar.data.preprocess.rules import Models
from avatar.data.preprocess.sound import Sound, level_db
from avatar.media.decode import read_video
from avatar.provenance import versions
from avatar.types import FRAME_RATE, REGIONS, SAMPLES_PER_FRAME

SCHEMA = 1


@dataclass(frozen=True)
class Part:
    """A span on the grid, with what is known of its person, and how its pictures are formed."""

    start: int
    end: int
    person: str | None
    caption: str | None
    scores: Mapping[str, float | None]
    form: Form


def write(
    clip: VideoClip, part: Part, reference: VideoClip, sound: Sound, origin: Mapping[str, Any], tools: Models
) -> dict[str, Any]:
    """Writes a clip's files beside its pictures, all but what depends on other sources; gives its line.

    Args:
        reference: The clip whose first picture is the sample's reference; the clip itself where there is no other.
        origin: What is said of the source in `meta.json`.

    Raises:
        Rejected: "bad_caption" where the text encoder refuses it.
    """
    samples = _frames_of(sound, clip.start, clip.frames)
    voiced = scores.speech_activity(samples)
    frames = read_video(clip.video)[0] if tools.need_frames else None
    _encode(clip, part, reference, sound, frames, tools)
    write_sound(clip.file("audio.flac"), samples)
    shutil.copyfile(reference.first, clip.file("ref.png"))
    np.save(clip.file("vad.npy"), voiced.astype(np.uint8))
    for name, found in (("face", clip.seen.faces), ("lips", clip.seen.mouths), ("body", clip.seen.bodies)):
        if found is not None:
            np.save(clip.file(f"{name}.npy"), found)
    if part.caption is not None:
        clip.file("txt").write_text(part.caption, encoding="utf-8")
    measured = {
        **part.scores,
        "motion": clip.motion,
        "sharpness": clip.sharpness,
        "loudness_db": level_db(samples) if sound.sha256 else None,
        "speech": float(voiced.mean()) if sound.sha256 else None,
        "sync_proxy": None if (moved := clip.seen.mouth_motion) is None else scores.sync_proxy(samples, moved),
    }
    for name, scorer in tools.scorers.items():
        assert frames is not None
        measured[name] = scorer(frames, samples)
    known = {
        "start_s": clip.start / FRAME_RATE,
        "frames": clip.frames,
        "height": part.form.height,
        "width": part.form.width,
        "shot": clip.shot,
        "pictures": clip.pictures,
        "person_id": part.person,
        "regions": _regions(clip.seen),
        "scores": {name: _finite(value) for name, value in measured.items()},
    }
    meta = known | {
        **origin,
        "schema": SCHEMA,
        "fps": FRAME_RATE,
        "reference": "inside" if reference is clip else "outside",
        "vad": "level",
        "faces": None if clip.seen.faces is None else {"most": clip.seen.most_faces},
        "body": None if clip.seen.bodies is None else {"points": clip.seen.bodies.shape[1]},
        **tools.encoders.line(),
        "versions": _versions(),
    }
    clip.file("meta.json").write_text(dumps(meta), encoding="utf-8")
    return {"status": "accepted", "stem": clip.stem.name, **known}


def dumps(content: Any) -> str:
    """JSON of one line, the same for the same content."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _regions(seen: Detections) -> list[str]:
    """Those of REGIONS that masks can be made of, in some frame: without boxes of mouths they are estimated."""
    boxes = {"face": seen.faces, "lips": seen.faces if seen.mouths is None else seen.mouths}
    return [name for name in REGIONS if (found := boxes[name]) is not None and np.isfinite(found).any()]


@functools.cache
def _versions() -> dict[str, str]:
    return versions()  # which takes longer than to write a sample


def _encode(
    clip: VideoClip,
    part: Part,
    reference: VideoClip,
    sound: Sound,
    frames: UInt8[np.ndarray, "f h w 3"] | None,
    tools: Models,
) -> None:
    audio = tools.encoders.audio
    left, right = receptive_field_frames(audio) if audio else (0, 0)
    around = _frames_of(sound, clip.start - left, left + clip.frames + right)
    tools.encoders.write(clip.stem, frames, reference.first, around, slice(left, left + clip.frames), part.caption)


def _frames_of(sound: Sound, start: int, frames: int) -> Float32[np.ndarray, " s"]:
    """The sound of frames of the grid, zeros where there is none."""
    first, last = start * SAMPLES_PER_FRAME, (start + frames) * SAMPLES_PER_FRAME
    part = sound.samples[max(first, 0) : max(last, 0)]
    before = max(-first, 0)
    return np.pad(part, (before, last - first - before - len(part)))


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
