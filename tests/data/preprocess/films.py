"""Tiny films with a lamp and a beep: at known times a patch at the top left lights up and a tone sounds."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from avatar.data.preprocess.rules import Rules
from avatar.media.decode import read_audio, read_video

HEIGHT, WIDTH = 64, 96
LIT_S = 0.2
EVENTS = (0.4, 1.2, 1.6)
RULES = Rules(
    shortest_s=1.0,
    longest_s=10.0,
    temporal_stride=4,
    multiple=8,
    side=512,
    cut=0.25,
    faces="keep",
    no_audio="reject",
    silent_db=-50.0,
    clipped=0.01,
    av_length_s=0.5,
    frozen_s=1.0,
    pictures="copy",
    preset="ultrafast",
    crf=12,
)


def scene(times: Sequence[float], height: int = HEIGHT, width: int = WIDTH, tint: int = 0) -> np.ndarray:
    """Pictures `f h w 3` at these times: a slope of grey, a ball that wanders, the lamp; green at the bottom."""
    y, x = np.mgrid[:height, :width]
    pictures = []
    for time in times:
        picture = np.repeat((60 + tint + 40 * x / width + 20 * y / height)[..., None], 3, axis=2)
        ball = (y - height * (0.6 + 0.1 * np.sin(7 * time))) ** 2 + (x - width * (0.5 + 0.2 * np.sin(3 * time))) ** 2
        picture[ball < (height / 5) ** 2] = (180, 90, 40)
        picture[-height // 8 :] = (20, 160, 20)
        if any(event <= time + 1e-6 < event + LIT_S for event in EVENTS):
            picture[: height // 4, : width // 4] = 235
        pictures.append(picture)
    return np.stack(pictures).astype(np.uint8)


def speech(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Faint noise, `s`, with a loud tone at the events."""
    time = np.arange(round(seconds * rate)) / rate
    sound = 0.002 * np.random.default_rng(seed).standard_normal(len(time))
    for event in EVENTS:
        sound += 0.5 * np.sin(2 * np.pi * 500 * time) * ((time >= event) & (time < event + LIT_S))
    return sound.astype(np.float32)


def write(
    path: Path,
    pictures: np.ndarray,
    sound: np.ndarray | None,
    *,
    rate: int = 25,
    times: Sequence[float] | None = None,
    audio_rate: int = 16_000,
    audio_at: float = 0.0,
    audio_times: Sequence[float] | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    audio_codec: str = "pcm_s16le",
    container: dict[str, str] | None = None,
    pixel_aspect: int = 1,
    colours: int = 2,
) -> Path:
    """A film; `sound` is `s` or `c s`. PCM in MP4 is refused by the muxer, hence mostly .mov and .mkv."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or ({"preset": "ultrafast", "crf": "8"}))
        stream.height, stream.width, stream.pix_fmt = pictures.shape[1], pictures.shape[2], pixels
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        stream.codec_context.colorspace = colours
        ticks = Fraction(1, 1000 if times is not None else rate)
        stream.codec_context.time_base = ticks
        if sound is not None:
            sound = np.atleast_2d(sound)
            layout = {1: "mono", 2: "stereo"}[len(sound)]
            voice = file.add_stream(audio_codec, rate=audio_rate, layout=layout)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number if times is None else round(1000 * times[number]), ticks
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            form = {"pcm_s16le": "s16", "pcm_f32le": "flt", "aac": "fltp"}[audio_codec]
            for number, start in enumerate(range(0, sound.shape[1], 1024)):
                part = sound[:, start : start + 1024]
                if form == "s16":
                    part = np.clip(np.round(part * 32767), -32768, 32767).astype(np.int16)
                packed = part if form == "fltp" else part.T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(packed), format=form, layout=layout)
                at = audio_at + start / audio_rate if audio_times is None else audio_times[number]
                frame.sample_rate, frame.pts, frame.time_base = (
                    audio_rate,
                    round(at * audio_rate),
                    Fraction(1, audio_rate),
                )
                file.mux(voice.encode(frame))
            file.mux(voice.encode(None))
    return path


def talk(path: Path, seconds: float = 2.4, seed: int = 0, **changes) -> Path:
    """An ordinary film."""
    frames = round(25 * seconds)
    return write(path, scene(np.arange(frames) / 25), speech(seconds, seed=seed), **changes)


def lamp(path: Path) -> np.ndarray:
    """Times at which the lamp goes on in a prepared video."""
    lit = read_video(path)[0][:, 2:10, 2:10].mean(axis=(1, 2, 3)) > 170
    return (np.flatnonzero(lit[1:] & ~lit[:-1]) + 1) / 25


def beeps(path: Path) -> np.ndarray:
    """Times at which a tone begins in a prepared sound."""
    sound = read_audio(path)
    level = np.sqrt(np.convolve(sound**2, np.ones(80) / 80, "same"))  # over 5 ms
    on = level > 0.1
    return (np.flatnonzero(on[1:] & ~on[:-1]) + 1) / 16_000
