"""Small synthetic videos with events: at known times a patch at the top left (the lamp) lights up and a tone plays."""

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
    """Frames `f h w 3` at these times: a grey gradient, a moving ball, the lamp, and a green stripe at the bottom."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for time in times:
        frame = np.repeat((60 + tint + 40 * x / width + 20 * y / height)[..., None], 3, axis=2)
        ball = (y - height * (0.6 + 0.1 * np.sin(7 * time))) ** 2 + (x - width * (0.5 + 0.2 * np.sin(3 * time))) ** 2
        frame[ball < (height / 5) ** 2] = (180, 90, 40)
        frame[-height // 8 :] = (20, 160, 20)
        if any(event <= time + 1e-6 < event + LIT_S for event in EVENTS):
            frame[: height // 4, : width // 4] = 235
        frames.append(frame)
    return np.stack(frames).astype(np.uint8)


def speech(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Quiet noise, `s`, with a loud tone at the events."""
    time = np.arange(round(seconds * rate)) / rate
    audio = 0.002 * np.random.default_rng(seed).standard_normal(len(time))
    for event in EVENTS:
        audio += 0.5 * np.sin(2 * np.pi * 500 * time) * ((time >= event) & (time < event + LIT_S))
    return audio.astype(np.float32)


def write(
    path: Path,
    frames: np.ndarray,
    audio: np.ndarray | None,
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
    """Write a video; `audio` is `s` or `c s`. The muxer rejects PCM in MP4, hence mostly .mov and .mkv."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or ({"preset": "ultrafast", "crf": "8"}))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        stream.codec_context.colorspace = colours
        ticks = Fraction(1, 1000 if times is not None else rate)
        stream.codec_context.time_base = ticks
        if audio is not None:
            audio = np.atleast_2d(audio)
            layout = {1: "mono", 2: "stereo"}[len(audio)]
            audio_stream = file.add_stream(audio_codec, rate=audio_rate, layout=layout)
        for number, pixels_rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_rgb), format="rgb24")
            frame.pts, frame.time_base = number if times is None else round(1000 * times[number]), ticks
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if audio is not None:
            sample_format = {"pcm_s16le": "s16", "pcm_f32le": "flt", "aac": "fltp"}[audio_codec]
            for number, start in enumerate(range(0, audio.shape[1], 1024)):
                part = audio[:, start : start + 1024]
                if sample_format == "s16":
                    part = np.clip(np.round(part * 32767), -32768, 32767).astype(np.int16)
                packed = part if sample_format == "fltp" else part.T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(packed), format=sample_format, layout=layout)
                at = audio_at + start / audio_rate if audio_times is None else audio_times[number]
                frame.sample_rate, frame.pts, frame.time_base = (
                    audio_rate,
                    round(at * audio_rate),
                    Fraction(1, audio_rate),
                )
                file.mux(audio_stream.encode(frame))
            file.mux(audio_stream.encode(None))
    return path


def talk(path: Path, seconds: float = 2.4, seed: int = 0, **changes) -> Path:
    """Write a valid video that needs no repair."""
    frames = round(25 * seconds)
    return write(path, scene(np.arange(frames) / 25), speech(seconds, seed=seed), **changes)


def lamp(path: Path) -> np.ndarray:
    """Times at which the lamp turns on in a preprocessed video."""
    lit = read_video(path)[0][:, 2:10, 2:10].mean(axis=(1, 2, 3)) > 170
    return (np.flatnonzero(lit[1:] & ~lit[:-1]) + 1) / 25


def beeps(path: Path) -> np.ndarray:
    """Times at which a tone starts in preprocessed audio."""
    audio = read_audio(path)
    level = np.sqrt(np.convolve(audio**2, np.ones(80) / 80, "same"))  # over 5 ms
    on = level > 0.1
    return (np.flatnonzero(on[1:] & ~on[:-1]) + 1) / 16_000
